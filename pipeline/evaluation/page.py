"""The report of one model as a page: a single HTML file with every picture inside it, and the same pictures as PNGs."""

import base64
import html
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fader.method import Batch
from pipeline.data.shards import ShardSet, Split
from pipeline.evaluation import pictures, plots
from pipeline.evaluation.measure import OneProcess, Records, makes_pictures, pillow_loader
from pipeline.evaluation.pictures import JUDGED_RECORDS, MOST_SLIDERS, SWEPT_FACES, Picture
from pipeline.evaluation.presentation import Table, as_tables
from pipeline.evaluation.report import Report, slider_values
from pipeline.evaluation.specification import Specification
from pipeline.files import write_whole
from pipeline.models import Model, sampler


@dataclass(frozen=True)
class Section:
    """Some pictures of the page under their title, with a note above them."""

    title: str
    pictures: Sequence[Picture] = ()
    note: str = ""


def write(
    report: Report, model: Model, judge: Model | None, shards: ShardSet, folder: Path, specification: Specification
) -> Path:
    """Write `report-SPLIT.html`, which is returned, and its pictures into `report-SPLIT/` beside it, of what `evaluate`
    measured. judge: the first of those who judged; None leaves best and worst cases out."""
    split = shards.split(report.split)
    [first] = _batches(model, split, SWEPT_FACES, SWEPT_FACES, specification)
    above = list(_overview(report, model, first))
    below = [*_neighbours(model, shards.split("train"), first, specification)]
    below += _details(report, model, judge, split, first, specification)
    part = f"-first-{report.records}" if report.records < report.split_records else ""
    name = f"report-{report.split}{model.variant}{part}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    for section in [*above, *below]:
        for picture in section.pictures:
            (folder / name / f"{picture.name}.png").write_bytes(picture.png)
    return write_whole(folder / f"{name}.html", _html(report, model, above, below))


def _batches(model: Model, split: Split, records: int, batch_size: int, specification: Specification) -> list[Batch]:
    batches: list[Batch] = []
    reader = Records(batch_size, OneProcess(), pillow_loader(model, specification))
    reader.read(split, min(records, len(split)), batches.append)
    return batches


def _overview(report: Report, model: Model, first: Batch) -> Iterator[Section]:
    """Yield what stands above the tables: the swaps, because a reader should look before he reads numbers, and bars."""
    if makes_pictures(model.method):
        note = f"The first {len(first.index)} records of the split, the same for every model; each swap changes one attribute."
        yield Section("Swaps", [pictures.swap_sheet(model, first)], note)
    if report.scores:
        about = "Balanced accuracy by the lowest reader, 95% intervals; dotted: 0.9, the aim for swaps"
        bars = [Picture("accuracy", about, plots.accuracy(report))]
        if report.sliders:
            bars.append(Picture("sliders", "The judge's mean probability along each slider", plots.responses(report)))
        yield Section("At a glance", bars)


def _neighbours(model: Model, train: Split, first: Batch, specification: Specification) -> Iterator[Section]:
    """Yield samples beside training pictures, where the model samples."""
    if sampler(model.method) is None or not len(train):
        return
    count = min(pictures.SEARCHED, len(train))
    reader = Records(specification.batch_size, OneProcess(), pillow_loader(model, specification))
    note = f"Samples beside those of the first {count:,} training pictures that are nearest, pixel by pixel. A sample much "
    note += "nearer to one than real pictures of this split are was learned by heart."
    sheet = pictures.neighbour_sheet(model, first, lambda look: reader.read(train, count, look))
    yield Section("Nearest training pictures", [sheet], note)


