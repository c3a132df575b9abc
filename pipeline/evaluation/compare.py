"""Runs side by side: the settings in which they differ, their last losses, what their evaluations measured, and a plot."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import config, models, tracking
from pipeline.evaluation import plots
from pipeline.evaluation.presentation import Table

_PLACES = ("name", "run.", "tracking.")  # what differs between any two runs and decides nothing
_USUAL = ("mse", "psnr", "ssim", "swap_accuracy", "judge_accuracy", "leak")
_MSE, _SWAP = "mse", "swap_accuracy"


@dataclass(frozen=True)
class Compared:
    """What is known of one run: its config, flat; the newest of what its loop logged; an evaluation's numbers without the
    split's name; judge, split digest and number of records that these rest on; and intervals of what is plotted."""

    name: str
    settings: dict[str, str]
    losses: dict[str, float]
    metrics: dict[str, float]
    images_seen: int | None = None
    rests_on: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; None stands for what is not a number."""
        losses = {name: value if math.isfinite(value) else None for name, value in self.losses.items()}
        return {**asdict(self), "losses": losses}


def read(source: str, split: str = "test", report: Path | None = None) -> Compared:
    """Read a run by its folder, RUN@best or RUN@images-N. report: its evaluation, where that is not the split's usual one."""
    run, which = models.parse_source(source)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{source} is no run's folder (config.yaml)")
    variant = models.variant_of(run, which) if which else ""
    path = report or run / "report" / f"evaluation-{split}{variant}.json"
    settings = dict(tracking.flatten(config.load_run(run).to_dict()))
    losses: dict[str, float] = {}
    if (run / "spool" / "main.jsonl").is_file():
        losses = {point.name: point.value for point in tracking.points(run) if not point.superseded}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rests_on = {key: known[key] for key in ("judge", "split_digest", "records", "image_size") if key in known}
    if known.get("judge_digests"):  # a judge may have been trained anew where it lies, and lie in two places
        rests_on["judge"] = ", ".join(known["judge_digests"])
    metrics, intervals = (_of_split(known.get(what, {}), split) for what in ("metrics", "intervals"))
    return Compared(source, settings, losses, metrics, known.get("images_seen"), rests_on, intervals)


def _of_split(metrics: Mapping[str, Any], split: str) -> dict[str, Any]:
    return {name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")}


def warnings(runs: Sequence[Compared], split: str) -> list[str]:
    without = [run.name for run in runs if not run.metrics]
    words = [f"{name} was not evaluated on the {split} split: run 'fader evaluate'" for name in without]
    kinds = {"judge": "judges", "split_digest": "records", "records": "numbers of records", "image_size": "sizes of pictures"}
    for key, what in kinds.items():
        if len({run.rests_on[key] for run in runs if key in run.rests_on}) > 1:
            words.append(f"the evaluations rest on different {what}: their numbers are not comparable")
    return words


def as_tables(runs: Sequence[Compared], split: str = "test") -> list[Table]:
    """Settings that differ, last losses, and evaluated numbers; a row each, a column a run."""
    header = ["", *names(runs)]
    keys = dict.fromkeys(key for run in runs for key in run.settings if not key.startswith(_PLACES))
    settings = [[key, *(run.settings.get(key, "–") for run in runs)] for key in keys]
    settings = [row for row in settings if len(set(row[1:])) > 1]
    quiet = ("skipped", "attempt", "updates")
    losses = [name for name in _named(runs, lambda run: run.losses) if not name.split(".")[0].endswith(quiet)]
    loss_rows = [[name, *(_number(run.losses.get(name)) for run in runs)] for name in losses if "_to_" not in name]
    metrics = sorted(_named(runs, lambda run: run.metrics), key=_place)
    metric_rows = [[name, *(_number(run.metrics.get(name)) for run in runs)] for name in metrics]
    seen = [["images_seen", *("–" if run.images_seen is None else f"{run.images_seen:,}" for run in runs)]]
    tables = [
        Table("Settings that differ", header, settings, "" if settings else "None, names and places apart."),
        Table("Last logged", header, loss_rows, "" if loss_rows else "None: these runs were not tracked."),
        Table(f"Evaluated on the {split} split", header, [*seen, *metric_rows] if metric_rows else [], ""),
    ]
    return [table for table in tables if table.rows or table.note]


def names(runs: Sequence[Compared]) -> list[str]:
    """What the runs are called: the last part of their folders while that tells them apart."""
    short = [run.name.rstrip("/").rsplit("/", 1)[-1] for run in runs]
    return short if len(set(short)) == len(short) else [run.name for run in runs]


def _named(runs: Sequence[Compared], of: Callable[[Compared], Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in of(run)))


def _place(name: str) -> tuple[int, bool, str]:
    """Usual numbers first, each whole before its attributes, directions after them."""
    kind, _, rest = name.partition(".")
    return (_USUAL.index(kind) if kind in _USUAL else len(_USUAL)), "_to_" in rest, name


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def plot(runs: Sequence[Compared], split: str = "test") -> bytes | None:
    """PNG: reconstruction MSE across, balanced swap accuracy up, a point a run; None when no run has both."""
    placed = [(name, run) for name, run in zip(names(runs), runs) if {_MSE, _SWAP} <= run.metrics.keys()]
    if not placed:
        return None
    figure, axes = plots.figure_of(6.4, 4.4)
    for name, run in placed:
        x, y = run.metrics[_MSE], run.metrics[_SWAP]
        low, high = run.intervals.get(_SWAP, (y, y))
        left, right = run.intervals.get(_MSE, (x, x))
        axes.errorbar([x], [y], [[y - low], [high - y]], [[x - left], [right - x]], fmt="o", capsize=2, elinewidth=1)
        axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.axhline(0.9, color="#c0392b", linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 1.02), xlabel=f"reconstruction MSE on [-1, 1], {split} split", ylabel="balanced swap accuracy")
    axes.set_title("What a swap costs: up and left is better", fontsize=10)
    axes.margins(x=0.15)
    return plots.png_of(figure)
