"""Plots of the report's page, as PNGs."""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline import tracking
from pipeline.data.shards import Split
from pipeline.evaluation.report import Report, Score
from pipeline.models import Model

_COLOURS = {"real": "#9aa5b1", "reconstruction": "#7fb2d6", "sample": "#7fb2d6", "swap": "#1f5f99"}


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def png_of(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()


def accuracy(report: Report) -> bytes:
    """Plot the balanced accuracy of each attribute as bars with intervals, for each kind of picture."""
    names = [*report.attributes(), "*"]
    kinds = [images for images in _COLOURS if any(score.images == images for score in report.scores)]
    figure, axes = figure_of(max(5.0, 1.0 + 0.32 * len(names) * (1 + len(kinds))), 3.2)
    for k, images in enumerate(kinds):
        scores = [(i, s) for i, name in enumerate(names) for s in [balanced(report, images, name)] if s is not None]
        places = [i + (k - (len(kinds) - 1) / 2) * 0.26 for i, _ in scores]
        values = [s.value for _, s in scores]
        below, over = ([abs(s.value - getattr(s, end)) for _, s in scores] for end in ("low", "high"))
        axes.bar(places, values, 0.24, color=_COLOURS[images], label=images)
        axes.errorbar(places, values, [below, over], fmt="none", ecolor="#33383d", elinewidth=1, capsize=2)
    axes.axhline(0.9, color="#c0392b", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), ["mean" if name == "*" else name for name in names], fontsize=8)
    if len(names) > 8:
        axes.tick_params(axis="x", rotation=90)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("balanced accuracy", fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return png_of(figure)


def balanced(report: Report, images: str, attribute: str) -> Score | None:
    score = report.find(images, attribute)
    return None if score is None or math.isnan(score.value) else score


def responses(report: Report) -> bytes:
    figure, axes = figure_of(5.5, 3.2)
    for slider in report.sliders:
        axes.plot(slider.positions, slider.response, marker="o", markersize=3, linewidth=1.4, label=slider.name)
    axes.set(ylim=(-0.02, 1.02))
    axes.set_xlabel("slider (-1 absent, 1 present)", fontsize=8)
    axes.set_ylabel("judge's mean probability", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return png_of(figure)


def curves(run: Path | None) -> tuple[bytes | None, str]:
    """Plot losses, λ and validation over images seen from the run's spool; without curves the words say why."""
    if run is None or not (run / "spool" / "main.jsonl").is_file():
        return None, "There are no curves: the run was not tracked (tracking.enabled), or this is no run."
    points: dict[str, list[tuple[int, float]]] = {}
    for point in tracking.points(run):
        if not point.superseded and math.isfinite(point.value):
            points.setdefault(point.name, []).append((point.step, point.value))
    panels = _panels(points)
    if not panels:
        return None, "There are no curves: nothing was logged yet."
    from matplotlib.figure import Figure

    wide = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // wide)
    figure = Figure(figsize=(4.4 * wide, 2.7 * rows), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, wide, squeeze=False).flat, panels.items()):
        _plain(axes)
        for name in names:
            steps, values = zip(*sorted(points[name], key=lambda point: point[0]))
            label = name.split(".", 1)[1] if "." in name else "mean"
            axes.plot([step / 1000 for step in steps], values, linewidth=1.4, label=label,
                      marker="o" if len(steps) < 30 else None, markersize=2.5)  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("images seen, thousands", fontsize=8)
        if len(names) > 1:
            axes.legend(fontsize=6.5, frameon=False)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    return png_of(figure), f"{len(points)} quantities over images seen; what a resume superseded is left out"


_PANEL_NAMES = 10


def _panels(curves: Mapping[str, object]) -> dict[str, list[str]]:
    """Say which quantities share axes: those of one network and kind, `network/quantity.ATTRIBUTE` together."""
    panels: dict[str, list[str]] = {}
    for name in curves:
        kind = name.split(".", 1)[0]
        last = kind.rsplit("/", 1)[-1]
        if last in ("skipped", "images_per_second", "waiting_share", "updates", "attempt") or "_to_" in name.split(".", 1)[-1]:
            continue
        panels.setdefault("λ" if last == "lambda" else kind, []).append(name)
    order = ("loss", "mse", "fool", "λ", "accuracy", "swap_accuracy", "gradient_norm")

    def place(title: str) -> tuple[int, str]:
        last = title.rsplit("/", 1)[-1]
        return (order.index(last) if last in order else len(order)), title

    return {title: panels[title][:_PANEL_NAMES] for title in sorted(panels, key=place)}


def histogram(model: Model, split: Split) -> bytes:
    labels = torch.from_numpy(split.columns(model.attributes).copy()).float()
    rows = []
    for j, attribute in enumerate(model.attributes):
        label = attribute.hard(labels[:, j])
        names = [(f"{attribute.name} {attribute.value_name(value)}", value) for value in attribute.values]
        rows += [(name, int((label == value).sum()), int((label >= 0).sum()), j) for name, value in names]
    figure, axes = figure_of(8, 0.8 + 0.22 * len(rows))
    shades = ["#3b6ea5" if j % 2 == 0 else "#7fa6cf" for *_, j in rows]
    axes.barh([name for name, *_ in rows], [count for _, count, *_ in rows], color=shades)
    for y, (_, count, known, _) in enumerate(rows):
        share = f"{count / known:.1%}" if known else "unknown"
        axes.text(count, y, f" {count:,} ({share})", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.set_xlabel("records", fontsize=8)
    axes.grid(axis="y", visible=False)
    return png_of(figure)
