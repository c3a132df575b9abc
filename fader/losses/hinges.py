"""The multi-hinge loss: one discriminator that says of which class a real image is, or that it is none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fader.networks.layers import wide


def multi_hinges(logits: Tensor, classes: Tensor) -> Tensor:
    """max(0, 1 + max over k ≠ t of logits_k - logits_t) of each record, [N], where t is its class.

    A class that is unknown means any but the last: max(0, 1 + logits_K - max over k < K of logits_k).

    Args:
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
