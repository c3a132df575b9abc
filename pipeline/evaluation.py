"""Does it slide? Tables over a split: swaps by attribute and direction, fidelity, leak, cost.

One pass encodes each record once and decodes it many times; what it measures of a record is kept by row, so that every
number in a table is a function of the same per-record results. On several ranks whole micro-batches are dealt out,
each rank fills in its rows and the rows are summed: the tables do not depend on the number of ranks.

A swap of an attribute to a value is counted on the records whose known label is another value. Its accuracy is the
share that the judge then reads as the value asked for; the balanced accuracy is the mean over all ordered pairs
(from, to), so that a slider that works one way only cannot hide.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fader.attributes import Attribute, Attributes
from fader.method import Batch, Decodes, Encodes, Judges, Method, ReduceSum, Samples, identity
from pipeline import metrics
from pipeline.batches import Loader, sequential

if TYPE_CHECKING:
    from fader.draws import Draws
    from pipeline.images import Preprocessing
    from pipeline.registry import Model
    from pipeline.shards import Split

logger = logging.getLogger(__name__)

TABLES = ("swap", "fidelity", "leak", "distribution", "cost")
USUAL_TABLES = ("swap", "fidelity", "leak", "cost")
IMAGES = ("real", "reconstruction", "swap")
SLIDER_POSITIONS = tuple(-2 + i / 2 for i in range(9))
SLIDER_RECORDS = 512
PROBE_RECORDS = 4000
FID_RECORDS = 2048  # features of the Inception network: with fewer records its covariance is singular

# Shares of human raters, in percent: (naturalness, accuracy). A judge's accuracies are not of the same kind.
PUBLISHED_SOURCE = "Lample et al. 2017, arXiv:1706.00409, table 1: human raters, 256 pixels; not a judge's numbers"
PUBLISHED = {
    "Real Image": {"Mouth_Slightly_Open": (92.6, 89.0), "Smiling": (87.0, 88.3), "Eyeglasses": (88.6, 97.6)},
    "IcGAN AE": {"Mouth_Slightly_Open": (22.7, 88.1), "Smiling": (21.7, 91.7), "Eyeglasses": (14.8, 86.2)},
    "IcGAN Swap": {"Mouth_Slightly_Open": (11.4, 10.1), "Smiling": (22.9, 9.9), "Eyeglasses": (9.6, 47.5)},
    "FadNet AE": {"Mouth_Slightly_Open": (88.4, 91.8), "Smiling": (75.2, 90.1), "Eyeglasses": (78.8, 94.5)},
    "FadNet Swap": {"Mouth_Slightly_Open": (79.0, 66.2), "Smiling": (31.4, 97.1), "Eyeglasses": (45.3, 76.6)},
}


# --- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """An accuracy by the judge with its 95% bootstrap interval.

    images: real, reconstruction or swap. attribute: its name, or "*" for the mean over attributes.
    start, to: value names. A swap has both for one ordered pair, only `to` for the mean over all pairs that end there,
    and neither when balanced; for real images and reconstructions `to` is the label they carry.
    records: how many records it rests on; 0 leaves the value not a number.
    """

    images: str
    attribute: str
    start: str | None
    to: str | None
    records: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """A mean over records with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Slider:
    """What the judge says of one value of one attribute as its slider moves from -2 to 2.

    response: mean probability at each position. monotonic: share of records that rise and never turn back.
    effective_from, effective_to: where the middle 80% of the rise takes place.
    """

    attribute: str
    value: str
    positions: tuple[float, ...]
    response: tuple[float, ...]
    monotonic: float
    effective_from: float
    effective_to: float
    records: int


@dataclass(frozen=True)
class Preservation:
    """How far the attributes that one did not touch move when `attribute` is swapped, against the reconstruction.

    kept: share of the other judged attributes whose judged value stays. shift: mean total variation distance between
    the judge's probabilities before and after. most_moved: the other attribute with the largest shift, and that shift.
    """

    attribute: str
    kept: float
    shift: float
    most_moved: str
    most_moved_shift: float


@dataclass(frozen=True)
class Leak:
    """What a fresh probe reads of one attribute from frozen latents: balanced accuracy on records it was not trained on.

    chance is 1/k. probe: which of the probes did best on held-out training records ("linear" or "mlp").
    """

    attribute: str
    value: float
    low: float
    high: float
    chance: float
    probe: str
    probe_records: int
    records: int


@dataclass(frozen=True)
class Distance:
    """How far the features of some decoded images lie from those of real images.

    images: reconstruction (against the same records), swap (attribute and to say which; against the real images that
    hold the value asked for) or sample (against all). fid: Fréchet distance. kid, kid_std: kernel distance and its
    standard deviation over subsets. records, real_records: how many images on each side.
    """

    images: str
    attribute: str | None
    to: str | None
    records: int
    real_records: int
    fid: float
    kid: float
    kid_std: float


@dataclass(frozen=True)
class Conditional:
    """Scores of images by class.

    images: real, reconstruction, swap or sample. classes: the attributes whose joint values are the classes; a swap is
    of the class it was asked for, every other image of the class it is labelled. num_classes: classes with at least two
    images on both sides. inception, between, within: IS, BCIS and WCIS of the judge's probabilities over the classes.
    bcfid, wcfid: between- and within-class Fréchet distance to real images; not numbers for real images.
    """

    images: str
    classes: tuple[str, ...]
    num_classes: int
    records: int
    inception: float
    between: float
    within: float
    bcfid: float
    wcfid: float


