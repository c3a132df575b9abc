"""Tables 1 and 2 from per-record results: every number is a function of what was kept of each record.

A swap of an attribute to a value is counted on the records whose known label is another value. Its accuracy is the
share that the judge then reads as the value asked for; the balanced accuracy is the mean over all ordered pairs
(from, to), so that a slider that works one way only cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fader.attributes import Attributes
from pipeline import metrics
from pipeline.evaluation.labels import slider_values
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Measure, Preservation, Score, Slider


def scores(
    attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], seed: int, warnings: list[str]
) -> list[Score]:
    """Table 1 from judged values: every direction, then what is a mean over directions."""
    keys: list[tuple[str, str, str | None, str | None]] = []
    right, counted = [], []
    first_swap = 0
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        for images in ("real", "reconstruction"):
            if images not in rows:
                continue
            for value in attribute.values:
                keys.append((images, attribute.name, None, attribute.value_name(value)))
                right.append(rows[images][:, j] == value)
                counted.append(label == value)
        if "swap" in rows:
            for start in attribute.values:
                for step in range(1, attribute.k):
                    value = (start + step) % attribute.k
                    keys.append(("swap", attribute.name, attribute.value_name(start), attribute.value_name(value)))
                    right.append(rows["swap"][:, first_swap + step - 1] == value)
                    counted.append(label == start)
            first_swap += attribute.k - 1
    bits, mask = torch.stack(right, 1).double(), torch.stack(counted, 1)
    value = metrics.means(bits, mask)
    resampled = metrics.bootstrap_means(bits, mask, seed=seed)
    num_counted = mask.sum(0).tolist()

    def mean_of(members: Sequence[int]) -> tuple[Tensor, Tensor]:
        some = [m for m in members if num_counted[m]]
        if not some:
            return torch.tensor(math.nan), torch.full((len(resampled),), math.nan, dtype=torch.float64)
        return value[some].mean(), resampled[:, some].nanmean(1)

    def score(key: tuple[str, str, str | None, str | None], records: int, mean: Tensor, samples: Tensor) -> Score:
        images, attribute, start, to = key
        return Score(images, attribute, start, to, records, float(mean), *metrics.interval(samples))

    found = []
    for images in IMAGES:
        balanced = []
        for attribute in attributes:
            own = [i for i, key in enumerate(keys) if key[:2] == (images, attribute.name)]
            if not own:
                continue
            found += [score(keys[i], num_counted[i], value[i], resampled[:, i]) for i in own]
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    ends = [i for i in own if keys[i][3] == to]
                    total = sum(num_counted[i] for i in ends)
                    found.append(score((images, attribute.name, None, to), total, *mean_of(ends)))
            mean, samples = mean_of(own)
            balanced.append((mean, samples))
            total = int((labels[:, attributes.index(attribute.name)] >= 0).sum())
            found.append(score((images, attribute.name, None, None), total, mean, samples))
        some = [(mean, samples) for mean, samples in balanced if not mean.isnan()]
        if some:
            mean = torch.stack([mean for mean, _ in some]).mean()
            samples = torch.stack([samples for _, samples in some]).mean(0)
            found.append(score((images, "*", None, None), len(labels), mean, samples))
    for attribute in attributes:
        label = attribute.hard(labels[:, attributes.index(attribute.name)])
        for value_ in attribute.values:
            if not (label == value_).any():
                warnings.append(
                    f"{attribute.name}: no record is {attribute.value_name(value_)}, so its means leave directions out"
                )
    return found


def aucs(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """The judge's area under the ROC curve on real images, for what has two values."""
    return {
        attribute.name: metrics.auc(rows["real_present"][:, j], attribute.hard(labels[:, j]))
        for j, attribute in enumerate(attributes)
        if attribute.kind != "k-way"
    }


def plain_accuracies(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """The share of real images whose known label the judge gives: common values count for more than rare ones."""
    found = {}
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        right = rows["real"][:, j][label >= 0] == label[label >= 0]
        found[attribute.name] = float(right.double().mean()) if len(right) else math.nan
    return found


def calibration(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], uniform: bool) -> dict[str, float]:
    """The judge's calibration error on real images. uniform: its prior is, so values of an attribute weigh alike."""
    found = {}
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        counts = torch.stack([(label == value).sum() for value in attribute.values]).double()
        share = 1 / counts.clamp(min=1) if uniform else torch.ones_like(counts)
        weights = torch.where(label >= 0, share[label.clamp(min=0)], 0.0)
        found[attribute.name] = metrics.calibration_error(rows["real_confidence"][:, j], rows["real"][:, j] == label, weights)
    return found


def fidelity(rows: dict[str, Tensor], seed: int) -> dict[str, Measure]:
    columns = {"mse": rows["mse"], "psnr": metrics.psnr(rows["mse"])}
    columns |= {name: rows[name] for name in ("ssim", "ms_ssim") if name in rows}
    values = torch.stack(list(columns.values()), 1)
    everyone = torch.ones_like(values, dtype=torch.bool)
    mean = metrics.means(values, everyone)
    resampled = metrics.bootstrap_means(values, everyone, seed=seed)
    return {name: Measure(float(mean[i]), *metrics.interval(resampled[:, i])) for i, name in enumerate(columns)}


def preservation(attributes: Attributes, judged: Attributes, rows: dict[str, Tensor]) -> list[Preservation]:
    found = []
    for j, attribute in enumerate(attributes):
        others = [a for a, name in enumerate(judged.names) if name != attribute.name]
        if not others or not rows["preserved_counts"][j]:
            continue
        kept, shift = (rows["preserved"][j][others] / rows["preserved_counts"][j]).unbind(1)
        most = int(shift.argmax())
        found.append(
            Preservation(
                attribute.name, float(kept.mean()), float(shift.mean()), judged.names[others[most]], float(shift[most])
            )
        )
    return found


def sliders(attributes: Attributes, rows: dict[str, Tensor]) -> list[Slider]:
    found = []
    for i, (_, attribute, value, _) in enumerate(slider_values(attributes)):
        response = rows["response"][:, i]
        mean = response.mean(0)
        found.append(
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
    return found
