"""Measuring a run while it trains: part of the validation split, the best checkpoint, when to stop, pictures to look at.

It is the pass of `fader evaluate`, without intervals and with fewer tables. Every rank takes its share and gets the same
numbers, so all of them come to the same decision. What was measured so far is a few plain numbers (`BestSoFar.state`) that
go into every checkpoint, so that a resumed run decides as an unbroken one does.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fader.method import Method
from pipeline import evaluation, metrics, models
from pipeline.config import Experiment, RunConfig
from pipeline.data.shards import ShardSet, Split
from pipeline.engine import Engine
from pipeline.evaluation.pictures import swapped
from pipeline.loading.loader import Loader
from pipeline.loading.plan import sequential
from pipeline.models import Model
from pipeline.settings import nearest

BATCH_SIZE = 128
PICTURE_RECORDS = 6
USUAL = ("swap_accuracy", "judge_accuracy")  # what an empty run.best means, where it is measured


@dataclass(frozen=True)
class Best:
    """A validation that was better than all before it: when, its metric's value, and its MSE where it has one."""

    images: int
    value: float
    mse: float | None


@dataclass(frozen=True)
class Measured:
    """The metrics of a validation, and at how many images seen it took place; -1 before the first.
    metrics: by the names that `run.best` knows, without the split's."""

    images: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_log(self) -> dict[str, float]:
        return {f"valid/{name}": value for name, value in self.metrics.items()}


class BestSoFar:
    """The best validation so far, and for how long none was better.

    A validation is better than the best when its MSE is inside the bound and the best's is not, or when both are or both are not
    and its metric is better. The bound is `best_mse`, or `best_mse_factor` times the lowest MSE so far: a run's own way of saying
    "no worse than". A best whose MSE is above the bound is replaced by the next one within it.
    settings: the run's; `best`, `best_mse`, `best_mse_factor`, `patience_metric` and `patience_images` are read.
    usual: the metric that an empty `best` means. known: the names of the metrics that are measured; others are refused.
    Raises ValueError: a metric that is not measured.
    """

    def __init__(self, settings: RunConfig, usual: str, known: list[str]) -> None:
        self.metric = settings.best or usual
        self.patience_metric = settings.patience_metric or self.metric
        named = [("best", self.metric), ("patience_metric", self.patience_metric)]
        for key, name in (*named, *(("keep_best", metric) for metric in settings.keep_best)):
            if name not in known:
                raise ValueError(f"run.{key}: validation measures no {name!r}{nearest(name, known)} (see run.evaluate_tables)")
        self.mse_at_most, self.mse_factor = settings.best_mse, settings.best_mse_factor
        self.patience_images = settings.patience_images
        self.load(None)

    @property
    def bound(self) -> float:
        """The MSE above which no validation becomes the best while one below it is known."""
        if self.mse_at_most is not None:
            return self.mse_at_most
        return self.mse_factor * self.lowest_mse if self.mse_factor else math.inf

    def note(self, measured: Measured) -> bool:
        """Take note of a validation; return whether it is the best so far."""
        values, images = measured.metrics, measured.images
        mse, value = values.get("mse"), values.get(self.metric)  # a value is missing where no record tells
        self.lowest_mse = min(self.lowest_mse, math.inf if mse is None else mse)
        new = None if value is None else Best(images, value, mse)
        better = new is not None and (self.best is None or self._rank(new) > self._rank(self.best))
        progress = better
        if better:
            self.best = new
        if self.patience_metric != self.metric:
            value, before = values.get(self.patience_metric), self.progress
            progress = value is not None and (
                before is None or score(self.patience_metric, value) > score(self.patience_metric, before)
            )
            self.progress = value if progress else before
        if progress or self.progress_images is None:
            self.progress_images = images
        return better

    def _rank(self, best: Best) -> tuple[bool, float]:
        return best.mse is None or best.mse <= self.bound, score(self.metric, best.value)

    def stalled(self, images: int) -> bool:
        since = self.progress_images
        return bool(self.patience_images) and since is not None and images - since >= self.patience_images

    def about_best(self) -> dict[str, Any]:
        """What is kept beside the best checkpoint."""
        assert self.best is not None
        return {"metric": self.metric, **dataclasses.asdict(self.best)}

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best": self.best and dataclasses.asdict(self.best),
            "lowest_mse": self.lowest_mse if math.isfinite(self.lowest_mse) else None,
            "patience_metric": self.patience_metric,
            "progress": self.progress,
            "progress_images": self.progress_images,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave, or from nothing where it is None; what rests on another metric begins anew."""
        state = state or {}
        lowest, best = state.get("lowest_mse"), state.get("best") if state.get("metric") == self.metric else None
        self.lowest_mse: float = math.inf if lowest is None else lowest
        self.best = Best(**best) if best else None
        same = state.get("patience_metric") == self.patience_metric
        self.progress: float | None = state["progress"] if same else None  # the best value of the patience's own metric
        self.progress_images: int | None = state["progress_images"] if same else None


def score(name: str, value: float) -> float:
    """Return a metric's value, or its opposite where lower is better: the higher, the better."""
    return -value if metrics.lower_is_better(name) else value


