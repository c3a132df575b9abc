"""One model over one split: what fits is checked, records are dealt to ranks, and the tables are made of what they kept.

One pass encodes each record once and decodes it many times; what it measures of a record is kept by row, so that every
number in a table is a function of the same per-record results. The tables do not depend on the number of ranks.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fader.methods.judge import refuse_judges_networks
from pipeline.data.datasets.twins import Twins
from pipeline.data.shards import ShardSet, Split
from pipeline.evaluation import tables as made
from pipeline.evaluation.cost import cost_of
from pipeline.evaluation.distribution import class_definitions, conditional, distances, inception_features, judge_features
from pipeline.evaluation.measure import OneProcess, Pass, Processes, Records, evaluating, makes_pictures, pillow_loader
from pipeline.evaluation.probe import leaks
from pipeline.evaluation.report import Leak, Report
from pipeline.evaluation.specification import Specification
from pipeline.evaluation.twins import TwinErrors, truths
from pipeline.images import Preprocessing
from pipeline.loading.loader import Loader
from pipeline.models import PANEL_SIZE, Model, check_independent, check_judge, editor
from pipeline.models import judge as judge_of

FID_RECORDS = 2048  # features of the Inception network: with fewer records its covariance is singular


def evaluate(
    model: Model, judges: Sequence[Model], shards: ShardSet, specification: Specification,
    ranks: Processes = OneProcess(), *, open_loader: Callable[[Split], Loader] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure a model. Every rank calls it and gets the same report (the cost apart: rank 0 measures it).

    model: edits or samples; or judges only, for a table of a judge's own accuracy. Its networks and the judges' stand on
    the specification's device; they are not moved, because that would break what wraps them in training. judges: see
    `check_judge`; a table without judged pictures needs none. shards: of the split, and of the training split from which
    the leak table's probe learns. open_loader, progress: see `Records`; the default loader is the reference decoder.
    Raises ValueError: a judge does not fit the model, or started as it did; what a table needs is missing.
    """
    split = shards.split(specification.split)
    judges, tables = fitting(model, judges, specification.tables)
    definitions = class_definitions(model.attributes, specification.classes) if "distribution" in tables else ()
    report = _opened(model, judges, split, specification, shards.digest)
    device, attributes = torch.device(specification.device), model.attributes
    labels = torch.from_numpy(split.columns(attributes)[: report.records].copy()).float()
    attributes.check_labels(labels)
    train_split = shards.split("train") if "leak" in tables else None
    if train_split is not None and not len(train_split):
        raise ValueError("the leak table trains a probe, and the training split is empty")
    records = Records(specification.batch_size, ranks, open_loader or pillow_loader(model, specification), progress)
    networks = [network for one in (model, *judges) for network in one.method.networks.values()]
    with evaluating(networks):
        pass_ = Pass(model, judges, device, tables, report.records)
        if "distribution" in tables:
            inception = specification.inception
            pass_.describe_with(inception_features(inception, device) if inception else judge_features(judges[0]), definitions)
        _compare_with_twins(pass_, shards, split, model.preprocessing)
        if set(tables) != {"cost"}:
            records.read(split, report.records, pass_.measure)
        rows, measured = pass_.rows.gathered(ranks.reduce_sum)
        if set(tables) != {"cost"} and not bool(measured.all()):
            labels = labels[measured]
            report.warnings.append(f"{int((~measured).sum()):,} records do not decode and are left out")
        if train_split is not None:
            latents = rows.pop("latent")
            report.leak = leaks(pass_, records, train_split, latents, labels, specification, report.warnings)
        if "cost" in tables and ranks.rank == 0:
            report.cost = cost_of(model, device, specification.batch_size)
    _fill(report, judges, labels, pass_, rows, specification)
    return report


def fitting(model: Model, judges: Sequence[Model], tables: Sequence[str]) -> tuple[Sequence[Model], tuple[str, ...]]:
    """Return the judges and the tables that a model gets: a judge alone is its own, for one table. Raises ValueError:
    model and judge do not fit together, or something is missing."""
    if not makes_pictures(model.method):
        if judge_of(model.method) is None:
            raise ValueError(f"{model.source}: {model.method.name} does not encode and decode, so nothing can be swapped")
        return (model,), ("swap",)
    refuse_judges_networks(model.method)
    seed = (model.card.get("config") or {}).get("seed")
    for judge in judges:
        check_judge(judge, model.attributes, model.preprocessing, model.source)
        check_independent(judge, seed, model.source, model.method)
    if "swap" in tables and not judges:
        raise ValueError(f"{model.source}: no judge to say whether attributes changed; name one (--judge), or train one first")
    if "distribution" in tables and not judges:
        raise ValueError("the distribution table scores classes by a judge; name one (--judge)")
    if editor(model.method) is None:
        asked, tables = tables, [table for table in tables if table not in ("leak", "error")]
        if not tables:
            raise ValueError(f"{model.source}: {model.method.name} has no latent and reconstructs nothing: no {asked[0]} table")
    return judges, tuple(tables)