@dataclass
class Report:
    """Everything `evaluate` found for one model. Parts that were not asked for are empty."""

    model: str
    method: str
    judge: str | None
    split: str
    split_digest: str
    records: int
    split_records: int
    image_size: int
    images_seen: int | None
    seed: int
    warnings: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    auc: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, Measure] = field(default_factory=dict)
    preservation: list[Preservation] = field(default_factory=list)
    sliders: list[Slider] = field(default_factory=list)
    leak: list[Leak] = field(default_factory=list)
    features: str | None = None
    distances: list[Distance] = field(default_factory=list)
    conditional: list[Conditional] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)

    def score(self, images: str, attribute: str = "*", to: str | None = None, start: str | None = None) -> Score:
        """One accuracy: balanced when no value is named, of one direction with `to`, of one pair with `start` as well.

        Raises:
            ValueError: the report has no such number.
        """
        for score in self.scores:
            if (score.images, score.attribute, score.to, score.start) == (images, attribute, to, start):
                return score
        direction = f" {start or ''}→{to}" if to is not None else ""
        raise ValueError(f"the report on {self.model} has no {images} accuracy of {attribute}{direction}")

    def attributes(self) -> list[str]:
        """Names of the judged attributes, in the model's order."""
        return list(dict.fromkeys(score.attribute for score in self.scores if score.attribute != "*"))

    def metrics(self) -> dict[str, float]:
        """The numbers flat, named split/quantity, as tracking and the export's card store them; none that is missing."""
        prefix = {"real": "judge_accuracy", "reconstruction": "reconstruction_accuracy", "swap": "swap_accuracy"}
        flat = {}
        for s in self.scores:
            if s.images != "swap" and s.to is not None:
                direction = f"_{s.to}"
            else:
                direction = "".join(f"_{part}" for part in (s.start, s.to and f"to_{s.to}") if part)
            flat[prefix[s.images] + ("" if s.attribute == "*" else f".{s.attribute}{direction}")] = s.value
        flat |= {f"judge_auc.{name}": value for name, value in self.auc.items()}
        flat |= {name: measure.value for name, measure in self.fidelity.items()}
        for p in self.preservation:
            flat |= {f"kept.{p.attribute}": p.kept, f"shift.{p.attribute}": p.shift}
        for slider in self.sliders:
            name = slider.attribute if slider.value == "1" else f"{slider.attribute}_{slider.value}"
            flat |= {f"monotonic.{name}": slider.monotonic}
        flat |= {f"leak.{leak.attribute}": leak.value for leak in self.leak}
        for d in self.distances:
            name = d.images + (f".{d.attribute}_to_{d.to}" if d.attribute else "")
            flat |= {f"fid.{name}": d.fid, f"kid.{name}": d.kid}
        for c in self.conditional:
            name = f"{c.images}.{'_and_'.join(c.classes)}"
            flat |= {f"is.{name}": c.inception, f"bcis.{name}": c.between, f"wcis.{name}": c.within}
            flat |= {f"bcfid.{name}": c.bcfid, f"wcfid.{name}": c.wcfid}
        return {f"{self.split}/{name}": float(value) for name, value in flat.items() if not math.isnan(value)}

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; None stands for what is not a number."""
        return {**_plain(asdict(self)), "metrics": self.metrics()}

    def markdown(self) -> str:
        return markdown([self])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- evaluate --------------------------------------------------------------------------------------------------------


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
        classes = _class_definitions(model.attributes, classes)
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
    with _evaluating(networks):
        pass_ = _Pass(model, judge, device, tables, records)
        if "distribution" in tables:
            assert judge is not None and classes is not None
            pass_.describe_with(inception_features(inception, device) if inception else judge_features(judge), classes)
        if set(tables) != {"cost"}:
            run(split, records, pass_.measure)
        if "leak" in tables:
            assert probe_split is not None
            report.leak = _leak(pass_, probe_split, run, labels, reduce_sum, rank, seed, report.warnings)
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
        report.distances = _distances(attributes, labels, rows, seed)
        report.conditional = _conditional(attributes, labels, rows, pass_)
        if inception and records < FID_RECORDS:
            report.warnings.append(f"FID over {records:,} records: below {FID_RECORDS:,} it is strongly biased")
    for warning in report.warnings:
        logger.warning("%s: %s", model.source, warning)
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


@contextmanager
def _evaluating(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Every module in eval mode, and afterwards each as it was."""
    before = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


# --- one pass over the records ---------------------------------------------------------------------------------------


def hard(attribute: Attribute, labels: Tensor) -> Tensor:
    """[N] int64 label among the attribute's values, -1 if unknown; a continuous one stands at its nearer end."""
    if attribute.kind == "continuous":
        labels = torch.where(labels < 0, labels, (labels >= 0.5).to(labels.dtype))
    return labels.long()


