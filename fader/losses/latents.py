"""Losses of latents: how far they are from noise, and a step of noise by which a discriminator finds its image more real."""

from torch import Tensor

from fader.networks.layers import wide


def gaussian_divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp log_variance) ‖ N(0, 1)) of each record, in nats, [N]: summed over the latent's numbers.
    mean, log_variance: [N, F].
    Source: Kingma, Welling 2014, arXiv:1312.6114, appendix B."""
    mean, log_variance = wide(mean), wide(log_variance)
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)


def natural_steps(gradient: Tensor, step: float, damping: float) -> Tensor:
    """α g / (β + ‖g‖²) of each record: a natural-gradient step whose Fisher matrix is g gᵀ + β I.
    gradient: [N, F], g: of the discriminator's logits with respect to the noise. step, damping: α and β.
    Source: Wu et al. 2019, "LOGAN", arXiv:1912.00953, equation 12 (there noise is uniform, and clipped afterwards)."""
    return step * gradient / (damping + gradient.square().sum(1, keepdim=True))
