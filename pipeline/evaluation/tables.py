"""Does it slide? Tables over a split: swaps by attribute and direction, fidelity, leak, cost.

One pass encodes each record once and decodes it many times; what it measures of a record is kept by row, so that every
number in a table is a function of the same per-record results. On several ranks whole micro-batches are dealt out,
each rank fills in its rows and the rows are summed: the tables do not depend on the number of ranks.

A swap of an attribute to a value is counted on the records whose known label is another value. Its accuracy is the
share that the judge then reads as the value asked for; the balanced accuracy is the mean over all ordered pairs
(from, to), so that a slider that works one way only cannot hide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fader.attributes import Attribute, Attributes
from fader.method import Batch, Decodes, Encodes, Judges, ReduceSum, identity
from pipeline import metrics
from pipeline.batches import Loader, sequential
from pipeline.evaluation.distribution import (
    class_definitions,
    conditional,
    distances,
    inception_features,
    judge_features,
)
from pipeline.evaluation.measure import Pass, evaluating, hard, slider_values
from pipeline.evaluation.probe import leaks
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Measure, Preservation, Report, Score, Slider

if TYPE_CHECKING:
    from pipeline.images import Preprocessing
    from pipeline.registry import Model
    from pipeline.shards import Split

TABLES = ("swap", "fidelity", "leak", "distribution", "cost")
USUAL_TABLES = ("swap", "fidelity", "leak", "cost")
FID_RECORDS = 2048  # features of the Inception network: with fewer records its covariance is singular


def evaluate(
    model: Model,
    judge: Model | None,
    split: Split,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    tables: Sequence[str] = USUAL_TABLES,
    reduce_sum: ReduceSum = identity,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    probe_split: Split | None = None,
    inception: Path | None = None,
    classes: Sequence[Sequence[str]] | None = None,
    open_loader: Callable[..., Loader] | None = None,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure a model on a split. Every rank calls it and gets the same report (the cost apart: rank 0 measures it).

    Args:
        model: encodes and decodes; or judges only, for a table of a judge's own accuracy. Its networks and the judge's
            are moved to `device`.
        judge: who says what an image shows. It must know every attribute of the model with the same values, at the same
            size and preprocessing; it may know more. None when only tables that need no judge are asked for, and for a
            model that is a judge itself.
        limit: use the first so many records of the split (their order on disk is shuffled); None takes all.
        tables: any of "swap", "fidelity", "leak", "distribution", "cost".
        reduce_sum: sum over all ranks of a tensor on `device`; the identity on one.
        seed: of the bootstrap and of the probe.
        probe_split: the training split, from which the leak table's probe learns; needed for "leak".
        inception: TorchScript file of the network whose features the distribution table compares; without it, what the
            judge's last layer reads.
        classes: definitions of a class for that table, each the names of attributes whose joint values are the classes;
            by default each attribute alone.
        open_loader: makes a loader from (split, attributes, preprocessing, seed=, device=, threads=); by default the
            reference decoder.
        progress: called with (records done by this rank, records of this rank).

    Raises:
        ValueError: the judge does not fit the model; an unknown table; what a table needs is missing.
    """
    wrong = [table for table in tables if table not in TABLES]
    if wrong:
        raise ValueError(f"unknown table {wrong[0]!r}; there are: {', '.join(TABLES)}")
    if not isinstance(model.method, Encodes) and isinstance(model.method, Judges):
        judge, tables = model, ("swap",)
    elif not (isinstance(model.method, Encodes) and isinstance(model.method, Decodes)):
        raise ValueError(f"{model.source}: {model.method.name} does not encode and decode, so nothing can be swapped")
    if judge is None:
        if "swap" in tables:
            raise ValueError(
                f"{model.source}: no judge to say whether attributes changed; name one (--judge), or train one first"
            )
    elif judge is not model:
        check_judge(judge, model.attributes, model.preprocessing, model.source)
    if "distribution" in tables:
        if judge is None:
            raise ValueError("the distribution table scores classes by a judge; name one (--judge)")
        classes = class_definitions(model.attributes, classes)
    if "leak" in tables and probe_split is None:
        raise ValueError("the leak table trains a probe: it needs the training split")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    records = min(limit or len(split), len(split))
    if not records:
        raise ValueError(f"the {split.name} split is empty; there is nothing to evaluate")
    device = torch.device(device)
    report = Report(
        model=model.source,
        method=model.method.name,
        judge=judge.source if judge else None,
        split=split.name,
        split_digest=split.digest,
        records=records,
        split_records=len(split),
        image_size=model.preprocessing.image_size,
        images_seen=model.card.get("images_seen"),
        seed=seed,
    )
    if split.name == "train":
        report.warnings.append("evaluated on TRAINING images: the numbers say nothing about pictures it has not seen")
    if records < len(split):
        report.warnings.append(f"{records:,} of the {len(split):,} records of the {split.name} split")
    attributes = model.attributes
    labels = torch.from_numpy(split.columns(attributes)[:records].copy()).float()
    attributes.check_labels(labels)

    def run(source: Split, num_records: int, each: Callable[[Batch], None]) -> None:
        """Whole micro-batches are dealt to ranks, so a record's result cannot depend on how many ranks there are."""
        requests = list(sequential(num_records, batch_size))[rank::world_size]
        if not requests:
            return
        loader = (open_loader or _pillow)(
            source, attributes, model.preprocessing, seed=seed, device=device, threads=threads
        )
        done, total = 0, sum(len(request.rows) for request in requests)
        for batch in loader.batches(iter(requests)):
            with torch.inference_mode():
                each(batch)
            done += len(batch.index)
            if progress:
                progress(done, total)

    networks = [*model.method.networks.values(), *(judge.method.networks.values() if judge else ())]
    for network in networks:
        network.to(device)
    with evaluating(networks):
        pass_ = Pass(model, judge, device, tables, records)
        if "distribution" in tables:
            assert judge is not None and classes is not None
            pass_.describe_with(inception_features(inception, device) if inception else judge_features(judge), classes)
        if set(tables) != {"cost"}:
            run(split, records, pass_.measure)
        if "leak" in tables:
            assert probe_split is not None
            report.leak = leaks(pass_, probe_split, run, labels, reduce_sum, rank, seed, report.warnings)
        if "cost" in tables and rank == 0:
            report.cost = _cost(model, device, batch_size)
    rows = pass_.gathered(reduce_sum)
    if "swap" in tables:
        report.scores = _scores(attributes, labels, rows, seed, report.warnings)
        report.auc = _aucs(attributes, labels, rows)
    if "fidelity" in tables:
        report.fidelity = _fidelity(rows, seed)
        if judge is not None:
            report.preservation = _preservation(attributes, judge.attributes, rows)
            report.sliders = _sliders(attributes, rows)
    if "distribution" in tables:
        assert pass_.features is not None
        report.features = pass_.features.name
        report.distances = distances(attributes, labels, rows, seed)
        report.conditional = conditional(attributes, labels, rows, pass_.classes)
        if inception and records < FID_RECORDS:
            report.warnings.append(f"FID over {records:,} records: below {FID_RECORDS:,} it is strongly biased")
    return report