def swaps(attributes: Attributes, labels: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Every change of one attribute to another of its values, for all records at once.

    Step s of an attribute with k values moves each record from its label v to (v + s) mod k, so k - 1 decodes serve all
    ordered pairs. Records whose label is unknown are moved too, and not counted by anyone.

    Args:
        labels: [N, A].

    Yields:
        column, step, the changed labels [N, A], the value asked for [N] int64.
    """
    for j, attribute in enumerate(attributes):
        start = hard(attribute, labels[:, j]).clamp(min=0)
        for step in range(1, attribute.k):
            target = (start + step) % attribute.k
            changed = labels.clone()
            changed[:, j] = target.to(labels.dtype)
            yield j, step, changed, target


def decoded(method: Method, latent: Any, code: Tensor) -> Tensor:
    """Images as a person would see them: float32, within [-1, 1]."""
    return method.decode(latent, code).float().clamp(-1, 1)  # type: ignore[attr-defined]


class _Judge:
    """A judge's probabilities and judged values, for all that it knows, found by name."""

    def __init__(self, method: Method) -> None:
        self.method, self.attributes = method, method.attributes

    def probabilities(self, images: Tensor) -> list[Tensor]:
        """One [N, k] block an attribute."""
        logits = self.method.judge(images)  # type: ignore[attr-defined]
        head = "softmax" if logits.shape[1] == self.attributes.logits_width("softmax") else "sigmoid"
        return self.attributes.probabilities(logits, head)

    def columns(self, attributes: Attributes) -> list[int]:
        """Where the judge has these attributes."""
        return [self.attributes.index(name) for name in attributes.names]


class _Pass:
    """Per-record results, filled in by row; rows of other ranks stay 0, so that a sum over ranks gathers them.

    All results are allocated beforehand: a rank that happens to have no batch still takes part in every sum.
    """

    def __init__(self, model: Model, judge: Model | None, device: torch.device, tables: Sequence[str], records: int) -> None:
        self.method, self.attributes, self.device = model.method, model.attributes, device
        self.encodes, self.tables = isinstance(model.method, Encodes), tables
        self.judge = _Judge(judge.method) if judge else None
        self.columns = self.judge.columns(model.attributes) if self.judge else []
        self.kept: dict[str, Tensor] = {}
        self.features: Features | None = None
        self.classes: tuple[Classes, ...] = ()
        self.records = records
        self._preallocate(model, records)

    def describe_with(self, features: Features, classes: Sequence[Classes]) -> None:
        """Keep features and judged probabilities of real images, reconstructions, swaps and samples."""
        assert self.judge
        self.features, self.classes = features, tuple(classes)
        size = self.method.image_size
        with torch.inference_mode():
            width = features(torch.zeros(1, self.method.channels, size, size, device=self.device)).shape[1]
        for name in self._described():
            self.allocate(f"features/{name}", (self.records, width), torch.float32)
            self.allocate(f"probabilities/{name}", (self.records, self.attributes.code_width), torch.float32)
        for definition in self.classes:
            if len(definition.columns) > 1:
                self.allocate(f"classes/{definition.name}", (self.records,))

    def _described(self) -> list[str]:
        steps = [f"{attribute.name}/{step}" for attribute in self.attributes for step in range(1, attribute.k)]
        joint = [definition.name for definition in self.classes if len(definition.columns) > 1]
        samples = ["sample"] if isinstance(self.method, Samples) else []
        return ["real", "reconstruction", *steps, *joint, *samples]

    def _describe(self, name: str, index: Tensor, images: Tensor, judged: Sequence[Tensor] | None = None) -> None:
        if self.features is None:
            return
        assert self.judge
        judged = self.judge.probabilities(images) if judged is None else judged
        self.put(f"features/{name}", index, self.features(images))
        self.put(f"probabilities/{name}", index, torch.cat([judged[c] for c in self.columns], 1))

    def _preallocate(self, model: Model, records: int) -> None:
        width = len(self.attributes)
        if self.judge:
            self.allocate("real", (records, width))
            self.allocate("real_present", (records, width))
        if not self.encodes:
            return
        size = model.preprocessing.image_size
        if "leak" in self.tables:
            with torch.inference_mode():
                image = torch.zeros(1, model.preprocessing.channels, size, size, device=self.device)
                latent = self.method.encode(image, torch.zeros(1, width, device=self.device))  # type: ignore[attr-defined]
            self.allocate("latent", (min(records, PROBE_RECORDS), flat_latent(latent).shape[1]), torch.float32)
        if "fidelity" in self.tables:
            for name, smallest in (("mse", 1), ("ssim", metrics.SSIM_FROM), ("ms_ssim", metrics.MS_SSIM_FROM)):
                if size >= smallest:
                    self.allocate(name, (records,))
        if self.judge and {"swap", "fidelity", "distribution"} & set(self.tables):
            self.allocate("reconstruction", (records, width))
            self.allocate("swap", (records, sum(attribute.k - 1 for attribute in self.attributes)))
        if self.judge and "fidelity" in self.tables:
            self.allocate("preserved", (width, len(self.judge.attributes), 2))
            self.allocate("preserved_counts", (width,))
            sliders = len(list(_slider_values(self.attributes)))
            self.allocate("response", (min(records, SLIDER_RECORDS), sliders, len(SLIDER_POSITIONS)))

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        self.kept[name] = torch.zeros(shape, dtype=dtype, device=self.device)

    def put(self, name: str, index: Tensor, values: Tensor) -> None:
        """values [N, ...] become the rows `index` of a result; rows beyond its last are not wanted."""
        wanted = index < len(self.kept[name])
        self.kept[name][index[wanted]] = values[wanted].to(self.kept[name].dtype)

    def gathered(self, reduce_sum: ReduceSum) -> dict[str, Tensor]:
        """All records' results, on the CPU, on every rank."""
        return {name: reduce_sum(values).cpu() for name, values in sorted(self.kept.items())}

    def measure(self, batch: Batch) -> None:
        """Encode once, decode as often as the tables need, and keep what was seen."""
        method, attributes = self.method, self.attributes
        images, labels, index = batch.images, batch.attributes, batch.index
        assert images is not None
        if self.judge:
            real = self.judge.probabilities(images)
            self.put("real", index, torch.stack([real[c].argmax(1) for c in self.columns], 1))
            self.put("real_present", index, torch.stack([real[c][:, 1] for c in self.columns], 1))
        if not self.encodes:
            return
        latent = method.encode(images, labels)  # type: ignore[attr-defined]
        if "latent" in self.kept:
            self.put("latent", index, flat_latent(latent))
        if not {"swap", "fidelity", "distribution"} & set(self.tables):
            return
        code = attributes.code(labels)
        reconstruction = decoded(method, latent, code)
        for name, measure in (("mse", metrics.mse), ("ssim", metrics.ssim), ("ms_ssim", metrics.ms_ssim)):
            if name in self.kept:
                self.put(name, index, measure(reconstruction, images))
        if not self.judge:
            return
        before = self.judge.probabilities(reconstruction)
        self.put("reconstruction", index, torch.stack([before[c].argmax(1) for c in self.columns], 1))
        self._describe("real", index, images, real)
        self._describe("reconstruction", index, reconstruction, before)
        preds = []
        for j, step, changed, _ in swaps(attributes, labels):
            swap = decoded(method, latent, attributes.code(changed))
            after = self.judge.probabilities(swap)
            preds.append(after[self.columns[j]].argmax(1))
            self._describe(f"{attributes[j].name}/{step}", index, swap, after)
            if "fidelity" in self.tables:
                self._preserve(j, labels[:, j] >= 0, before, after)
        self.put("swap", index, torch.stack(preds, 1))
        if "fidelity" in self.tables and (index < SLIDER_RECORDS).any():
            self.put("response", index, self._response(latent, code))
        for definition in self.classes:
            if len(definition.columns) > 1:
                changed = definition.moved(labels, batch.draws)
                self._describe(definition.name, index, decoded(method, latent, attributes.code(changed)))
                self.put(f"classes/{definition.name}", index, definition.of(changed))
        if self.features is not None and isinstance(method, Samples):
            noise = batch.draws.normal("sample", (method.noise_width,))
            self._describe("sample", index, method.sample(noise, code).float().clamp(-1, 1))

    def _preserve(self, j: int, known: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Add, over the records whose label of attribute j is known, what its swap did to every judged attribute."""
        for a, (b, c) in enumerate(zip(before, after)):
            self.kept["preserved"][j, a, 0] += (b.argmax(1) == c.argmax(1))[known].sum()
            self.kept["preserved"][j, a, 1] += ((b - c).abs().sum(1) / 2)[known].double().sum()
        self.kept["preserved_counts"][j] += known.sum()

    def _response(self, latent: Any, code: Tensor) -> Tensor:
        """[N, sliders, positions]: the judge's probability of each slider's value."""
        assert self.judge
        sliders = []
        for j, attribute, value, category in _slider_values(self.attributes):
            steps = []
            for position in SLIDER_POSITIONS:
                moved = self.attributes.with_slider(code, attribute.name, position, category)
                images = decoded(self.method, latent, moved)
                steps.append(self.judge.probabilities(images)[self.columns[j]][:, value])
            sliders.append(torch.stack(steps, 1))
        return torch.stack(sliders, 1)


# --- distributions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """What the distribution table compares: images [N, C, H, W] in [-1, 1] to [N, F] float32, and what it is called."""

    name: str
    extract: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        return self.extract(images)


def inception_features(file: Path, device: torch.device) -> Features:
    """Features of the TorchScript network in a file, which takes uint8 [N, 3, H, W] and does its own resizing.

    The published Inception-v3 of 2015-12-05 in TorchScript is such a file; where its forward takes `return_features`,
    that is asked for.

    Raises:
        ValueError: the file is not there, is no TorchScript, or does not give [N, F].
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; name the TorchScript file of an Inception network")
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is not readable as TorchScript: {str(error).strip().splitlines()[0]}") from None
    options = {argument.name for argument in network.forward.schema.arguments}
    keywords = {"return_features": True} if "return_features" in options else {}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def extract(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        found = network(pixels, **keywords)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{file} gives {shape} for {len(images)} images; features must be [N, F]")
        return found.float()

    return Features(f"{file.name} (sha256 {digest[:12]}), images rounded to uint8, resized by the network", extract)


def judge_features(judge: Model) -> Features:
    """What the last linear layer of a judge reads.

    Raises:
        ValueError: the judge has no linear layer.
    """
    layers = [module for network in judge.method.networks.values() for module in network.modules()]
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    if not linear:
        raise ValueError(f"{judge.source} has no linear layer to take features from; name a network with --inception")
    read: list[Tensor] = []

    def extract(images: Tensor) -> Tensor:
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            judge.method.judge(images)  # type: ignore[attr-defined]
        finally:
            hook.remove()
        return read.pop().flatten(1).float()

    return Features(f"the last layer's input of the judge {judge.source}: not to be compared with published FID", extract)


@dataclass(frozen=True)
class Classes:
    """A definition of class: the joint values of some attributes. columns: theirs in the model's labels."""

    names: tuple[str, ...]
    columns: tuple[int, ...]
    attributes: tuple[Attribute, ...]

    @property
    def name(self) -> str:
        return "+".join(self.names)

    @property
    def num(self) -> int:
        return math.prod(attribute.k for attribute in self.attributes)

    def of(self, labels: Tensor) -> Tensor:
        """[N] int64 class of labels [N, A]; -1 where one of its attributes is unknown."""
        number = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        unknown = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        for column, attribute in zip(self.columns, self.attributes):
            label = hard(attribute, labels[:, column])
            number = number * attribute.k + label
            unknown |= label < 0
        return torch.where(unknown, -1, number)

    def moved(self, labels: Tensor, draws: Draws) -> Tensor:
        """Labels [N, A] with each record moved to another of the classes, drawn for the record; unknown stays unknown."""
        start = self.of(labels)
        target = (start + 1 + draws.integers(f"class.{self.name}", self.num - 1)) % self.num
        changed = labels.clone()
        for column, attribute in zip(reversed(self.columns), reversed(self.attributes)):
            changed[:, column] = torch.where(start < 0, labels[:, column], (target % attribute.k).to(labels.dtype))
            target = target // attribute.k
        return changed

    def probabilities(self, code: Tensor, slices: Sequence[slice]) -> Tensor:
        """[N, num]: the product of the judge's probabilities [N, code_width] of the attributes' values."""
        joint = torch.ones(len(code), 1, dtype=torch.float64, device=code.device)
        for column in self.columns:
            joint = (joint[:, :, None] * code[:, slices[column]].double()[:, None, :]).flatten(1)
        return joint


def _class_definitions(attributes: Attributes, given: Sequence[Sequence[str]] | None) -> tuple[Classes, ...]:
    found = []
    for names in given or [(name,) for name in attributes.names]:
        columns = tuple(attributes.index(name) for name in names)
        found.append(Classes(tuple(names), columns, tuple(attributes[c] for c in columns)))
    return tuple(found)


def _distances(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], seed: int) -> list[Distance]:
    """FID and KID of everything decoded against real images."""

    def distance(images: str, attribute: str | None, to: str | None, made: Tensor, real: Tensor) -> Distance:
        if min(len(made), len(real)) < 2:
            return Distance(images, attribute, to, len(made), len(real), math.nan, math.nan, math.nan)
        fid = metrics.frechet_distance(metrics.Gaussian.fit(made), metrics.Gaussian.fit(real))
        kid = metrics.kernel_distance(made, real, seed=seed)
        return Distance(images, attribute, to, len(made), len(real), fid, *kid)

    real = rows["features/real"]
    found = [distance("reconstruction", None, None, rows["features/reconstruction"], real)]
    for j, attribute in enumerate(attributes):
        label = hard(attribute, labels[:, j])
        for value in attribute.values:
            parts = []
            for step in range(1, attribute.k):
                start = (value - step) % attribute.k
                parts.append(rows[f"features/{attribute.name}/{step}"][label == start])
            made, held = torch.cat(parts), real[label == value]
            found.append(distance("swap", attribute.name, attribute.value_name(value), made, held))
    if "features/sample" in rows:
        found.append(distance("sample", None, None, rows["features/sample"], real))
    return found


def _conditional(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], pass_: _Pass) -> list[Conditional]:
    """IS, BCIS, WCIS, BCFID and WCFID for each definition of class."""
    slices, found = attributes.code_slices(), []
    for definition in pass_.classes:
        own = definition.of(labels)
        known = own >= 0
        sets = {name: (name, own) for name in ("real", "reconstruction", "sample") if f"features/{name}" in rows}
        groups = {name: [entry] for name, entry in sets.items()}
        if len(definition.columns) > 1:
            groups["swap"] = [(definition.name, rows[f"classes/{definition.name}"].long())]
        else:
            k = definition.num
            steps = [(f"{definition.name}/{step}", (own.clamp(min=0) + step) % k) for step in range(1, k)]
            groups["swap"] = steps
        real = rows["features/real"]
        for images in ("real", "reconstruction", "swap", "sample"):
            if images not in groups or not known.any():
                continue
            made = torch.cat([rows[f"features/{name}"][known] for name, _ in groups[images]])
            judged = torch.cat([rows[f"probabilities/{name}"][known] for name, _ in groups[images]])
            classes = torch.cat([of[known] for _, of in groups[images]])
            both = [c for c in range(definition.num) if min((classes == c).sum(), (own == c).sum()) > 1]
            fid = (math.nan, math.nan)
            if images != "real" and both:
                fid = metrics.conditional_frechet([real[own == c] for c in both], [made[classes == c] for c in both])
            scores = metrics.inception_scores(definition.probabilities(judged, slices), classes)
            found.append(Conditional(images, definition.names, len(both), len(made), *scores, *fid))
    return found


def flat_latent(latent: Any) -> Tensor:
    """[N, F] float32: every tensor of what `encode` gave, flattened and joined; all that the decoder reads of the image."""
    parts = list(_tensors(latent))
    if not parts:
        raise ValueError(f"encode gave {type(latent).__name__} without any tensor; the leak table cannot read it")
    return torch.cat([part.flatten(1).float() for part in parts], 1)


def _tensors(latent: Any) -> Iterator[Tensor]:
    if isinstance(latent, Tensor):
        yield latent
    elif isinstance(latent, dict):
        for key in sorted(latent):
            yield from _tensors(latent[key])
    elif isinstance(latent, (list, tuple)):
        for part in latent:
            yield from _tensors(part)
    elif is_dataclass(latent):
        for part in fields(latent):
            yield from _tensors(getattr(latent, part.name))


# --- tables from per-record results ----------------------------------------------------------------------------------


def _scores(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], seed: int, warnings: list[str]) -> list[Score]:
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