class Validation:
    """Measures the run's networks (their moving averages where they are kept, as `fader evaluate` takes them).

    best_so_far: None where the run does not measure (run.evaluate_images is 0) and only shows pictures.
    judges: say what an image shows; none leaves reconstructions only. A run that trains a judge needs none.
    shards: the set trained on; its validation split is measured.
    open_loader: opens a split as the run reads it, each batch whole.
    Raises ValueError: a judge does not fit, or starts as the run does; a table that cannot be had; a metric that is not measured;
    no validation split.
    """

    def __init__(
        self, experiment: Experiment, engine: Engine, judges: Sequence[Model], shards: ShardSet,
        open_loader: Callable[[Split], Loader],
    ) -> None:
        self.engine, self.judges, self.shards, self.split = engine, judges, shards, shards.split("valid")
        self._open, self._loaders = open_loader, {}
        run, method, preprocessing = experiment.run, engine.method, experiment.data.preprocessing()
        self.model = Model(method, {"config": {"seed": experiment.seed}}, method.attributes, preprocessing, (), experiment.name)
        self.specification = evaluation.Specification(
            split="valid", limit=run.evaluate_records, tables=tables(run.evaluate_tables, method, judges), resamples=0,
            seed=experiment.seed, batch_size=BATCH_SIZE, device=str(engine.device),
        )
        self.best_so_far: BestSoFar | None = None
        if run.evaluate_images:
            self.best_so_far = self._best_so_far(run)

    def _best_so_far(self, run: RunConfig) -> BestSoFar:
        name = self.model.method.name
        if not len(self.split):
            raise ValueError(f"{self.shards.path} has no validation records; set run.evaluate_images=0, or prepare it with some")
        if not (evaluation.makes_pictures(self.model.method) or models.judge(self.model.method)):
            raise ValueError(f"{name} neither makes pictures nor judges: set run.evaluate_images=0")
        if not self.specification.tables:
            raise ValueError(f"{name} reconstructs nothing, so it needs a judge: name one with judge=RUN")
        for judge in self.judges:
            self.specification.place(judge)
        known = evaluation.quantities(self.model, self.judges, self.shards, self.specification)
        return BestSoFar(run, next(name for name in (*USUAL, *known) if name in known), known)

    def measure(self, images: int) -> Measured:
        """Return the metrics after so many images seen, the same on every rank. All ranks call it together."""
        with self.engine.averaged():
            report = evaluation.evaluate(
                self.model, self.judges, self.shards, self.specification, self.engine, open_loader=self._loader
            )
        return Measured(images, {name.partition("/")[2]: value for name, value in report.metrics().items()})

    def pictures(self) -> Tensor | None:
        """Return the first records' pictures, decoded by the averaged weights on this rank: [N, columns, C, S, S].
        The columns are those of `evaluation.pictures.swapped`. It is None where the method makes no pictures or no record is
        there to be shown."""
        if not evaluation.makes_pictures(self.model.method) or not len(self.split):
            return None
        [request] = sequential(min(PICTURE_RECORDS, len(self.split)), PICTURE_RECORDS)
        [batch] = self._loader(self.split).batches(iter([request]))
        with self.engine.averaged():
            return swapped(self.model.method, batch)[1]

    def _loader(self, split: Split) -> Loader:
        if split.name not in self._loaders:
            self._loaders[split.name] = self._open(split)
        return self._loaders[split.name]


def tables(named: tuple[str, ...], method: Method, judges: Sequence[Model]) -> tuple[str, ...]:
    """Return the tables that a run's validation makes: those that are named, else swaps and squared errors.
    Raises ValueError: a table that a run cannot have while it trains."""
    for table in named:
        if table not in ("swap", "fidelity", "leak"):
            raise ValueError(f"run.evaluate_tables: {table!r} is none of swap, fidelity, leak")
    if "swap" in named and not judges and evaluation.makes_pictures(method):
        raise ValueError("run.evaluate_tables names swap, which needs a judge: name one with judge=RUN")
    usual = (*(("swap",) if judges else ()), *(("error",) if models.editor(method) else ()))
    return named or (usual if evaluation.makes_pictures(method) else ("swap",))


def named_judges(experiment: Experiment) -> tuple[Model, ...]:
    """Load the judges that an experiment names, if its validation needs them.
    Raises ValueError: one has the seed of the experiment, whether it is needed now or only later; or it cannot be loaded."""
    needed = bool(experiment.run.evaluate_images)
    judges = tuple(models.load(address) for address in experiment.judges if needed or Path(address).exists())
    for judge in judges:
        models.check_independent(judge, experiment.seed, experiment.name)
    return judges if needed else ()
