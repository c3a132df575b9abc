"""One model over one split: what fits is checked, records are dealt to ranks, and the tables are made of what they kept.

One pass encodes each record once and decodes it many times; what it measures of a record is kept by row, so that every
number in a table is a function of the same per-record results. On several ranks whole micro-batches are dealt out,
each rank fills in its rows and the rows are summed: the tables do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Batch, Decodes, Encodes, Judges, ReduceSum, identity
from pipeline.evaluation import tables as made
from pipeline.evaluation.cost import cost_of
from pipeline.evaluation.distribution import (
    class_definitions,
    conditional,
    distances,
    inception_features,
    judge_features,
)
from pipeline.evaluation.judges import check_judge
from pipeline.evaluation.measure import Pass, evaluating
from pipeline.evaluation.probe import leaks
from pipeline.evaluation.report import Report
from pipeline.loading.loader import Loader
from pipeline.loading.plan import sequential

if TYPE_CHECKING:
    from pipeline.data.shards import Split
    from pipeline.images import Preprocessing
    from pipeline.models import Model

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
    judge, tables = _fitting(model, judge, tables, probe_split)
    definitions = class_definitions(model.attributes, classes) if "distribution" in tables else ()
    report = _opened(model, judge, split, limit, seed)
    device, attributes, records = torch.device(device), model.attributes, report.records
    labels = torch.from_numpy(split.columns(attributes)[:records].copy()).float()
    attributes.check_labels(labels)
    open_loader = open_loader or _pillow
    deal = Dealer(
        attributes, model.preprocessing, batch_size, rank, world_size, seed, device, threads, open_loader, progress
    )
    networks = [*model.method.networks.values(), *(judge.method.networks.values() if judge else ())]
    for network in networks:
        network.to(device)
    with evaluating(networks):
        pass_ = Pass(model, judge, device, tables, records)
        if "distribution" in tables:
            assert judge is not None
            pass_.describe_with(inception_features(inception, device) if inception else judge_features(judge), definitions)
        if set(tables) != {"cost"}:
            deal(split, records, pass_.measure)
        if "leak" in tables:
            assert probe_split is not None
            report.leak = leaks(pass_, probe_split, deal, labels, reduce_sum, rank, seed, report.warnings)
        if "cost" in tables and rank == 0:
            report.cost = cost_of(model, device, batch_size)
    _fill(report, tables, attributes, judge, labels, pass_, pass_.gathered(reduce_sum))
    if inception and "distribution" in tables and records < FID_RECORDS:
        report.warnings.append(f"FID over {records:,} records: below {FID_RECORDS:,} it is strongly biased")
    return report


def _fitting(
    model: Model, judge: Model | None, tables: Sequence[str], probe_split: Split | None
) -> tuple[Model | None, Sequence[str]]:
    """The judge and the tables that a model gets: a judge alone is its own, for one table.

    Raises:
        ValueError: they do not fit together, or something is missing.
    """
    wrong = [table for table in tables if table not in TABLES]
    if wrong:
        raise ValueError(f"unknown table {wrong[0]!r}; there are: {', '.join(TABLES)}")
    if not isinstance(model.method, Encodes) and isinstance(model.method, Judges):
        return model, ("swap",)
    if not (isinstance(model.method, Encodes) and isinstance(model.method, Decodes)):
        raise ValueError(f"{model.source}: {model.method.name} does not encode and decode, so nothing can be swapped")
    if judge is not None:
        check_judge(judge, model.attributes, model.preprocessing, model.source)
    elif "swap" in tables:
        raise ValueError(
            f"{model.source}: no judge to say whether attributes changed; name one (--judge), or train one first"
        )
    elif "distribution" in tables:
        raise ValueError("the distribution table scores classes by a judge; name one (--judge)")
    if "leak" in tables and probe_split is None:
        raise ValueError("the leak table trains a probe: it needs the training split")
    return judge, tables


def _opened(model: Model, judge: Model | None, split: Split, limit: int | None, seed: int) -> Report:
    """A report without numbers: what they will rest on, and the warnings that this alone calls for."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    records = min(limit or len(split), len(split))
    if not records:
        raise ValueError(f"the {split.name} split is empty; there is nothing to evaluate")
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
    return report


def _fill(
    report: Report,
    tables: Sequence[str],
    attributes: Attributes,
    judge: Model | None,
    labels: Tensor,
    pass_: Pass,
    rows: dict[str, Tensor],
) -> None:
    """Tables 1, 2 and 4 from all ranks' rows."""
    if "swap" in tables:
        assert judge is not None
        report.scores = made.scores(attributes, labels, rows, report.seed, report.warnings)
        report.plain = made.plain_accuracies(attributes, labels, rows)
        report.auc = made.aucs(attributes, labels, rows)
        uniform = getattr(judge.method.settings, "prior", "data") == "uniform"
        report.calibration = made.calibration(attributes, labels, rows, uniform)
    if "fidelity" in tables:
        report.fidelity = made.fidelity(rows, report.seed)
        if judge is not None:
            report.preservation = made.preservation(attributes, judge.attributes, rows)
            report.sliders = made.sliders(attributes, rows)
    if "distribution" in tables:
        assert pass_.features is not None
        report.features = pass_.features.name
        report.distances = distances(attributes, labels, rows, report.seed)
        report.conditional = conditional(attributes, labels, rows, pass_.classes)


@dataclass(frozen=True)
class Dealer:
    """Sends the first records of a split through a function, batch by batch, this rank's share of them.

    Whole micro-batches are dealt, so a record's result cannot depend on how many ranks there are.
    """

    attributes: Attributes
    preprocessing: Preprocessing
    batch_size: int
    rank: int
    world_size: int
    seed: int
    device: torch.device
    threads: int
    open_loader: Callable[..., Loader]
    progress: Callable[[int, int], None] | None

    def __call__(self, split: Split, records: int, each: Callable[[Batch], None]) -> None:
        requests = list(sequential(records, self.batch_size))[self.rank :: self.world_size]
        if not requests:
            return
        loader = self.open_loader(
            split, self.attributes, self.preprocessing, seed=self.seed, device=self.device, threads=self.threads
        )
        done, total = 0, sum(len(request.rows) for request in requests)
        for batch in loader.batches(iter(requests)):
            with torch.inference_mode():
                each(batch)
            done += len(batch.index)
            if self.progress:
                self.progress(done, total)


def _pillow(split: Split, attributes: Attributes, preprocessing: Preprocessing, **keywords: Any) -> Loader:
    from pipeline.loading.pillow import PillowLoader

    return PillowLoader(split, attributes, preprocessing, **keywords)