def _slider_values(attributes: Attributes) -> Iterator[tuple[int, Attribute, int, int | None]]:
    """Every slider: column, attribute, the value it raises, and that value again as `category` when k-way."""
    for j, attribute in enumerate(attributes):
        for value in attribute.values if attribute.kind == "k-way" else (1,):
            yield j, attribute, value, value if attribute.kind == "k-way" else None


def _sliders(attributes: Attributes, rows: dict[str, Tensor]) -> list[Slider]:
    found = []
    for i, (_, attribute, value, _) in enumerate(_slider_values(attributes)):
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


# --- leak ------------------------------------------------------------------------------------------------------------


def _leak(
    pass_: _Pass,
    probe_split: Split,
    run: Callable[[Split, int, Callable[[Batch], None]], None],
    labels: Tensor,
    reduce_sum: ReduceSum,
    rank: int,
    seed: int,
    warnings: list[str],
) -> list[Leak]:
    """Table 3: probes learn from the training split's latents and answer for the evaluated split's."""
    attributes = pass_.attributes
    num_train = min(PROBE_RECORDS, len(probe_split))
    train_labels = torch.from_numpy(probe_split.columns(attributes)[:num_train].copy()).float()
    pass_.allocate("probe_latent", (num_train, pass_.kept["latent"].shape[1]), torch.float32)
    run(probe_split, num_train, lambda batch: pass_.put(
        "probe_latent", batch.index, flat_latent(pass_.method.encode(batch.images, batch.attributes))  # type: ignore[attr-defined]
    ))
    train = reduce_sum(pass_.kept.pop("probe_latent")).cpu()
    test = reduce_sum(pass_.kept.pop("latent")).cpu()
    labels = labels[: len(test)]
    hard_train = torch.stack([hard(a, train_labels[:, j]) for j, a in enumerate(attributes)], 1)
    hard_test = torch.stack([hard(a, labels[:, j]) for j, a in enumerate(attributes)], 1)
    preds = torch.zeros(len(test), len(attributes), dtype=torch.float64)
    kinds = torch.zeros(len(attributes), dtype=torch.float64)
    if rank == 0:  # training amplifies rounding, so one rank does it for all
        preds, kinds = probe(train, hard_train, test, [a.k for a in attributes], seed=seed)
    preds = reduce_sum(preds.to(pass_.device)).cpu().long()
    kinds = reduce_sum(kinds.to(pass_.device)).cpu()
    found = []
    for j, attribute in enumerate(attributes):
        if kinds[j] < 0:
            warnings.append(f"{attribute.name}: its training labels hold one value only; no probe can learn it")
            continue
        mask = torch.stack([hard_test[:, j] == value for value in attribute.values], 1)
        bits = torch.stack([preds[:, j] == value for value in attribute.values], 1)
        some = mask.any(0)
        resampled = metrics.bootstrap_means(bits, mask, seed=seed)[:, some].nanmean(1)
        found.append(
            Leak(
                attribute.name,
                metrics.balanced_accuracy(preds[:, j], hard_test[:, j], attribute.k),
                *metrics.interval(resampled),
                chance=1 / attribute.k,
                probe=PROBES[int(kinds[j])],
                probe_records=int((hard_train[:, j] >= 0).sum()),
                records=int((hard_test[:, j] >= 0).sum()),
            )
        )
    return found