def _details(
    report: Report, model: Model, judge: Model | None, split: Split, first: Batch, specification: Specification
) -> Iterator[Section]:
    """Yield what stands below the tables."""
    slides = makes_pictures(model.method)
    if slides:
        note = "The same records: the picture, its reconstruction, then the slider from one end to the other; -1 is absent, 1 is "
        note += "present." + _left_out(len(list(slider_values(model.attributes))), "sliders")
        yield Section("Sweeps", pictures.sweep_sheets(model, first), note)
    if judge is not None or not slides:
        records = min(JUDGED_RECORDS, report.records)
        batches = _batches(model, split, records, specification.batch_size, specification)
        what = "the value a swap asked for (above the picture, below the swap)" if slides else "the label"
        note = f"By the judge's probability of {what}, over the first {records:,} records: the lowest on the left, the highest "
        note += "on the right." + _left_out(len(model.attributes), "attributes")
        title = "Worst and best swaps" if slides else "Worst and best judged"
        yield Section(title, pictures.case_sheets(model, judge or model, split, batches), note)
    curves, about = plots.curves(model.run)
    yield Section("Training", [Picture("curves", about, curves)]) if curves else Section("Training", note=about)
    if len(model.attributes):
        about = f"Records of the {split.name} split with each value, and their share of the known"
        yield Section("Attributes", [Picture("attributes", about, plots.histogram(model, split))])


def _left_out(number: int, what: str) -> str:
    return f" Only the first {MOST_SLIDERS} of {number} {what} are shown." if number > MOST_SLIDERS else ""


def _html(report: Report, model: Model, above: Sequence[Section], below: Sequence[Section]) -> str:
    say = html.escape
    seen = "" if report.images_seen is None else f" after {report.images_seen:,} images"
    name = (model.card.get("config") or {}).get("name") or report.model
    facts = [f"{report.method}, {report.image_size} pixels{seen}", report.rests_on]
    facts.append(f"judged by {report.judge}" if report.judge else "no judge")
    facts += [f"commit {str(model.card['commit'])[:20]}"] if model.card.get("commit") else []
    body = [f"<h1>{say(str(name))}</h1>", f"<p>{say(report.model)} · {say(' · '.join(facts))}</p>"]
    verdicts = report.verdicts()
    body += [_warning(words) for words in report.warnings if words not in verdicts]
    cards = "".join(f'<div class="card"><b>{say(n)}</b><span>{say(what)}</span></div>' for n, what in _headline(report))
    pictured = [*map(_block, above)]
    first = 1 if makes_pictures(model.method) else 0  # a reader looks at the swaps before he reads a number
    body += [*pictured[:first], *map(_warning, verdicts), f'<div class="cards">{cards}</div>', *pictured[first:]]
    body.append(f"<section><h2>Tables</h2>{''.join(map(_table, as_tables([report])))}</section>")
    body += map(_block, below)
    if model.run is not None:
        config = (model.run / "config.yaml").read_text(encoding="utf-8")
        body.append(f"<section><h2>Config</h2><pre>{say(config)}</pre></section>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{say(str(name))}</title>'
    head += f"<style>{Path(__file__).with_suffix('.css').read_text()}</style>"
    page = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{page}</main></body></html>\n'


def _warning(words: str) -> str:
    return f'<div class="warning">{html.escape(words)}</div>'


def _headline(report: Report) -> list[tuple[str, str]]:
    cards = []
    for images, what in (("swap", "balanced swap accuracy, lowest reader"), ("real", "real pictures, lowest reader")):
        score = plots.balanced(report, images, "*")
        if score is not None:
            cards.append((f"{score.value:.3f}", what))
    if "mse" in report.fidelity:
        cards.append((f"{report.fidelity['mse'].value:.4f}", "reconstruction MSE on [-1, 1]"))
        cards.append((f"{report.fidelity['psnr'].value:.1f} dB", "PSNR"))
    if report.leak:
        over = statistics.mean(leak.value - leak.chance for leak in report.leak)
        cards.append((f"{over:+.3f}", "leak: probe above chance, mean"))
    return cards


def _block(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.note:
        parts.append(f"<p>{html.escape(section.note)}</p>")
    for picture in section.pictures:
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        caption = html.escape(picture.caption)
        parts.append(f'<figure><figcaption><b>{caption}</b></figcaption><img alt="{caption}" src="{source}"></figure>')
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "".join(line(row, "td") for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    drawn = f'<div class="wide"><table>{line(table.header, "th")}{rows}</table></div>'
    return f"<h3>{html.escape(table.title)}</h3>{drawn}{note}"
