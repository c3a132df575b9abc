"""How far a distribution of latents is from the one that noise is drawn from."""

from __future__ import annotations

from torch import Tensor

from fader.networks.layers import wide


def gaussian_divergences(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp log_variance) ‖ N(0, 1)) of each record, in nats, [N]: summed over the latent's numbers.

    Args:
        mean, log_variance: [N, F].

    Source: Kingma, Welling 2014, arXiv:1312.6114, appendix B.
    """
    mean, log_variance = wide(mean), wide(log_variance)
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