def check_judge(judge: Model, attributes: Attributes, preprocessing: Preprocessing, source: str) -> None:
    """Refuse a judge that cannot speak about the pictures of a model.

    Args:
        attributes, preprocessing: the model's. source: what errors call it.

    Raises:
        ValueError: it does not judge, lacks an attribute or has it with other values, or sees images of another size
            or preprocessing.
    """
    if not isinstance(judge.method, Judges):
        raise ValueError(f"{judge.source}: {judge.method.name} is not a judge; name a run or model of method 'judge'")
    known = {attribute.name: attribute for attribute in judge.attributes}
    for attribute in attributes:
        if attribute.name not in known:
            raise ValueError(
                f"the judge {judge.source} does not know {attribute.name}, which {source} changes "
                f"(it knows {', '.join(known)}); train a judge on the same attributes"
            )
        if known[attribute.name] != attribute:
            raise ValueError(
                f"the judge {judge.source} knows {attribute.name} as {_kind(known[attribute.name])}, "
                f"{source} as {_kind(attribute)}; train a judge on the same attributes"
            )
    if judge.preprocessing != preprocessing:
        raise ValueError(
            f"the judge {judge.source} sees images as {_describe(judge.preprocessing)}, {source} makes them as "
            f"{_describe(preprocessing)}; train a judge with the same preprocessing"
        )


def _kind(attribute: Attribute) -> str:
    return attribute.kind + (f" ({', '.join(attribute.categories)})" if attribute.categories else "")


def _describe(preprocessing: Preprocessing) -> str:
    return ", ".join(f"{name} {value}" for name, value in preprocessing.to_dict().items())


