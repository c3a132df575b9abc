"""The report of one model as a page: a single HTML file with every picture inside it, and the same pictures as PNGs.

It looks again at the first records of the split, so that pages of several runs show the same faces: sweeps of every
slider, and the swaps of which the judge is surest and least sure. Curves come from the run's own tracking spool.
"""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fader.method import Batch, Encodes, Judges
from pipeline import tracking
from pipeline.evaluation.labels import slider_values
from pipeline.evaluation.measure import JudgedBy, decoded, evaluating
from pipeline.evaluation.report import SLIDER_POSITIONS, Report, Score, Table, as_tables
from pipeline.files import file_name, write_whole
from pipeline.images import png_bytes, to_uint8
from pipeline.loading.pillow import PillowLoader
from pipeline.loading.plan import sequential

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.data.shards import Split
    from pipeline.models import Model

SWEPT_FACES = 6
JUDGED_RECORDS = 256
SIDE_BY_SIDE = 6  # best and worst cases of an attribute, each
MOST_SLIDERS = 16  # pictures of sweeps and of cases: a page of 40 attributes would be too heavy to open
_CELL = 128  # pixels a side at most, in pictures of many
_COLOURS = {"real": "#9aa5b1", "reconstruction": "#7fb2d6", "swap": "#1f5f99"}


@dataclass(frozen=True)
class Picture:
    """A PNG with its name (of the file) and what it shows."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class _Case:
    """One swap as the judge sees it: before and after uint8 [S, S, C], and the probability of what was asked for."""

    key: str
    before: np.ndarray
    after: np.ndarray
    probability: float


def write(
    report: Report,
    model: Model,
    judge: Model | None,
    split: Split,
    folder: Path,
    *,
    run: Path | None = None,
    device: torch.device | str = "cpu",
    threads: int = 2,
    batch_size: int = 64,
    variant: str = "",
) -> Path:
    """Write `report-SPLIT.html` into a folder and its pictures into `report-SPLIT/` beside it.

    Args:
        report: what `evaluate` found for this model on this split.
        judge: who judged; None leaves best and worst cases out.
        run: the run's folder, for its curves and config; None leaves the curves out.
        variant: which of the run's weights, for the names; see `registry.Model`.

    Returns:
        The page.

    Raises:
        ValueError: as the loader does.
    """
    sections = _sections(report, model, judge, split, run, torch.device(device), threads, batch_size)
    part = f"-first-{report.records}" if report.records < report.split_records else ""
    name = f"report-{report.split}{variant}{part}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    for _, pictures, _ in sections:
        for picture in pictures:
            (folder / name / f"{picture.name}.png").write_bytes(picture.png)
    return write_whole(folder / f"{name}.html", _html(report, model, sections, _config(model, run)))


_Section = tuple[str, list[Picture], str]


def _sections(
    report: Report,
    model: Model,
    judge: Model | None,
    split: Split,
    run: Path | None,
    device: torch.device,
    threads: int,
    batch_size: int,
) -> list[_Section]:
    """The page's pictures under their titles, each with a note."""
    found: list[_Section] = []
    if report.scores:
        about = "Balanced accuracy of the judge's answers, 95% intervals; dotted: 0.9, the aim for swaps"
        bars = [Picture("accuracy", about, _accuracy(report))]
        if report.sliders:
            about = "The judge's mean probability along each slider"
            bars.append(Picture("sliders", about, _responses(report)))
        found.append(("At a glance", bars, ""))
    if isinstance(model.method, Encodes):
        sweeps = _sweeps(model, split, device, threads)
        number = min(SWEPT_FACES, len(split))
        note = (
            f"The first {number} records of the split, the same for every model: the picture, its "
            "reconstruction, then the slider from one end to the other; -1 is absent, 1 is present."
        )
        found.append(("Sweeps", sweeps, note + _left_out(len(list(slider_values(model.attributes))), "sliders")))
    if judge is not None or isinstance(model.method, Judges):
        cases = _cases(model, judge or model, split, device, threads, batch_size, report.records)
        swapped = isinstance(model.method, Encodes)
        what = "the value a swap asked for (above the picture, below the swap)" if swapped else "the label"
        note = (
            f"By the judge's probability of {what}, over the first {min(JUDGED_RECORDS, report.records):,} records: "
            "the lowest on the left, the highest on the right."
        )
        title = "Worst and best swaps" if swapped else "Worst and best judged"
        found.append((title, cases, note + _left_out(len(model.attributes), "attributes")))
    found.append(_curve_section(run))
    if len(model.attributes):
        about = f"Records of the {split.name} split with each value, and their share of the known"
        found.append(("Attributes", [Picture("attributes", about, _histogram(model, split))], ""))
    return found


