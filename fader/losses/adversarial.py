"""What a discriminator and the network it presses on play for: real pictures against decoded or generated ones.

Every loss is one number a record, so that a mean over the global batch can be taken of it (`Batch.mean`). A logit above 0
says "real".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fader.networks.layers import wide

PairLosses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Game:
    """The two sides of an adversarial loss. Each takes the logits [N] of real and of decoded images and gives [N] losses.
    discriminator: what the discriminator minimises. maker: what the network that makes images minimises. compares: the maker's
    losses depend on the real images, too."""

    discriminator: PairLosses
    maker: PairLosses
    compares: bool = False


GAMES = {
    # Goodfellow et al. 2014, arXiv:1406.2661, equation 1, section 3: cross-entropies in nats, -log σ(real) - log(1 - σ(decoded))
    # and -log σ(decoded), whose gradient stays where the discriminator is sure; 2 ln 2 and ln 2 when logits tell nothing.
    "non_saturating": Game(
        lambda real, decoded: F.softplus(-wide(real)) + F.softplus(wide(decoded)),
        lambda real, decoded: F.softplus(-wide(decoded)),
    ),
    # Lim, Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957, equations 16 and 17: nothing is gained beyond 1.
    "hinge": Game(lambda real, decoded: F.relu(1 - wide(real)) + F.relu(1 + wide(decoded)), lambda real, decoded: -wide(decoded)),
    # Jolicoeur-Martineau 2018, arXiv:1807.00734, RSGAN: -log σ(real - decoded), each image against the one beside it; and turned.
    "relativistic": Game(
        lambda real, decoded: F.softplus(wide(decoded) - wide(real)),
        lambda real, decoded: F.softplus(wide(real) - wide(decoded)),
        compares=True,
    ),
}


def r1_penalties(logits: Tensor, images: Tensor) -> Tensor:
    """Squared length of the logits' gradient with respect to each image; differentiable once more.

    A discriminator adds (γ / 2) times their mean over real images to its loss. Its logits must not mix records (no batch norm),
    because the gradient of their sum is taken.
    logits: [N], or [N, …] whose sum a record is meant, computed from `images`. images: [N, C, H, W], which require gradients.
    Returns: [N], summed over channels and pixels.
    Source: Mescheder, Geiger, Nowozin 2018, arXiv:1801.04406, section 4.1.
    """
    (gradient,) = torch.autograd.grad(wide(logits).sum(), images, create_graph=True)
    return wide(gradient).square().flatten(1).sum(1)


def patch_probabilities(logits: Tensor) -> Tensor:
    """Map of logits [N, 1, H, W] to each image's probability [N] of being real: the mean of its patches'."""
    return torch.sigmoid(wide(logits)).flatten(1).mean(1)


def patch_losses(probabilities: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of each image's probability of being real, in nats.

    probabilities: [N], as `patch_probabilities` gives them; kept 1e-6 away from the ends, where the logarithm has none.
    target: 1 = real, 0 = decoded; 1 - s and s under label smoothing s.
    Raises ValueError: the target is outside [0, 1].
    Source: the patch discriminator of facebookresearch/FaderNetworks, with s = 0.2.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target is {target}; it must be in [0, 1]")
    p = wide(probabilities).clamp(1e-6, 1 - 1e-6)
    return -(target * torch.log(p) + (1 - target) * torch.log1p(-p))


def multi_hinges(logits: Tensor, classes: Tensor) -> Tensor:
    """max(0, 1 + max over k ≠ t of logits_k - logits_t) of each record, [N], where t is its class.

    A class that is unknown means any but the last: max(0, 1 + logits_K - max over k < K of logits_k).
    logits: [N, K + 1]; the last is of images that are not real.
    classes: [N] int64, 0 … K, or -1 = real, of a class that is unknown.
    Source: Crammer, Singer 2001; Kavalerov et al. 2019, arXiv:1912.04216, equation 3.
    """
    logits = wide(logits)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    unknown = (classes < 0)[:, None] & (numbers < logits.shape[1] - 1)
    wanted = unknown | (classes[:, None] == numbers)
    best = [torch.where(kept, logits, -torch.inf).amax(1) for kept in (wanted, ~wanted)]
    return F.relu(1 + best[1] - best[0])