PROBES = ("linear", "mlp")
_STRENGTHS = (1.0, 0.1, 0.01, 0.001)  # of the L2 penalty of the linear probes, beside a mean loss

Classifier = Callable[[Tensor], Tensor]


def probe(
    train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int], *, seed: int, epochs: int = 30, hidden: int = 256
) -> tuple[Tensor, Tensor]:
    """What fresh classifiers, trained on frozen latents, say of other latents.

    Logistic regressions with several strengths of L2 and a network with one hidden layer learn every attribute with
    class-balanced cross-entropy, on latents standardised by what they learn from. For each attribute the classifier
    (and the network's epoch) is chosen by balanced accuracy on the last fifth of the training records, from which none
    of them learns. A pure function of its arguments.

    Args:
        train, test: [N, F] and [M, F] float32.
        train_labels: [N, A] int64, -1 = unknown (left out).
        ks: values of each attribute.
        seed: of the network's first weights and of the order of its batches.

    Returns:
        preds [M, A] float64; the index in PROBES of the classifier chosen [A] float64, -1 where the part learnt from
        holds fewer than two values.
    """
    num_learn = max(1, len(train) - len(train) // 5)
    mean, std = train[:num_learn].mean(0), train[:num_learn].std(0, correction=0)
    scale = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), 1 / std.clamp(min=1e-30), 0.0)
    learn, held, test = ((part - mean) * scale for part in (train[:num_learn], train[num_learn:], test))
    labels, held_labels = train_labels[:num_learn], train_labels[num_learn:]
    weights = []
    for j, k in enumerate(ks):
        counts = torch.stack([(labels[:, j] == value).sum() for value in range(k)]).float()
        weights.append(torch.where(counts > 0, counts.sum() / (k * counts.clamp(min=1)), 0.0))
    learnable = [int((weight > 0).sum()) >= 2 for weight in weights]
    best = [(-1.0, 0)] * len(ks)
    preds = torch.zeros(len(test), len(ks), dtype=torch.float64)

    def loss(logits: Tensor, rows: Tensor | slice) -> Tensor:
        """Mean over these rows, each weighted so that the values of its attribute count alike; summed over attributes."""
        total = logits.new_zeros(())
        for j, block in enumerate(logits.split(list(ks), 1)):
            if learnable[j]:
                total = total + torch.nn.functional.cross_entropy(
                    block, labels[rows, j], weights[j], ignore_index=-1, reduction="sum"
                )
        return total / len(logits)

    def consider(kind: str, classifier: Classifier) -> None:
        with torch.no_grad():
            held_blocks, test_blocks = (classifier(part).split(list(ks), 1) for part in (held, test))
        for j, k in enumerate(ks):
            value = metrics.balanced_accuracy(held_blocks[j].argmax(1), held_labels[:, j], k)
            if learnable[j] and value > best[j][0]:
                best[j] = (value, PROBES.index(kind))
                preds[:, j] = test_blocks[j].argmax(1).double()

    if any(learnable):
        with torch.inference_mode(False), torch.enable_grad():
            for classifier in _linear_probes(learn, loss, sum(ks)):
                consider("linear", classifier)
            for classifier in _mlp_probe(learn, loss, sum(ks), hidden, epochs, seed):
                consider("mlp", classifier)
    kinds = [kind if can else -1 for (_, kind), can in zip(best, learnable)]
    return preds, torch.tensor(kinds, dtype=torch.float64)


