"""Tables 1 and 2 from per-record results, and table 5: every number is a function of what was kept of each record.

A swap of an attribute to a value is counted on the records whose known label is another value. Its accuracy is the
share that the judge then reads as the value asked for; the balanced accuracy is the mean over all ordered pairs
(from, to), so that a slider that works one way only cannot hide.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fader.attributes import Attributes
from pipeline import metrics
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Flattery, Measure, Preservation, Score, Slider, slider_values
from pipeline.evaluation.specification import Specification
from pipeline.models import Model

MARGIN = 0.03  # by which two readers may differ on swaps more than on real pictures
Key = tuple[str, str, str | None, str | None]  # images, attribute, start, to: what a `Score` is of


Number = tuple[int, Tensor, Tensor]  # records, mean, and the mean of each resample


def read(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], reader: int, asked: Specification) -> dict[Key, Number]:
    """Table 1 as one reader has it: every direction, then what is a mean over directions."""
    answers = list(_answers(attributes, labels, rows, reader))
    keys, bits, mask = [key for key, *_ in answers], *(torch.stack(part, 1) for part in list(zip(*answers))[1:])
    value, counts = metrics.means(bits, mask), mask.sum(0).tolist()
    resampled = metrics.bootstrap_means(bits, mask, seed=asked.seed, resamples=asked.resamples)

    def number(members: Sequence[int], records: int | None = None) -> Number:
        """The mean over the members that have records."""
        some = [m for m in members if counts[m]]
        total = sum(counts[m] for m in members) if records is None else records
        if not some:
            return total, torch.tensor(math.nan), torch.full((len(resampled),), math.nan, dtype=torch.float64)
        return total, value[some].mean(), resampled[:, some].nanmean(1)

    result: dict[Key, Number] = {}
    for images in IMAGES:
        balanced = []
        for j, attribute in enumerate(attributes):
            own = [i for i, key in enumerate(keys) if key[:2] == (images, attribute.name)]
            if not own:
                continue
            result |= {keys[i]: number([i]) for i in own}
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    result[images, attribute.name, None, to] = number([i for i in own if keys[i][3] == to])
            records = int((labels[:, j] >= 0).sum())
            result[images, attribute.name, None, None] = mean = number(own, records)
            if not mean[1].isnan():
                balanced.append(mean[1:])
        if balanced:
            means, samples = (torch.stack(part) for part in zip(*balanced))
            result[images, "*", None, None] = len(labels), means.mean(), samples.mean(0)
    return result


def scores(readings: Sequence[dict[Key, Number]], names: Sequence[str]) -> list[Score]:
    """Return for each number the lowest of the readers'."""
    lowest = []
    for key in readings[0]:
        reader = min(range(len(names)), key=lambda r: math.inf if readings[r][key][1].isnan() else float(readings[r][key][1]))
        lowest.append(_score(key, readings[reader][key], names[reader]))
    return lowest


def beside(readings: Sequence[dict[Key, Number]], names: Sequence[str]) -> list[Score]:
    return [
        _score(key, number, name) for reading, name in zip(readings, names) for key, number in reading.items() if key[2] is None
    ]


def _score(key: Key, number: Number, reader: str) -> Score:
    records, mean, samples = number
    return Score(*key, records, float(mean), *metrics.interval(samples), reader)


def builds(judges: Sequence[Model]) -> list[str]:
    """Return the classes of the judges' networks: what is drawn to please one network often pleases all of its class."""
    return sorted({type(judge.method.networks.get("classifier", judge.method)).__name__ for judge in judges})


def flatteries(attributes: Attributes, readings: Sequence[dict[Key, Number]], names: Sequence[str]) -> list[Flattery]:
    """Return the attributes whose swaps please one reader and not another: the two differ on swaps by more than on real
    pictures plus 3 points, and the interval of that excess, over the same resamples for all, excludes 0."""
    result = []
    for name in attributes.names:
        worst: Flattery | None = None
        for a, b in itertools.permutations(range(len(names)), 2):
            (swap, swaps), (real, reals) = (
                tuple(readings[a][images, name, None, None][i] - readings[b][images, name, None, None][i] for i in (1, 2))
                for images in ("swap", "real")
            )
            excess = float(swap - real.abs() - MARGIN)
            low, high = metrics.interval(swaps - reals.abs() - MARGIN)
            if excess > 0 and low > 0 and (worst is None or excess > worst.excess):
                worst = Flattery(name, names[a], names[b], excess, low, high)
        result += [worst] if worst else []
    return result


