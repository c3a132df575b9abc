"""How near swaps of drawn faces come to the truth: the same face drawn again with the attribute changed; no judge is asked."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Batch
from pipeline import metrics
from pipeline.data.datasets.twins import Twins
from pipeline.evaluation.report import Measure, Truth
from pipeline.evaluation.specification import Specification
from pipeline.images import Preprocessing, decode, preprocess, to_float, to_uint8

FAINT = 8  # grey levels: where photo and twin differ by no more, nothing was asked to change


class TwinErrors:
    """Holds the swaps of a batch against the stored twins of its records."""

    def __init__(self, twins: Twins, keys: Sequence[str], attributes: Attributes, preprocessing: Preprocessing) -> None:
        self._twins, self._keys, self._attributes, self._preprocessing = twins, keys, attributes, preprocessing

    def __call__(self, batch: Batch, picture: Callable[[Tensor], Tensor], decoded: Tensor) -> Tensor:
        """Return [N, swaps, 3] the `errors` of every swap that `picture` makes of codes; decoded: reconstructions."""
        assert batch.images is not None
        columns = []
        for j, _, changed, target in self._attributes.swaps(batch.attributes):
            swaps, name = picture(self._attributes.code(changed)), self._attributes[j].name
            rows = []
            for n, value in enumerate(target.tolist()):
                stored = self._twins.of(self._keys[int(batch.index[n])], name, value) if batch.attributes[n, j] >= 0 else ()
                pixels = [preprocess(decode(data), self._preprocessing) for data in stored]
                looks = torch.from_numpy(np.stack(pixels)).to(swaps.device) if pixels else None
                rows.append(errors(swaps[n], looks, batch.images[n], decoded[n]))
            columns.append(torch.stack(rows))
        return torch.stack(columns, 1)


def errors(swap: Tensor, looks: Tensor | None, photo: Tensor, reconstruction: Tensor) -> Tensor:
    """[3] float64: how far a swap is from its nearest twin inside the region that should change, and from the photo.

    swap, photo, reconstruction: [C, S, S] in [-1, 1]. looks: [L, S, S, C] uint8, the twin in each look that the photo
    allows. Returns inside: squared error against the twin over that of the photo, 0 = the twin, 1 = nothing done; outside:
    mean squared error of the swap against the photo, then of the reconstruction. Not numbers where there is no twin.
    """
    if looks is None:
        return torch.full((3,), math.nan, dtype=torch.float64, device=swap.device)
    twins, own = to_float(looks).double(), to_uint8(photo[None]).int()
    region = ((looks.int() - own).abs() > FAINT).any(3)[:, None]
    inside, nothing = (((one.double() - twins).square() * region).sum((1, 2, 3)) for one in (swap, photo))
    nearest = int(inside.argmin())
    outside = ~region[nearest].expand_as(photo)
    apart = [(one.double() - photo.double()).square()[outside].mean() for one in (swap, reconstruction)]
    return torch.stack([inside[nearest] / nothing[nearest], *apart])  # 0 / 0 is no number, where nothing differs


def truths(attributes: Attributes, labels: Tensor, rows: Tensor, asked: Specification) -> list[Truth]:
    result, column = [], 0
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        for start in attribute.values:
            for step in range(1, attribute.k):
                own = rows[:, column + step - 1]
                counted = (own.isfinite().all(1) & (label == start))[:, None].expand_as(own)
                means = metrics.means(own, counted).tolist()
                resampled = metrics.bootstrap_means(own, counted, seed=asked.seed, resamples=asked.resamples)
                measures = [Measure(mean, *metrics.interval(resampled[:, i])) for i, mean in enumerate(means)]
                names = (attribute.name, *map(attribute.value_name, (start, (start + step) % attribute.k)))
                result.append(Truth(*names, int(counted[:, 0].sum()), *measures))
        column += attribute.k - 1
    return result
