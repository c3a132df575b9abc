"""Spectral norm: a weight divided by its largest singular value, so that a layer stretches no input by more than 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class SpectralNorm(nn.Module):
    """Divides a weight by an estimate σ of its largest singular value: one power iteration a forward pass in train mode.

        v = Wᵀu / ‖Wᵀu‖,   σ = ‖W v‖,   u ← W v / σ

    W is the weight as a matrix, one row an output. The gradient passes through v, too, so that the quotient is an exact function
    of W and u and has the second derivatives that a gradient penalty needs. Ranks hold the same u, because they hold the same
    weights. u moves only in train mode.
    weight: the one that is divided. outputs: its dimension of outputs. iterations: of u before the first pass.
    Source: Miyato et al. 2018, arXiv:1802.05957, algorithm 1.
    """

    def __init__(self, weight: Tensor, outputs: int, iterations: int = 15) -> None:
        super().__init__()
        self.outputs = outputs
        self.register_buffer("u", F.normalize(torch.randn(weight.shape[outputs]), dim=0))
        for _ in range(iterations):
            self(weight.detach())

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.transpose(0, self.outputs).flatten(1)
            longest = matrix @ F.normalize(self.u.clone() @ matrix, dim=0)
            if self.training:
                with torch.no_grad():
                    self.u.copy_(F.normalize(longest, dim=0))
            return weight / longest.norm()


def with_spectral_norm(network: nn.Module) -> nn.Module:
    """The network itself, whose convolutions have spectral norm from now on."""
    for module in [module for module in network.modules() if isinstance(module, _CONVOLUTIONS)]:
        outputs = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight, outputs))
    return network
