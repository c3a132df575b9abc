"""One formula each, of tensors; half precision is widened first, float64 stays float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fader.attributes import Attributes, Head
from fader.draws import Draws
from fader.networks.layers import wide


def squared_errors(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each image.

    Args:
        reconstruction, images: [N, C, H, W] in [-1, 1].

    Returns:
        [N], mean over channels and pixels; 4 at most.

    Raises:
        ValueError: shapes disagree.

    Source: Lample et al. 2017, arXiv:1706.00409, equation 1 (there a sum; a mean in the authors' code).
    """
    if reconstruction.shape != images.shape:
        raise ValueError(f"a reconstruction {tuple(reconstruction.shape)} of images {tuple(images.shape)}")
    return (wide(reconstruction) - wide(images)).square().flatten(1).mean(1)


def attribute_loss(attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, head: Head) -> Tensor:
    """Cross-entropy of attribute logits against labels: what a discriminator or classifier minimises.

    Args:
        logits: [N, attributes.logits_width(head)].
        labels: [N, A]; -1 = unknown, left out.
        known: [A] divisors, see `Batch.known`.

    Returns:
        Scalar in nats: the sum over attributes of the mean over known records. A · ln 2 for A binary attributes that
        the logits say nothing about.

    Raises:
        ValueError: shapes disagree.

    Source: Lample et al. 2017, arXiv:1706.00409, equation 2.
    """
    return attributes.losses(logits, labels, known, head).sum()


def fool_loss(
    attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, draws: Draws, head: Head
) -> Tensor:
    """Cross-entropy of the latent discriminator's logits against wrong labels: the encoder minimises it.

    Low when the latent makes the discriminator say the opposite (of a k-way attribute: a random other category).
    Arguments and reduction as in `attribute_loss`.

    Source: Lample et al. 2017, arXiv:1706.00409, equation 3.
    """
    return attribute_loss(attributes, logits, attributes.flipped(labels, draws), known, head)


def patch_losses(probabilities: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of each image's probability of being real, in nats.

    Args:
        probabilities: [N] in [0, 1]; kept 1e-6 away from the ends, where the logarithm has none.
        target: 1 = real, 0 = decoded; 1 - s and s under label smoothing s.

    Raises:
        ValueError: the target is outside [0, 1].

    Source: the patch discriminator of facebookresearch/FaderNetworks, with s = 0.2.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"target is {target}; it must be in [0, 1]")
    p = wide(probabilities).clamp(1e-6, 1 - 1e-6)
    return -(target * torch.log(p) + (1 - target) * torch.log1p(-p))


def accuracies(attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, head: Head) -> Tensor:
    """Share of known records whose attribute is right, [A]; for a continuous attribute 1 - mean absolute error.

    Arguments as in `attribute_loss`. No gradient.
    """
    right = 1 - (attributes.preds(logits.detach(), head) - labels).abs()
    for j, attribute in enumerate(attributes):
        if attribute.kind != "continuous":
            right[:, j] = right[:, j] == 1
    return torch.where(labels >= 0, right, 0.0).sum(0) / known.clamp(min=1e-6)