def _compare_with_twins(pass_: Pass, shards: ShardSet, split: Split, preprocessing: Preprocessing) -> None:
    """Have a pass compare swaps with the split's twins, where they are kept and the tables show it."""
    if "fidelity" in pass_.tables and pass_.editor and (twins := Twins(shards.path, split.name)):
        pass_.compare_with(TwinErrors(twins, split.keys, pass_.attributes, preprocessing))


def quantities(model: Model, judges: Sequence[Model], shards: ShardSet, specification: Specification) -> list[str]:
    """Name every number that a report with these tables may hold: those of a report on records that nobody measured."""
    judges, tables = fitting(model, judges, specification.tables)
    attributes = model.attributes
    records = max((attribute.k for attribute in attributes), default=1)
    labels = torch.arange(records)[:, None] % torch.tensor([attribute.k for attribute in attributes])  # each value once
    device = next((p.device for network in model.method.networks.values() for p in network.parameters()), "cpu")
    pass_ = Pass(model, judges, torch.device(device), tables, records)
    _compare_with_twins(pass_, shards, shards.split(specification.split), model.preprocessing)
    pass_.rows.results["measured"] += 1
    rows, _ = pass_.rows.gathered(lambda tensor: tensor)
    report = Report(model.source, model.method.name, None, "", "", records, records, 0, None, 0)
    _fill(report, judges, labels.float(), pass_, rows, Specification(resamples=0))
    if "leak" in tables:
        report.leak = [Leak(name, math.nan, math.nan, math.nan, math.nan, "", 0, 0) for name in attributes.names]
    return list(report.quantities())


def _opened(model: Model, judges: Sequence[Model], split: Split, specification: Specification, data_digest: str) -> Report:
    """A report without numbers: what they will rest on, and the warnings that this alone calls for."""
    if not len(split):
        raise ValueError(f"the {split.name} split is empty; there is nothing to evaluate")
    records = specification.records(len(split))
    report = Report(
        model=model.source, method=model.method.name, judge=", ".join(judge.source for judge in judges) or None,
        split=split.name, split_digest=split.digest, records=records, split_records=len(split),
        image_size=model.preprocessing.image_size, images_seen=model.card.get("images_seen"), seed=specification.seed,
        judge_digests=[judge.digest() for judge in judges],
    )
    if split.name == "train":
        report.warnings.append("evaluated on TRAINING images: the numbers say nothing about pictures it has not seen")
    if records < len(split):
        report.warnings.append(f"{records:,} of the {len(split):,} records of the {split.name} split")
    if any("classifier" in names for names in model.method.optimizers()) and makes_pictures(model.method):
        report.warnings.append("a classifier was among its losses, and what pleases that one may please a judge of its build")
    for judge in judges:
        if (size := judge.preprocessing.image_size) < min(report.image_size, PANEL_SIZE):
            report.warnings.append(f"the judge {judge.source} sees pictures reduced to {size} pixels, and nothing finer")
    trained_on = model.card.get("data_digest")
    if trained_on and trained_on != data_digest:
        digests = f"digest {trained_on[:12]}, here {data_digest[:12]}"
        report.warnings.append(f"it was trained on another data set ({digests})")
    if specification.inception and "distribution" in specification.tables and records < FID_RECORDS:
        report.warnings.append(f"FID over {records:,} records: below {FID_RECORDS:,} it is strongly biased")
    return report


def _fill(
    report: Report, judges: Sequence[Model], labels: Tensor, pass_: Pass, rows: dict[str, Tensor], specification: Specification
) -> None:
    """Make tables 1, 2 and 4 of all ranks' rows."""
    attributes = pass_.attributes
    if "swap" in pass_.tables:
        report.readers = [reader.name for reader in pass_.readers]
        readings = [made.read(attributes, labels, rows, r, specification) for r in range(len(report.readers))]
        report.scores = made.scores(readings, report.readers)
        report.readings = made.beside(readings, report.readers)
        if "swap/0" in rows and specification.resamples:
            report.builds = made.builds(judges)
            report.flattered = made.flatteries(attributes, readings, report.readers)
            report.look_at_grid = report.better_than_real()
        report.warnings += [*report.verdicts(), *made.missing_values(attributes, labels)]
        uniform = getattr(judges[0].method.settings, "prior", "data") == "uniform"
        report.plain, report.auc, report.calibration = made.about_judge(attributes, labels, rows, uniform)
    if "mse" in rows:
        report.fidelity = made.fidelity(rows, specification)
    if "twins" in rows:
        report.truth = truths(attributes, labels, rows["twins"], specification)
    if "response" in rows:
        report.preservation = made.preservation(attributes, pass_.readers[0].judged, pass_.readers[0].answers, rows)
        report.sliders = made.sliders(attributes, rows)
    if pass_.features is not None:
        report.features = pass_.features.name
        report.distances = distances(attributes, labels, rows, specification.seed)
        report.conditional = conditional(attributes, labels, rows, pass_.classes)
