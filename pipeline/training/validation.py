"""Looking at a run while it trains: numbers on part of the validation split, the best checkpoint, when to stop.

Every rank takes its share of the looking and gets the same numbers, so all of them come to the same decision. What was
seen so far is a few plain numbers (`Standing.state`) that go into every checkpoint, so that a resumed run decides as an
unbroken one does.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fader.attributes import Attributes
from fader.method import Encodes, Judges, Method
from pipeline import evaluation, metrics
from pipeline.config import Experiment, RunConfig
from pipeline.data.shards import ShardSet, Split
from pipeline.engine import Engine
from pipeline.loading.loader import Loader
from pipeline.loading.plan import sequential
from pipeline.models import Model

BATCH_SIZE = 128


@dataclass(frozen=True)
class Best:
    """A look that was better than all before it: when, its metric's value, and its MSE where it has one."""

    images: int
    value: float
    mse: float | None


@dataclass(frozen=True)
class Looked:
    """What the newest look found, and at how many images seen; -1 before the first."""

    images: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)


class Standing:
    """The best look so far, and for how long none was better.

    A look is better than the best when its MSE is inside the bound and the best's is not, or when both are or both are
    not and its metric is better. The bound is `best_mse`, or `best_mse_factor` times the lowest MSE of any look so far: a
    run's own way of saying "no worse than". A best that the bound leaves behind gives way to the next that it does not.

    Args:
        settings: the run's; `best`, `best_mse`, `best_mse_factor`, `patience_metric` and `patience_images` are read.
        usual: the metric that an empty `best` means.
        known: the names that looks have; others are refused.

    Raises:
        ValueError: a metric that no look has.
    """

    def __init__(self, settings: RunConfig, usual: str, known: list[str]) -> None:
        self.metric = settings.best or usual
        self.patience_metric = settings.patience_metric or self.metric
        named = [("best", self.metric), ("patience_metric", self.patience_metric)]
        for key, name in (*named, *(("keep_best", metric) for metric in settings.keep_best)):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                there = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
                raise ValueError(f"run.{key}: validation finds no {name!r}; {there} (run.evaluate_tables adds more)")
        self.mse_at_most, self.mse_factor = settings.best_mse, settings.best_mse_factor
        self.patience_images = settings.patience_images
        self.best: Best | None = None
        self.lowest_mse = math.inf
        self.progress: float | None = None  # the best value of the patience's own metric
        self.progress_images: int | None = None

    @property
    def bound(self) -> float:
        """The MSE above which no look becomes the best while one below it is known."""
        if self.mse_at_most is not None:
            return self.mse_at_most
        return self.mse_factor * self.lowest_mse if self.mse_factor else math.inf

    def note(self, images: int, found: Mapping[str, float]) -> bool:
        """Take note of a look at so many images seen. Whether it is the best so far."""
        mse, value = found.get("mse"), found.get(self.metric)  # a value is missing where no record tells
        self.lowest_mse = min(self.lowest_mse, math.inf if mse is None else mse)
        look = None if value is None else Best(images, value, mse)
        better = look is not None and (self.best is None or self._rank(look) > self._rank(self.best))
        if better:
            self.best = look
        if self.patience_metric == self.metric:
            progress = better
        else:
            value = found.get(self.patience_metric)
            progress = value is not None and (
                self.progress is None or signed(self.patience_metric, value) > signed(self.patience_metric, self.progress)
            )
            self.progress = value if progress else self.progress
        if progress or self.progress_images is None:
            self.progress_images = images
        return better

    def _rank(self, look: Best) -> tuple[bool, float]:
        return look.mse is None or look.mse <= self.bound, signed(self.metric, look.value)

    def stalled(self, images: int) -> bool:
        """Whether the patience is at an end."""
        since = self.progress_images
        return bool(self.patience_images) and since is not None and images - since >= self.patience_images

    def about_best(self) -> dict[str, Any]:
        """What is kept beside the best checkpoint."""
        assert self.best is not None
        return {"metric": self.metric, **dataclasses.asdict(self.best)}

    def state(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "metric": self.metric,
            "best": self.best and dataclasses.asdict(self.best),
            "lowest_mse": self.lowest_mse if math.isfinite(self.lowest_mse) else None,
            "patience_metric": self.patience_metric,
            "progress": self.progress,
            "progress_images": self.progress_images,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave, from nothing where it is None; what rests on another metric begins anew."""
        state = state or {}
        self.best, self.lowest_mse, self.progress, self.progress_images = None, math.inf, None, None
        if state.get("lowest_mse") is not None:
            self.lowest_mse = state["lowest_mse"]
        if state.get("metric") == self.metric and state["best"]:
            self.best = Best(**state["best"])
        if state.get("patience_metric") == self.patience_metric:
            self.progress, self.progress_images = state["progress"], state["progress_images"]


def signed(name: str, value: float) -> float:
    """Higher is better."""
    return -value if metrics.lower_is_better(name) else value


# --- looking ----------------------------------------------------------------------------------------------------------


class Validation:
    """Measures the run's networks (their moving averages where they are kept, as `fader evaluate` takes them).

    Args:
        judge: says what an image shows; None leaves reconstructions only. A run that trains a judge needs none.
        shards: the set trained on; its validation split is looked at.
        open_loader: of the trainer: each rank gets its share of a batch.

    Raises:
        ValueError: the judge does not fit; a table that cannot be had; a metric that no look has; no validation split.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: Engine,
        judge: Model | None,
        shards: ShardSet,
        open_loader: Callable[[Split], Loader],
    ) -> None:
        self.experiment, self.engine, self.method, self.judge = experiment, engine, engine.method, judge
        run, attributes = experiment.run, engine.method.attributes
        self.split, self.train_split = shards.split("valid"), shards.split("train")
        self.records = min(run.evaluate_records, len(self.split))
        if not self.records:
            raise ValueError(f"{shards.path} has no validation records; set run.evaluate_images=0, or prepare it with some")
        if judge is not None:
            evaluation.check_judge(judge, attributes, experiment.data.preprocessing(), experiment.name)
            for network in judge.method.networks.values():
                network.to(engine.device)
        check_tables(run.evaluate_tables, self.method, judge)
        known = names(self.method, judge, run.evaluate_tables)
        usual = next((name for name in ("swap_accuracy", "judge_accuracy", *known) if name in known), None)
        if usual is None:
            raise ValueError(f"{self.method.name} neither reconstructs nor judges: set run.evaluate_images=0")
        self.standing = Standing(run, usual, known)
        self.loader = None if run.evaluate_tables else open_loader(self.split)

    def look(self, images: int) -> dict[str, float]:
        """The metrics now, named valid/…, the same on every rank. All ranks call it together."""
        with self.engine.averaged():
            if self.experiment.run.evaluate_tables:
                found = self._tables(images)
            else:
                assert self.loader is not None
                found = evaluation.quick(
                    self.method,
                    self.judge.method if self.judge else None,
                    self.loader.batches(sequential(self.records, BATCH_SIZE, "valid")),
                    reduce_sum=self.engine.reduce_sum,
                )
        return found

    def _tables(self, images: int) -> dict[str, float]:
        data = self.experiment.data
        card = {"images_seen": images}
        model = Model(self.method, card, self.method.attributes, data.preprocessing(), None, self.experiment.name)
        report = evaluation.evaluate(
            model,
            self.judge,
            self.split,
            device=self.engine.device,
            limit=self.records,
            tables=self.experiment.run.evaluate_tables,
            reduce_sum=self.engine.reduce_sum,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            seed=self.experiment.seed,
            probe_split=self.train_split,
            threads=data.threads,
        )
        return report.metrics()