def _linear_probes(learn: Tensor, loss: Callable[..., Tensor], width: int) -> Iterator[Classifier]:
    """A logistic regression for each strength of L2, from strong to weak, each from where the last one ended."""
    weight = torch.zeros(learn.shape[1], width, requires_grad=True)
    bias = torch.zeros(width, requires_grad=True)
    for strength in _STRENGTHS:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(learn @ weight + bias, slice(None)) + strength / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        yield lambda latents: latents @ weight + bias


def _mlp_probe(
    learn: Tensor, loss: Callable[..., Tensor], width: int, hidden: int, epochs: int, seed: int
) -> Iterator[Classifier]:
    """A network with one hidden layer after each epoch."""
    generator = torch.Generator().manual_seed(seed)

    def layer(num_in: int, num_out: int) -> torch.nn.Linear:
        made = torch.nn.utils.skip_init(torch.nn.Linear, num_in, num_out)
        with torch.no_grad():
            made.weight.uniform_(-(num_in**-0.5), num_in**-0.5, generator=generator)
            made.bias.zero_()
        return made

    network = torch.nn.Sequential(layer(learn.shape[1], hidden), torch.nn.ReLU(), layer(hidden, width))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(learn), generator=generator).split(256):
            optimizer.zero_grad()
            loss(network(learn[rows]), rows).backward()
            optimizer.step()
        yield network


# --- cost ------------------------------------------------------------------------------------------------------------


def _cost(model: Model, device: torch.device, batch_size: int, seconds: float = 0.5) -> dict[str, Any]:
    """Table 5: parameters of each network, floating-point operations of one image, images a second."""
    method = model.method
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
        latent = method.encode(images, labels)  # type: ignore[attr-defined]
        single = method.encode(images[:1], labels[:1])  # type: ignore[attr-defined]
        for name, one, all_ in (
            ("encode", lambda: method.encode(images[:1], labels[:1]), lambda: method.encode(images, labels)),  # type: ignore[attr-defined]
            ("decode", lambda: method.decode(single, code[:1]), lambda: method.decode(latent, code)),  # type: ignore[attr-defined]
        ):
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


# --- small validation inside the loop --------------------------------------------------------------------------------


def quick(
    method: Method,
    judge: Method | None,
    batches: Iterable[Batch],
    *,
    reduce_sum: ReduceSum = identity,
    prefix: str = "valid",
) -> dict[str, float]:
    """Reconstruction and swaps over some batches, for the loop: no intervals, no report.

    Args:
        method: encodes and decodes; its networks are put into eval mode and back.
        judge: knows every attribute of the method; None leaves the swaps out.
        batches: this rank's batches, columns as the method's attributes. Every rank must call, if with no batch.
        reduce_sum: sum over all ranks of a tensor on the device of the batches (the method's, where there is none).

    Returns:
        `valid/mse`, `valid/psnr`, `valid/swap_accuracy` (balanced, mean over attributes), `.NAME` (balanced),
        `.NAME_to_VALUE`, `valid/judge_accuracy.NAME` (balanced, real images). What no record tells is left out.
    """
    attributes = method.attributes
    seer = _Judge(judge) if judge else None
    columns = seer.columns(attributes) if seer else []
    names: list[tuple[str, str, str | None, str]] = []  # images, attribute, start, to; as pairs of sums
    for attribute in attributes:
        for value in attribute.values:
            names.append(("real", attribute.name, None, attribute.value_name(value)))
            for step in range(1, attribute.k):
                to = attribute.value_name((value + step) % attribute.k)
                names.append(("swap", attribute.name, attribute.value_name(value), to))
    place = {name: i for i, name in enumerate(names)}
    device = next((p.device for network in method.networks.values() for p in network.parameters()), torch.device("cpu"))
    sums = torch.zeros(3 + 2 * len(names), dtype=torch.float64, device=device)
    with _evaluating([*method.networks.values(), *(judge.networks.values() if judge else ())]):
        for batch in batches:
            with torch.inference_mode():
                sums += _quick_sums(method, seer, columns, batch, place).to(device)
    sums = reduce_sum(sums.clone()).cpu()
    if not sums[0]:
        return {}
    out = {f"{prefix}/mse": float(sums[1] / sums[0]), f"{prefix}/psnr": float(sums[2] / sums[0])}
    share = {name: float(sums[3 + 2 * i] / sums[4 + 2 * i]) for name, i in place.items() if sums[4 + 2 * i]}
    for images, what in (("real", "judge_accuracy"), ("swap", "swap_accuracy")):
        balanced = []
        for attribute in attributes:
            own = {name: value for name, value in share.items() if name[:2] == (images, attribute.name)}
            if not own:
                continue
            balanced.append(sum(own.values()) / len(own))
            out[f"{prefix}/{what}.{attribute.name}"] = balanced[-1]
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    ends = [value for name, value in own.items() if name[3] == to]
                    if ends:
                        out[f"{prefix}/{what}.{attribute.name}_to_{to}"] = sum(ends) / len(ends)
        if balanced:
            out[f"{prefix}/{what}"] = sum(balanced) / len(balanced)
    return out


