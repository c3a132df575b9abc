"""Tables 1 and 2 from per-record results: every number is a function of what was kept of each record.

A swap of an attribute to a value is counted on the records whose known label is another value. Its accuracy is the
share that the judge then reads as the value asked for; the balanced accuracy is the mean over all ordered pairs
(from, to), so that a slider that works one way only cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fader.attributes import Attributes
from pipeline import metrics
from pipeline.evaluation.labels import slider_values
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Measure, Preservation, Score, Slider
from pipeline.evaluation.specification import Specification

Key = tuple[str, str, str | None, str | None]  # images, attribute, start, to: what a `Score` is of


def scores(
    attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], specification: Specification
) -> list[Score]:
    """Table 1 from judged values: every direction, then what is a mean over directions."""
    answers = list(_answers(attributes, labels, rows))
    keys, bits, mask = [key for key, *_ in answers], *(torch.stack(part, 1) for part in list(zip(*answers))[1:])
    value, counts = metrics.means(bits, mask), mask.sum(0).tolist()
    resampled = metrics.bootstrap_means(bits, mask, seed=specification.seed, resamples=specification.resamples)

    def mean_of(members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The mean over the members that have records, and the same of each resample."""
        some = [m for m in members if counts[m]]
        if not some:
            return torch.tensor(math.nan), torch.full((len(resampled),), math.nan, dtype=torch.float64)
        return value[some].mean(), resampled[:, some].nanmean(1)

    def score(key: Key, records: int, mean: Tensor, samples: Tensor) -> Score:
        return Score(*key, records, float(mean), *metrics.interval(samples))

    result = []
    for images in IMAGES:
        balanced = []
        for j, attribute in enumerate(attributes):
            own = [i for i, key in enumerate(keys) if key[:2] == (images, attribute.name)]
            if not own:
                continue
            result += [score(keys[i], counts[i], *mean_of([i])) for i in own]
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    ends = [i for i in own if keys[i][3] == to]
                    total = sum(counts[i] for i in ends)
                    result.append(score((images, attribute.name, None, to), total, *mean_of(ends)))
            mean, samples = mean_of(own)
            result.append(score((images, attribute.name, None, None), int((labels[:, j] >= 0).sum()), mean, samples))
            if not mean.isnan():
                balanced.append((mean, samples))
        if balanced:
            means, samples = (torch.stack(part) for part in zip(*balanced))
            result.append(score((images, "*", None, None), len(labels), means.mean(), samples.mean(0)))
    return result


def _answers(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """Yield what each single number rests on: its key, whom the judge read as asked [N], and who is counted [N]."""
    first_swap = 0
    for j, attribute in enumerate(attributes):
        name, label = attribute.value_name, attribute.hard(labels[:, j])
        for images in IMAGES:
            if images in rows and images != "swap":
                for value in attribute.values:
                    yield (images, attribute.name, None, name(value)), rows[images][:, j] == value, label == value
        if "swap" in rows:
            for start in attribute.values:
                for step in range(1, attribute.k):
                    value = (start + step) % attribute.k
                    right = rows["swap"][:, first_swap + step - 1] == value
                    yield ("swap", attribute.name, name(start), name(value)), right, label == start
            first_swap += attribute.k - 1


def missing_values(attributes: Attributes, labels: Tensor) -> list[str]:
    """Say of which values there is no record."""
    return [
        f"{attribute.name}: no record is {attribute.value_name(value)}, so its means leave directions out"
        for j, attribute in enumerate(attributes)
        for value in attribute.values
        if not (attribute.hard(labels[:, j]) == value).any()
    ]


def aucs(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """The judge's area under the ROC curve on real images, for what has two values."""
    return {
        attribute.name: metrics.auc(rows["real_present"][:, j], attribute.hard(labels[:, j]))
        for j, attribute in enumerate(attributes)
        if attribute.kind != "k-way"
    }


def plain_accuracies(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """The share of real images whose known label the judge gives: common values count for more than rare ones."""
    result = {}
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        right = rows["real"][:, j][label >= 0] == label[label >= 0]
        result[attribute.name] = float(right.double().mean()) if len(right) else math.nan
    return result


def calibration(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], uniform: bool) -> dict[str, float]:
    """The judge's calibration error on real images. uniform: its prior is, so values of an attribute weigh alike."""
    result = {}
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        counts = torch.stack([(label == value).sum() for value in attribute.values]).double()
        share = 1 / counts.clamp(min=1) if uniform else torch.ones_like(counts)
        weights = torch.where(label >= 0, share[label.clamp(min=0)], 0.0)
        result[attribute.name] = metrics.calibration_error(rows["real_confidence"][:, j], rows["real"][:, j] == label, weights)
    return result


def fidelity(rows: dict[str, Tensor], specification: Specification) -> dict[str, Measure]:
    columns = {"mse": rows["mse"], "psnr": metrics.psnr(rows["mse"])}
    columns |= {name: rows[name] for name in ("ssim", "ms_ssim") if name in rows}
    values = torch.stack(list(columns.values()), 1)
    everyone = torch.ones_like(values, dtype=torch.bool)
    mean = metrics.means(values, everyone)
    resampled = metrics.bootstrap_means(values, everyone, seed=specification.seed, resamples=specification.resamples)
    return {name: Measure(float(mean[i]), *metrics.interval(resampled[:, i])) for i, name in enumerate(columns)}


def preservation(attributes: Attributes, judged: Attributes, rows: dict[str, Tensor]) -> list[Preservation]:
    result = []
    for j, attribute in enumerate(attributes):
        others = [a for a, name in enumerate(judged.names) if name != attribute.name]
        if not others:
            continue
        kept, shift = (rows["preserved"][j][others] / rows["preserved_counts"][j]).unbind(1)
        most = int(shift.argmax())
        names = attribute.name, judged.names[others[most]]
        result.append(Preservation(names[0], float(kept.mean()), float(shift.mean()), names[1], float(shift[most])))
    return result


def sliders(attributes: Attributes, rows: dict[str, Tensor]) -> list[Slider]:
    result = []
    for i, (_, attribute, value, _) in enumerate(slider_values(attributes)):
        response = rows["response"][:, i]
        mean = response.mean(0)
        result.append(
            Slider(
                attribute.name,
                attribute.value_name(value),
                SLIDER_POSITIONS,
                tuple(mean.tolist()),
                metrics.monotonic_share(response),
                *metrics.effective_range(mean, SLIDER_POSITIONS),
                records=len(response),
            )
        )
    return result