def _pillow(split: Split, attributes: Attributes, preprocessing: Preprocessing, **keywords: Any) -> Loader:
    from pipeline.tar_loader import PillowLoader

    return PillowLoader(split, attributes, preprocessing, **keywords)


# --- tables from per-record results ----------------------------------------------------------------------------------


def _scores(
    attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], seed: int, warnings: list[str]
) -> list[Score]:
    """Table 1 from judged values: every direction, then what is a mean over directions."""
    keys: list[tuple[str, str, str | None, str | None]] = []
    right, counted = [], []
    first_swap = 0
    for j, attribute in enumerate(attributes):
        label = hard(attribute, labels[:, j])
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

    scores = []
    for images in IMAGES:
        balanced = []
        for attribute in attributes:
            own = [i for i, key in enumerate(keys) if key[:2] == (images, attribute.name)]
            if not own:
                continue
            scores += [score(keys[i], num_counted[i], value[i], resampled[:, i]) for i in own]
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    ends = [i for i in own if keys[i][3] == to]
                    total = sum(num_counted[i] for i in ends)
                    scores.append(score((images, attribute.name, None, to), total, *mean_of(ends)))
            mean, samples = mean_of(own)
            balanced.append((mean, samples))
            total = int((labels[:, attributes.index(attribute.name)] >= 0).sum())
            scores.append(score((images, attribute.name, None, None), total, mean, samples))
        some = [(mean, samples) for mean, samples in balanced if not mean.isnan()]
        if some:
            mean = torch.stack([mean for mean, _ in some]).mean()
            samples = torch.stack([samples for _, samples in some]).mean(0)
            scores.append(score((images, "*", None, None), len(labels), mean, samples))
    for attribute in attributes:
        label = hard(attribute, labels[:, attributes.index(attribute.name)])
        for value_ in attribute.values:
            if not (label == value_).any():
                warnings.append(
                    f"{attribute.name}: no record is {attribute.value_name(value_)}, so its means leave directions out"
                )
    return scores


def _aucs(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """The judge's area under the ROC curve on real images, for what has two values."""
    return {
        attribute.name: metrics.auc(rows["real_present"][:, j], hard(attribute, labels[:, j]))
        for j, attribute in enumerate(attributes)
        if attribute.kind != "k-way"
    }


def _fidelity(rows: dict[str, Tensor], seed: int) -> dict[str, Measure]:
    columns = {"mse": rows["mse"], "psnr": metrics.psnr(rows["mse"])}
    columns |= {name: rows[name] for name in ("ssim", "ms_ssim") if name in rows}
    values = torch.stack(list(columns.values()), 1)
    everyone = torch.ones_like(values, dtype=torch.bool)
    mean = metrics.means(values, everyone)
    resampled = metrics.bootstrap_means(values, everyone, seed=seed)
    return {name: Measure(float(mean[i]), *metrics.interval(resampled[:, i])) for i, name in enumerate(columns)}


def _preservation(attributes: Attributes, judged: Attributes, rows: dict[str, Tensor]) -> list[Preservation]:
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


def _sliders(attributes: Attributes, rows: dict[str, Tensor]) -> list[Slider]:
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


# --- cost ------------------------------------------------------------------------------------------------------------


def _cost(model: Model, device: torch.device, batch_size: int, seconds: float = 0.5) -> dict[str, Any]:
    """Table 5: parameters of each network, floating-point operations of one image, images a second."""
    method: Any = model.method
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in method.networks.items()}
    cost: dict[str, Any] = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }
    size = model.preprocessing.image_size
    shape = (model.preprocessing.channels, size, size)
    with torch.inference_mode():
        labels = torch.zeros(batch_size, len(model.attributes), device=device)
        images = torch.zeros(batch_size, *shape, device=device)
        code = model.attributes.code(labels)
        latent = method.encode(images, labels)
        single = method.encode(images[:1], labels[:1])
        calls = {
            "encode": (partial(method.encode, images[:1], labels[:1]), partial(method.encode, images, labels)),
            "decode": (partial(method.decode, single, code[:1]), partial(method.decode, latent, code)),
        }
        for name, (one, all_) in calls.items():
            cost[f"{name}_flops"] = _flops(one)
            cost[f"{name}_images_per_second"] = batch_size / _duration(all_, device, seconds)
    return cost


def _flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products; a multiply and an add are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _duration(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds a call takes: the mean over as many as fit in `seconds`, after one to warm up."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    start, calls = clock(), 0
    while True:
        call()
        calls += 1
        if (now := clock()) - start >= seconds:
            return (now - start) / calls