def _quick_sums(method: Method, seer: _Judge | None, columns: Sequence[int], batch: Batch, place: dict) -> Tensor:
    """[3 + 2 * places]: records, sums of MSE and PSNR, then right and counted of each place."""
    assert batch.images is not None
    attributes, labels = method.attributes, batch.attributes
    sums = torch.zeros(3 + 2 * len(place), dtype=torch.float64, device=labels.device)
    latent = method.encode(batch.images, labels)  # type: ignore[attr-defined]
    error = metrics.mse(decoded(method, latent, attributes.code(labels)), batch.images)
    sums[0], sums[1], sums[2] = len(error), error.sum(), metrics.psnr(error).sum()
    if seer is None:
        return sums

    def add(name: tuple[str, str, str | None, str], right: Tensor, counted: Tensor) -> None:
        sums[3 + 2 * place[name]] += (right & counted).sum()
        sums[4 + 2 * place[name]] += counted.sum()

    real = seer.probabilities(batch.images)
    for j, attribute in enumerate(attributes):
        label = hard(attribute, labels[:, j])
        for value in attribute.values:
            preds = real[columns[j]].argmax(1)
            add(("real", attribute.name, None, attribute.value_name(value)), preds == value, label == value)
    for j, step, changed, target in swaps(attributes, labels):
        preds = seer.probabilities(decoded(method, latent, attributes.code(changed)))[columns[j]].argmax(1)
        attribute, label = attributes[j], hard(attributes[j], labels[:, j])
        for start in attribute.values:
            to = attribute.value_name((start + step) % attribute.k)
            add(("swap", attribute.name, attribute.value_name(start), to), preds == target, label == start)
    return sums


# --- tables for people -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table as text: Markdown, a terminal and a page draw it alike."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def as_tables(reports: Sequence[Report]) -> list[Table]:
    """Everything in some reports as tables, side by side where several speak of the same."""
    found = [_summary(reports), *_directions(reports), _published(reports)]
    found += [_fidelity_table(reports), _preservation_table(reports), _slider_table(reports)]
    found += [_leak_table(reports), _distance_table(reports), _conditional_table(reports), _cost_table(reports)]
    return [table for table in found if table and table.rows]


def _named(reports: Sequence[Report]) -> list[tuple[str, Report]]:
    """Each report with what its rows are called: the source, shortened to its last part while that tells them apart."""
    short = [report.model.rstrip("/").rsplit("/", 1)[-1] for report in reports]
    if len(set(short)) < len(short):
        short = [report.model for report in reports]
    return list(zip(short, reports))


def _rows_of(reports: Sequence[Report]) -> list[tuple[str, Report, str]]:
    """Rows of table 1: real images once a judge and split, then each model's reconstructions and swaps."""
    rows, seen = [], set()
    for name, report in _named(reports):
        key = (report.judge, report.split, report.split_digest, report.records, tuple(report.attributes()))
        if report.scores and key not in seen:
            seen.add(key)
            rows.append(("real", report, "real"))
        for images in ("reconstruction", "swap"):
            if any(score.images == images for score in report.scores):
                rows.append((f"{name} {images}", report, images))
    return rows


def _cell(report: Report, images: str, attribute: str, to: str | None = None, start: str | None = None) -> str:
    for s in report.scores:
        if (s.images, s.attribute, s.to, s.start) == (images, attribute, to, start):
            return _with_interval(s.value, s.low, s.high)
    return "–"


def _all_attributes(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(name for report in reports for name in report.attributes()))


def _summary(reports: Sequence[Report]) -> Table:
    names = _all_attributes(reports)
    rows = [
        [row, *(_cell(report, images, name) for name in names), _cell(report, images, "*")]
        for row, report, images in _rows_of(reports)
    ]
    note = (
        "Balanced accuracy by the judge (95% bootstrap interval). real and reconstruction: judged as labelled, mean over "
        "values. swap: judged as the value asked for, counted on records that have another, mean over ordered pairs."
    )
    return Table("1. Does it slide?", ["images", *names, "mean"], rows, note)


def _directions(reports: Sequence[Report]) -> Iterator[Table]:
    """One table an attribute with every direction, and one with every pair where there are more than two values."""
    for name in _all_attributes(reports):
        scores = [s for report in reports for s in report.scores if s.attribute == name]
        values = list(dict.fromkeys(s.to for s in scores if s.to is not None))
        counts = {s.to: s.records for s in scores if s.images == "real" and s.to is not None}
        rows = [
            [row, *(_cell(report, images, name, value) for value in values), _cell(report, images, name)]
            for row, report, images in _rows_of(reports)
        ]
        rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
        aucs = [f"{report.auc[name]:.3f}" for report in reports if not math.isnan(report.auc.get(name, math.nan))]
        held = ", ".join(f"{count:,} are {value}" for value, count in counts.items())
        note = f"Records: {held}." + (f" The judge's AUC on real images: {aucs[0]}." if aucs else "")
        yield Table(f"{name}, each direction", ["images", *(f"is / to {v}" for v in values), "balanced"], rows, note)
        if len(values) > 2:
            rows = [
                [row, start, *(_cell(report, images, name, to, start) for to in values)]
                for row, report, images in _rows_of(reports)
                if images == "swap"
                for start in values
            ]
            yield Table(f"{name}, each pair", ["images", "from", *(f"to {value}" for value in values)], rows)


def _published(reports: Sequence[Report]) -> Table:
    names = [name for name in PUBLISHED["Real Image"] if name in _all_attributes(reports)]
    header = ["images", *(f"{name} {what}" for name in names for what in ("naturalness", "accuracy"))]
    rows = [[row, *(f"{number:.1f}" for name in names for number in cells[name])] for row, cells in PUBLISHED.items()]
    return Table("As published, in percent", header, rows if names else [], PUBLISHED_SOURCE + ".")


