"""How far attribute logits are from labels, from wrong labels, and how often they are right."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fader.attributes import Attributes, Head
from fader.draws import Draws
from fader.networks.layers import wide


def attribute_losses(
    attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, head: Head = "softmax", weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each attribute, [A], in nats (mean squared error for a continuous one).

    The reduction is a sum over the known records divided by `known`; see `Batch.known`.
    logits: [N, attributes.logits_width(head)]. labels: [N, A]; -1 = unknown, left out. known: [A] divisors.
    weights: [N, A], what each label counts; by default 1.
    Raises ValueError: shapes disagree.
    """
    attributes.check_width(labels)
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits for {len(labels)} labels")
    losses = []
    for j, (attribute, block) in enumerate(zip(attributes, attributes.blocks(logits, head))):
        label, mask, block = labels[:, j], labels[:, j] >= 0, wide(block)
        if attribute.kind == "continuous":
            each = (torch.sigmoid(block[:, 0]) - label).square()
        elif block.shape[1] == 1:
            each = F.binary_cross_entropy_with_logits(block[:, 0], label.clamp(min=0).to(block.dtype), reduction="none")
        else:
            each = F.cross_entropy(block, label.clamp(min=0).long(), reduction="none")
        each = each if weights is None else each * weights[:, j]
        losses.append(torch.where(mask, each, 0.0).sum() / known[j].clamp(min=1e-6))
    return torch.stack(losses) if losses else logits.new_zeros(0)


def attribute_loss(attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, head: Head) -> Tensor:
    """Cross-entropy of attribute logits against labels: what a discriminator or classifier minimises.

    logits: [N, attributes.logits_width(head)]. labels: [N, A]; -1 = unknown, left out. known: [A] divisors, see `Batch.known`.
    Returns: Scalar in nats: the sum over attributes of the mean over known records. A · ln 2 for A binary attributes that the
    logits say nothing about.
    Raises ValueError: shapes disagree.
    Source: Lample et al. 2017, arXiv:1706.00409, equation 2.
    """
    return attribute_losses(attributes, logits, labels, known, head).sum()


def condition_loss(attributes: Attributes, found: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Squared error of what an encoder says the attributes are, as a generator reads them (`Condition`).

    The reduction is the sum over columns of the mean over records whose label is known.
    found: [N, width], 1 where a value is present and -1 where it is absent; one column a binary or continuous attribute.
    labels: [N, A]; -1 = unknown, left out. known: [A] divisors, see `Batch.known`.
    Source: Perarnau et al. 2016, arXiv:1611.06355, equation 3.
    """
    code, errors, start = attributes.code(labels), [], 0
    for j, (attribute, columns) in enumerate(zip(attributes, attributes.code_slices())):
        width = attribute.k if attribute.kind == "k-way" else 1
        wanted = 2 * code[:, columns.stop - width : columns.stop] - 1
        each = (found[:, start : start + width] - wanted).square().sum(1)
        errors.append(torch.where(labels[:, j] >= 0, each, 0.0).sum() / known[j].clamp(min=1e-6))
        start += width
    return torch.stack(errors).sum()


def smoothed(attributes: Attributes, labels: Tensor, share: float) -> Tensor:
    """Labels [N, A] in which a binary attribute that is present is 1 - share instead of 1; for the sigmoid head.
    Source: Salimans et al. 2016, arXiv:1606.03498, section 3.4, one-sided label smoothing."""
    columns = [labels[:, j] * (1 - share if a.kind == "binary" else 1) for j, a in enumerate(attributes)]
    return torch.stack(columns, 1)


def fool_loss(attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, draws: Draws, head: Head) -> Tensor:
    """Cross-entropy of the latent discriminator's logits against wrong labels: the encoder minimises it.
    Low when the latent makes the discriminator say the opposite (of a k-way attribute: a random other category). Arguments and
    reduction as in `attribute_loss`.
    Source: Lample et al. 2017, arXiv:1706.00409, equation 3."""
    return attribute_loss(attributes, logits, attributes.flipped(labels, draws), known, head)


def log_odds(attributes: Attributes, logits: Tensor, labels: Tensor, head: Head) -> Tensor:
    """[N, A]: by how much the logits favour each label over all other values; the logit itself if continuous, 0 if unknown."""
    columns = []
    for j, (attribute, block) in enumerate(zip(attributes, attributes.blocks(wide(logits), head))):
        label = labels[:, j].clamp(min=0)
        if attribute.kind == "continuous":
            odds = block[:, 0]
        elif block.shape[1] == 1:
            odds = block[:, 0] * (2 * label - 1).to(block.dtype)
        else:
            own = label[:, None] == torch.arange(block.shape[1], device=label.device)
            odds = torch.where(own, block, 0.0).sum(1) - torch.where(own, -torch.inf, block).logsumexp(1)
        columns.append(torch.where(labels[:, j] >= 0, odds, 0.0))
    return torch.stack(columns, 1)


def accuracies(attributes: Attributes, logits: Tensor, labels: Tensor, known: Tensor, head: Head) -> Tensor:
    """Share of known records whose attribute is right, [A]; for a continuous attribute 1 - mean absolute error.
    Arguments as in `attribute_loss`. No gradient."""
    right = 1 - (attributes.preds(logits.detach(), head) - labels).abs()
    for j, attribute in enumerate(attributes):
        if attribute.kind != "continuous":
            right[:, j] = right[:, j] == 1
    return torch.where(labels >= 0, right, 0.0).sum(0) / known.clamp(min=1e-6)
