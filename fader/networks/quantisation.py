"""Feature quantisation: a discriminator reads the nearest keys of a dictionary in place of its own features."""

import torch
from torch import Tensor, nn

from fader.method import SumsOverRanks
from fader.networks.layers import wide


class Quantisation(SumsOverRanks):
    """Puts in place of each pixel's features h the nearest of K keys e, through which gradients pass as if h stood there.

        n_k, m_k   ←  γ n_k + (1 - γ) #{h: k nearest},  γ m_k + (1 - γ) Σ{h: k nearest}     in train mode, over all ranks
        e_k        =  m_k / ((n_k + ε) / (Σ n + K ε) · Σ n)

    Each pass leaves in `costs` how far its features lie from their keys, [N]: the mean over pixels and channels of (h - e)²,
    whose gradient moves h alone. Whoever runs the network takes them from there (`taken_costs`).

    Counts begin at 1, so that a key that nothing is near to begins where it was drawn and goes to 0 slowly.
    channels: of the features [N, channels, H, W]. keys: K. decay: γ.
    Source: Zhao et al. 2020, arXiv:2004.02088, section 3; ε as in YangNaruto/FQ-GAN.
    """

    def __init__(self, channels: int, keys: int, decay: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("counts", torch.ones(keys))
        self.register_buffer("sums", torch.randn(keys, channels))
        self.costs: list[Tensor] = []

    @property
    def keys(self) -> Tensor:
        """[K, C]."""
        total = self.counts.sum()
        shares = (self.counts + self.eps) / (total + len(self.counts) * self.eps)
        return self.sums / (shares * total)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            features = wide(x).movedim(1, -1)
            nearest = self._nearest(features.detach().flatten(0, -2).to(self.sums.dtype)).view_as(features)
            self.costs.append((features - nearest).square().flatten(1).mean(1))
            return (features + (nearest - features).detach()).movedim(-1, 1).to(x.dtype)

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        keys = self.keys
        index = (keys.square().sum(1) - 2 * rows @ keys.T).argmin(1)
        if self.training:
            # A product, because scattered sums on CUDA depend on who comes first.
            chosen = (index[:, None] == torch.arange(len(keys), device=rows.device)).to(rows.dtype)
            total = self.reduce_sum(torch.cat([chosen.sum(0)[:, None], chosen.T @ rows], 1))
            self.counts.lerp_(total[:, 0], 1 - self.decay)
            self.sums.lerp_(total[:, 1:], 1 - self.decay)
        return keys.index_select(0, index)


def taken_costs(network: nn.Module) -> list[Tensor]:
    """What the passes of a network since the last call cost, [N] each; they are forgotten."""
    layers = [module for module in network.modules() if isinstance(module, Quantisation)]
    costs = [cost for layer in layers for cost in layer.costs]
    for layer in layers:
        layer.costs.clear()
    return costs
