"""Where noise should move so that a discriminator finds its image more real."""

from __future__ import annotations

from torch import Tensor


def natural_steps(gradient: Tensor, step: float, damping: float) -> Tensor:
    """α g / (β + ‖g‖²) of each record: a natural-gradient step whose Fisher matrix is g gᵀ + β I.

    Args:
        gradient: [N, F], g: of the discriminator's logits with respect to the noise.
        step, damping: α and β.

    Source: Wu et al. 2019, "LOGAN", arXiv:1912.00953, equation 12 (there noise is uniform, and clipped afterwards).
    """
    return step * gradient / (damping + gradient.square().sum(1, keepdim=True))