def bare(found: Mapping[str, float]) -> dict[str, float]:
    """The same without the split's name."""
    return {name.partition("/")[2]: value for name, value in found.items()}


def check_tables(tables: tuple[str, ...], method: Method, judge: Model | None) -> None:
    """Raises ValueError for a table that a run cannot have while it trains."""
    for table in tables:
        if table not in ("swap", "fidelity", "leak"):
            raise ValueError(f"run.evaluate_tables: {table!r} is none of swap, fidelity, leak")
    if "swap" in tables and judge is None and isinstance(method, Encodes):
        raise ValueError("run.evaluate_tables names swap, which needs a judge: name one with judge=RUN")


def names(method: Method, judge: Model | None, tables: tuple[str, ...]) -> list[str]:
    """The metrics that a look may have, without the split's name."""
    attributes = method.attributes
    if not isinstance(method, Encodes):
        return [*_balanced("judge_accuracy", attributes)] if isinstance(method, Judges) else []
    if not tables:
        swaps = [*_accuracies("swap_accuracy", attributes, "_to"), *_balanced("judge_accuracy", attributes)]
        return ["mse", "psnr", *(swaps if judge else ())]
    found = []
    if "swap" in tables:
        found += [*_accuracies("swap_accuracy", attributes, "_to"), *_accuracies("reconstruction_accuracy", attributes)]
        found += _accuracies("judge_accuracy", attributes)
    if "fidelity" in tables:
        size = method.image_size
        least = (("mse", 1), ("psnr", 1), ("ssim", metrics.SSIM_FROM), ("ms_ssim", metrics.MS_SSIM_FROM))
        found += [name for name, smallest in least if size >= smallest]
        if judge:
            found += [f"{kind}.{name}" for kind in ("kept", "shift") for name in attributes.names]
            found += [f"monotonic.{name}" for name in attributes.names if attributes[attributes.index(name)].kind != "k-way"]
    return found + ([f"leak.{name}" for name in attributes.names] if "leak" in tables else [])


def _balanced(kind: str, attributes: Attributes) -> Iterator[str]:
    yield kind
    yield from (f"{kind}.{name}" for name in attributes.names)


def _accuracies(kind: str, attributes: Attributes, to: str = "") -> Iterator[str]:
    yield from _balanced(kind, attributes)
    for attribute in attributes:
        yield from (f"{kind}.{attribute.name}{to}_{attribute.value_name(value)}" for value in attribute.values)