def _answers(
    attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], reader: int
) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """Yield what each single number rests on: its key, whom the reader read as asked [N], and who is counted [N]."""
    first_swap = 0
    for j, attribute in enumerate(attributes):
        name, label = attribute.value_name, attribute.hard(labels[:, j])
        for images in IMAGES:
            if f"{images}/{reader}" in rows and images != "swap":
                preds = rows[f"{images}/{reader}"][:, j]
                for value in attribute.values:
                    yield (images, attribute.name, None, name(value)), preds == value, label == value
        if f"swap/{reader}" in rows:
            for start in attribute.values:
                for step in range(1, attribute.k):
                    value = (start + step) % attribute.k
                    right = rows[f"swap/{reader}"][:, first_swap + step - 1] == value
                    yield ("swap", attribute.name, name(start), name(value)), right, label == start
            first_swap += attribute.k - 1


def missing_values(attributes: Attributes, labels: Tensor) -> list[str]:
    return [
        f"{attribute.name}: no record is {attribute.value_name(value)}, so its means leave directions out"
        for j, attribute in enumerate(attributes)
        for value in attribute.values
        if not (attribute.hard(labels[:, j]) == value).any()
    ]


def about_judge(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], uniform: bool) -> list[dict[str, float]]:
    """Return of the first reader on real images the share of right answers, in which common values count for more; the area under
    the ROC curve of what has two values; and the calibration error. uniform: its prior is, so an attribute's values weigh alike.
    """
    plain, auc, calibration = {}, {}, {}
    for j, attribute in enumerate(attributes):
        name, label = attribute.name, attribute.hard(labels[:, j])
        right, known = rows["real/0"][:, j] == label, label >= 0
        plain[name] = float(right[known].double().mean()) if known.any() else math.nan
        if attribute.kind != "k-way":
            auc[name] = metrics.auc(rows["real_present"][:, j], label)
        counts = torch.stack([(label == value).sum() for value in attribute.values]).double()
        share = 1 / counts.clamp(min=1) if uniform else torch.ones_like(counts)
        weights = torch.where(known, share[label.clamp(min=0)], 0.0)
        calibration[name] = metrics.calibration_error(rows["real_confidence"][:, j], right, weights)
    return [plain, auc, calibration]


def fidelity(rows: dict[str, Tensor], specification: Specification) -> dict[str, Measure]:
    columns = {"mse": rows["mse"], "psnr": metrics.psnr(rows["mse"])}
    columns |= {name: rows[name] for name in ("ssim", "ms_ssim") if name in rows}
    values = torch.stack(list(columns.values()), 1)
    everyone = torch.ones_like(values, dtype=torch.bool)
    mean = metrics.means(values, everyone)
    resampled = metrics.bootstrap_means(values, everyone, seed=specification.seed, resamples=specification.resamples)
    return {name: Measure(float(mean[i]), *metrics.interval(resampled[:, i])) for i, name in enumerate(columns)}


def preservation(
    attributes: Attributes, judged: Attributes, answers: Collection[str], rows: dict[str, Tensor]
) -> list[Preservation]:
    """Return what a swap of each attribute did to the others; only those that the judge answers for count."""
    result = []
    for j, attribute in enumerate(attributes):
        others = [a for a, name in enumerate(judged.names) if name in answers and name != attribute.name]
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
                attribute.name, attribute.value_name(value), SLIDER_POSITIONS, tuple(mean.tolist()),
                metrics.monotonic_share(response), *metrics.effective_range(mean, SLIDER_POSITIONS),
                records=len(response),
            )
        )
    return result