def _fidelity_table(reports: Sequence[Report]) -> Table:
    names = list(dict.fromkeys(name for report in reports for name in report.fidelity))
    title = {"mse": "MSE on [-1, 1]", "psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
    digits = {"mse": 5, "psnr": 2}
    rows = []
    for model, report in _named(reports):
        if report.fidelity:
            cells = []
            for name in names:
                m = report.fidelity.get(name)
                cells.append(_with_interval(m.value, m.low, m.high, digits.get(name, 3)) if m else "–")
            rows.append([model, *cells])
    note = "Reconstructions against the images they are of; means over records of each image's number."
    return Table("2. Fidelity of reconstructions", ["model", *(title[name] for name in names)], rows, note)


def _preservation_table(reports: Sequence[Report]) -> Table:
    rows = [
        [model, p.attribute, _number(p.kept), _number(p.shift), f"{p.most_moved} ({_number(p.most_moved_shift)})"]
        for model, report in _named(reports)
        for p in report.preservation
    ]
    note = (
        "kept: share of the other judged attributes whose judged value stays under a swap, against the reconstruction. "
        "shift: mean total variation distance of the judge's probabilities."
    )
    return Table(
        "What a swap does to the other attributes", ["model", "swapped", "kept", "shift", "moves most"], rows, note
    )


def _slider_table(reports: Sequence[Report]) -> Table:
    rows = [
        [
            model,
            slider.attribute if slider.value == "1" else f"{slider.attribute}.{slider.value}",
            *(_number(response, 2) for response in slider.response),
            _number(slider.monotonic),
            f"{_number(slider.effective_from, 2)} … {_number(slider.effective_to, 2)}",
        ]
        for model, report in _named(reports)
        for slider in report.sliders
    ]
    counts = {slider.records for report in reports for slider in report.sliders}
    note = (
        f"The judge's mean probability at each slider position, over the first {max(counts, default=0):,} records. "
        "monotonic: share of records that rise by more than 0.05 and never fall by more than 0.01 between positions. "
        "effective: where the middle 80% of the mean rise takes place."
    )
    header = ["model", "slider", *(f"{position:g}" for position in SLIDER_POSITIONS), "monotonic", "effective"]
    return Table("The judge along the slider", header, rows, note)


def _leak_table(reports: Sequence[Report]) -> Table:
    rows = [
        [model, leak.attribute, _with_interval(leak.value, leak.low, leak.high), _number(leak.chance), leak.probe]
        + [f"{leak.probe_records:,}", f"{leak.records:,}"]
        for model, report in _named(reports)
        for leak in report.leak
    ]
    note = "Balanced accuracy of a fresh probe on frozen latents: chance when the latent tells nothing, 1 when all."
    header = ["model", "attribute", "probe accuracy", "chance", "probe", "learnt from", "tested on"]
    return Table("3. Leak", header, rows, note)


def _distance_table(reports: Sequence[Report]) -> Table:
    rows = []
    for model, report in _named(reports):
        for d in report.distances:
            against = f"real {d.attribute} {d.to}" if d.attribute else "real"
            made = f"{d.images} {d.attribute} to {d.to}" if d.attribute else d.images
            kid = "–" if math.isnan(d.kid) else f"{d.kid:.5f} ± {d.kid_std:.5f}"
            rows.append([model, made, against, _number(d.fid), kid, f"{d.records:,}", f"{d.real_records:,}"])
    note = _features_note(reports) + "KID: mean ± standard deviation over 100 subsets of at most 1,000."
    header = ["model", "images", "against", "FID", "KID", "images", "real images"]
    return Table("4. Distribution", header, rows, note)


def _conditional_table(reports: Sequence[Report]) -> Table:
    rows = [
        [model, c.images, " + ".join(c.classes), f"{c.num_classes}", f"{c.records:,}"]
        + [_number(number) for number in (c.inception, c.between, c.within, c.bcfid, c.wcfid)]
        for model, report in _named(reports)
        for c in report.conditional
    ]
    note = (
        "A class is a joint value of the named attributes; a swap is of the class it was asked for, every other image of "
        "the class it is labelled. IS = BCIS · WCIS, of the judge's probabilities of the classes. BCFID and WCFID weigh "
        "classes alike, over those with two images on both sides. " + _features_note(reports)
    )
    header = ["model", "images", "classes by", "classes", "images", "IS", "BCIS", "WCIS", "BCFID", "WCFID"]
    return Table("Distribution by class", header, rows, note.strip())


def _features_note(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(report.features for report in reports if report.features))
    return f"Features: {'; '.join(names)}. " if names else ""


def _cost_table(reports: Sequence[Report]) -> Table:
    rows = []
    for model, report in _named(reports):
        if cost := report.cost:
            parameters = ", ".join(f"{name} {count:,}" for name, count in cost["parameters"].items())
            row = [model, parameters]
            for what in ("encode", "decode"):
                row += [f"{cost[f'{what}_flops'] / 1e9:.3f}", f"{cost[f'{what}_images_per_second']:,.0f}"]
            rows.append([*row, f"{cost['device']}, {cost['threads']} threads, batch {cost['batch_size']}"])
    header = ["model", "parameters", "encode GFLOP", "encode images/s", "decode GFLOP", "decode images/s", "on"]
    note = "GFLOP of one image in convolutions and matrix products, a multiply and an add counted as two."
    return Table("5. Cost", header, rows, note)


def markdown(reports: Sequence[Report]) -> str:
    """All tables of some reports as Markdown, with what they rest on and every warning above them."""
    lines = ["# Evaluation", ""]
    for report in reports:
        judged = f", judged by {report.judge}" if report.judge else ""
        seen = "" if report.images_seen is None else f", after {report.images_seen:,} images"
        lines.append(
            f"- {report.model} ({report.method}, {report.image_size} pixels{seen}): {report.records:,} of "
            f"{report.split_records:,} records of the {report.split} split (digest {report.split_digest[:12]}){judged}, "
            f"seed {report.seed}"
        )
        lines += [f"  - **{warning}**" for warning in report.warnings]
    for table in as_tables(reports):
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(table.header) + " |")
        lines.append("|" + " --- |" * len(table.header))
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        if table.note:
            lines += ["", table.note]
    return "\n".join(lines) + "\n"