def _left_out(number: int, what: str) -> str:
    return f" Only the first {MOST_SLIDERS} of {number} {what} are shown." if number > MOST_SLIDERS else ""


# --- pictures of faces ------------------------------------------------------------------------------------------------


def _batches(
    model: Model, split: Split, records: int, batch_size: int, device: torch.device, threads: int
) -> list[Batch]:
    """The first records of a split as the model reads them."""
    loader = PillowLoader(split, model.attributes, model.preprocessing, seed=0, device=device, threads=threads)
    return list(loader.batches(sequential(min(records, len(split)), batch_size)))


def _pixels(images: Tensor) -> np.ndarray:
    """[N, C, S, S] in [-1, 1] to uint8 [N, S', S', 3], shrunk where many stand side by side."""
    arrays = to_uint8(images).cpu().numpy()
    arrays = np.repeat(arrays, 3, -1) if arrays.shape[-1] == 1 else arrays
    if arrays.shape[1] <= _CELL:
        return arrays
    return np.stack([np.asarray(Image.fromarray(a).resize((_CELL, _CELL), Image.Resampling.BOX)) for a in arrays])


def _sheet(rows: Sequence[Sequence[np.ndarray | None]], above: Sequence[str], gaps: Sequence[int] = ()) -> bytes:
    """Cells [S, S, 3] in rows with a line of words above each column; None leaves a cell blank; a gap before some."""
    size = next(cell.shape[0] for row in rows for cell in row if cell is not None)
    zoom = 2 if size <= 64 else 1
    side, gap = size * zoom, 4
    letters = max(12, side // 7)
    line = letters + 8
    lefts = [gap + i * (side + gap) + 20 * sum(g <= i for g in gaps) for i in range(len(above))]
    sheet = Image.new("RGB", (lefts[-1] + side + gap, line + len(rows) * (side + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(letters)
    for left, words in zip(lefts, above):
        pen.text((left + side / 2, line / 2), words, "#333", font=font, anchor="mm")
    for r, row in enumerate(rows):
        for left, cell in zip(lefts, row):
            if cell is not None:
                image = Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(image, (left, line + r * (side + gap)))
    return png_bytes(np.asarray(sheet))


def _sweeps(model: Model, split: Split, device: torch.device, threads: int) -> list[Picture]:
    """A sheet a slider: faces down, its positions across."""
    [batch] = _batches(model, split, SWEPT_FACES, SWEPT_FACES, device, threads)
    assert batch.images is not None
    method, attributes = model.method, model.attributes
    found = []
    with evaluating(method.networks.values()), torch.inference_mode():
        latent = method.encode(batch.images, batch.attributes)  # type: ignore[attr-defined]
        code = attributes.code(batch.attributes)
        own = [_pixels(batch.images), _pixels(decoded(method, latent, code))]
        for _, attribute, value, category in list(slider_values(attributes))[:MOST_SLIDERS]:
            columns = list(own)
            for position in SLIDER_POSITIONS:
                moved = attributes.with_slider(code, attribute.name, position, category)
                columns.append(_pixels(decoded(method, latent, moved)))
            name = attribute.name if category is None else f"{attribute.name}.{attribute.value_name(value)}"
            positions = [f"{position:+g}" if position else "0" for position in SLIDER_POSITIONS]
            above = ["picture", "reconstruction", *positions]
            found.append(Picture(f"sweep-{file_name(name)}", name, _sheet(list(zip(*columns)), above, gaps=(2,))))
    return found


def _cases(
    model: Model, judge: Model, split: Split, device: torch.device, threads: int, batch_size: int, records: int
) -> list[Picture]:
    """A sheet an attribute: pictures above their swaps, from the judge's lowest probability to its highest."""
    attributes, seer = model.attributes, JudgedBy(judge.method)
    columns = seer.columns(attributes)
    cases: dict[str, list[_Case]] = {attribute.name: [] for attribute in tuple(attributes)[:MOST_SLIDERS]}
    with evaluating([*model.method.networks.values(), *judge.method.networks.values()]), torch.inference_mode():
        for batch in _batches(model, split, min(JUDGED_RECORDS, records), batch_size, device, threads):
            images, labels = batch.images, batch.attributes
            assert images is not None
            keys = [str(split.keys[row]) for row in batch.index.tolist()]
            before = _pixels(images)
            for j, target, made in _made(model, images, labels):
                name = attributes[j].name
                if name not in cases:
                    continue
                label = attributes[j].hard(labels[:, j])
                block = seer.probabilities(made)[columns[j]]
                asked = block.gather(1, target.clamp(min=0)[:, None])[:, 0].tolist()
                after = _pixels(made)
                for i, known in enumerate((label >= 0).tolist()):
                    if known:
                        cases[name].append(_Case(keys[i], before[i], after[i], float(asked[i])))
                cases[name] = _extremes(cases[name])
    found = []
    for name, kept in cases.items():
        if kept:
            above = [f"{case.probability:.2f}" for case in kept]
            rows: list[list[np.ndarray | None]] = [[case.before for case in kept]]
            if isinstance(model.method, Encodes):
                rows.append([case.after for case in kept])
            ends = f"{name}; lowest: {', '.join(case.key for case in kept[:3])}"
            gaps = (SIDE_BY_SIDE,) if len(kept) > SIDE_BY_SIDE else ()
            found.append(Picture(f"cases-{file_name(name)}", ends, _sheet(rows, above, gaps)))
    return found


def _extremes(cases: list[_Case]) -> list[_Case]:
    """The lowest and the highest probabilities, rising; all when there are few."""
    cases = sorted(cases, key=lambda case: (case.probability, case.key))
    return cases if len(cases) <= 2 * SIDE_BY_SIDE else cases[:SIDE_BY_SIDE] + cases[-SIDE_BY_SIDE:]


def _made(model: Model, images: Tensor, labels: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(column, value asked for [N], pictures to judge) of every swap; of a judge, the pictures and their labels."""
    method, attributes = model.method, model.attributes
    if not isinstance(method, Encodes):
        return [(j, attribute.hard(labels[:, j]), images) for j, attribute in enumerate(attributes)]
    latent = method.encode(images, labels)
    shown = min(len(attributes), MOST_SLIDERS)
    return [
        (j, target, decoded(method, latent, attributes.code(changed)))
        for j, _, changed, target in attributes.swaps(labels)
        if j < shown
    ]


# --- plots ------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()


def _accuracy(report: Report) -> bytes:
    """Balanced accuracy of each attribute as bars with intervals: real pictures, reconstructions, swaps."""
    names = [*report.attributes(), "*"]
    kinds = [images for images in _COLOURS if any(score.images == images for score in report.scores)]
    figure, axes = _figure(max(5.0, 1.0 + 0.32 * len(names) * (1 + len(kinds))), 3.2)
    for k, images in enumerate(kinds):
        scores = [(i, s) for i, name in enumerate(names) for s in [_balanced(report, images, name)] if s is not None]
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
    return _png(figure)


def _balanced(report: Report, images: str, attribute: str) -> Score | None:
    try:
        score = report.score(images, attribute)
    except ValueError:
        return None
    return None if math.isnan(score.value) else score


def _responses(report: Report) -> bytes:
    figure, axes = _figure(5.5, 3.2)
    for slider in report.sliders:
        name = slider.attribute if slider.value == "1" else f"{slider.attribute}.{slider.value}"
        axes.plot(slider.positions, slider.response, marker="o", markersize=3, linewidth=1.4, label=name)
    axes.set(ylim=(-0.02, 1.02))
    axes.set_xlabel("slider (-1 absent, 1 present)", fontsize=8)
    axes.set_ylabel("judge's mean probability", fontsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _png(figure)


def _curve_section(run: Path | None) -> _Section:
    """Losses, λ and validation over images seen, from the run's spool."""
    if run is None or not (run / "spool" / "main.jsonl").is_file():
        return "Training", [], "There are no curves: the run was not tracked (tracking.enabled), or this is no run."
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in tracking.points(run):
        if not point.superseded and math.isfinite(point.value):
            curves.setdefault(point.name, []).append((point.step, point.value))
    panels = _panels(curves)
    if not panels:
        return "Training", [], "There are no curves: nothing was logged yet."
    from matplotlib.figure import Figure

    wide = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // wide)
    figure = Figure(figsize=(4.4 * wide, 2.7 * rows), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, wide, squeeze=False).flat, panels.items()):
        _plain(axes)
        for name in names:
            steps, values = zip(*sorted(curves[name], key=lambda point: point[0]))
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
    about = f"{len(curves)} quantities over images seen; what a resume superseded is left out"
    return "Training", [Picture("curves", about, _png(figure))], ""


_PANEL_NAMES = 10


def _panels(curves: Mapping[str, object]) -> dict[str, list[str]]:
    """Which quantities share axes: those of one network and kind, `network/quantity.ATTRIBUTE` together."""
    panels: dict[str, list[str]] = {}
    for name in curves:
        kind = name.split(".", 1)[0]
        last = kind.rsplit("/", 1)[-1]
        if last in ("skipped", "images_per_second", "updates", "attempt") or "_to_" in name.split(".", 1)[-1]:
            continue
        panels.setdefault("λ" if last == "lambda" else kind, []).append(name)
    order = ("loss", "mse", "fool", "λ", "accuracy", "swap_accuracy", "gradient_norm")

    def place(title: str) -> tuple[int, str]:
        last = title.rsplit("/", 1)[-1]
        return (order.index(last) if last in order else len(order)), title

    return {title: panels[title][:_PANEL_NAMES] for title in sorted(panels, key=place)}


def _histogram(model: Model, split: Split) -> bytes:
    """Records of the split that hold each value."""
    labels = torch.from_numpy(split.columns(model.attributes).copy()).float()
    rows = []
    for j, attribute in enumerate(model.attributes):
        label = attribute.hard(labels[:, j])
        known = int((label >= 0).sum())
        for value in attribute.values:
            name = f"{attribute.name} {attribute.value_name(value)}"
            rows.append((name, int((label == value).sum()), known, j))
    figure, axes = _figure(8, 0.8 + 0.22 * len(rows))
    shades = ["#3b6ea5" if j % 2 == 0 else "#7fa6cf" for *_, j in rows]
    axes.barh([name for name, *_ in rows], [count for _, count, *_ in rows], color=shades)
    for y, (_, count, known, _) in enumerate(rows):
        share = f"{count / known:.1%}" if known else "unknown"
        axes.text(count, y, f" {count:,} ({share})", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.set_xlabel("records", fontsize=8)
    axes.grid(axis="y", visible=False)
    return _png(figure)


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#22272c;background:#f4f6f8;margin:0}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:19px;margin:0 0 8px}h3{font-size:15px;margin:20px 0 4px}
section{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:18px 20px;margin:16px 0}
p,figcaption{color:#5a646e;margin:4px 0;font-size:13.5px}figure{margin:14px 0}figcaption b{color:#22272c}
img{max-width:100%;height:auto;display:block}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.card{background:#fff;border:1px solid #e1e5ea;border-radius:8px;padding:10px 16px;min-width:140px}
.card b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.card span{color:#5a646e;font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:12.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid #eceff2}
th:first-child,td:first-child{text-align:left}th{color:#5a646e;font-weight:600}
pre{font-size:12.5px;line-height:1.45;margin:0;overflow-x:auto}
.warning{background:#fff4e0;border:1px solid #f0d9a8;border-radius:6px;padding:6px 12px;margin:6px 0}
"""


def _html(report: Report, model: Model, sections: Sequence[_Section], config: str) -> str:
    say = html.escape
    seen = "" if report.images_seen is None else f" after {report.images_seen:,} images"
    name = (model.card.get("config") or {}).get("name") or report.model
    facts = [
        f"{report.method}, {report.image_size} pixels{seen}",
        f"{report.records:,} of {report.split_records:,} records of the {report.split} split "
        f"(digest {report.split_digest[:12]})",
        f"judged by {report.judge}" if report.judge else "no judge",
        f"commit {str(model.card['commit'])[:20]}" if model.card.get("commit") else "",
    ]
    body = [f"<h1>{say(str(name))}</h1>", f"<p>{say(report.model)} · {say(' · '.join(filter(None, facts)))}</p>"]
    body += [f'<div class="warning">{say(warning)}</div>' for warning in report.warnings]
    cards = "".join(f'<div class="card"><b>{say(n)}</b><span>{say(what)}</span></div>' for n, what in _headline(report))
    body.append(f'<div class="cards">{cards}</div>')
    blocks = [_block(*section) for section in sections]
    tables = "".join(_table(table) for table in as_tables([report]))
    blocks.insert(1 if report.scores else 0, f"<section><h2>Tables</h2>{tables}</section>")
    body += blocks
    body.append(f"<section><h2>Config</h2><pre>{say(config)}</pre></section>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{say(str(name))}</title>'
    page = "\n".join(body)
    head += f"<style>{_STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{page}</main></body></html>\n'


def _headline(report: Report) -> list[tuple[str, str]]:
    """What one looks at first."""
    cards = []
    for images, what in (("swap", "balanced swap accuracy"), ("real", "judge on real pictures")):
        score = _balanced(report, images, "*")
        if score is not None:
            cards.append((f"{score.value:.3f}", what))
    if "mse" in report.fidelity:
        cards.append((f"{report.fidelity['mse'].value:.4f}", "reconstruction MSE on [-1, 1]"))
        cards.append((f"{report.fidelity['psnr'].value:.1f} dB", "PSNR"))
    if report.leak:
        over = statistics.mean(leak.value - leak.chance for leak in report.leak)
        cards.append((f"{over:+.3f}", "leak: probe above chance, mean"))
    return cards


def _block(title: str, pictures: Sequence[Picture], note: str) -> str:
    parts = [f"<section><h2>{html.escape(title)}</h2>"]
    if note:
        parts.append(f"<p>{html.escape(note)}</p>")
    for picture in pictures:
        data = base64.b64encode(picture.png).decode()
        caption = html.escape(picture.caption)
        source = f"data:image/png;base64,{data}"
        parts.append(f'<figure><figcaption><b>{caption}</b></figcaption><img alt="{caption}" src="{source}"></figure>')
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(line(row, "td") for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    drawn = f'<div class="wide"><table>{line(table.header, "th")}{rows}</table></div>'
    return f"<h3>{html.escape(table.title)}</h3>{drawn}{note}"


def _config(model: Model, run: Path | None) -> str:
    """The resolved config as the run's file has it, else as lines of `key: value` from the card."""
    if run is not None and (run / "config.yaml").is_file():
        return (run / "config.yaml").read_text(encoding="utf-8")
    return "\n".join(_lines(model.card.get("config") or {}))


def _lines(tree: Mapping[str, object], indent: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            found.append(f"{indent}{key}: {value}")
    return found
