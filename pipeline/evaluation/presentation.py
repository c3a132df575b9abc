"""Reports as tables for people: on a terminal, in Markdown and on the report's page."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.evaluation import published
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Leak, Measure, Report, Score

_COLUMNS = 8  # values side by side in a table of directions


@dataclass(frozen=True)
class Table:
    """A table as text: Markdown, a terminal and a page draw it alike."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def _number(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(number: Score | Measure | Leak | None, digits: int = 3) -> str:
    if number is None or math.isnan(number.value):
        return "–"
    interval = "" if math.isnan(number.low) else f" ({number.low:.{digits}f}–{number.high:.{digits}f})"
    return f"{number.value:.{digits}f}{interval}"


def as_tables(reports: Sequence[Report]) -> list[Table]:
    """Everything in some reports as tables, side by side where several speak of the same."""
    tables = [_summary(reports), _readers(reports), *_directions(reports), *_published(reports)]
    tables += [_fidelity(reports), _truth(reports), _preservation(reports), _sliders(reports)]
    tables += [_leak(reports), _distances(reports), _conditional(reports), _cost(reports)]
    return [table for table in tables if table.rows]


def _of_models(
    reports: Sequence[Report], title: str, header: Sequence[str], rows_of: Callable[[Report], Iterable[Sequence[str]]], note: str
) -> Table:
    rows = [[model, *row] for model, report in _labelled(reports) for row in rows_of(report)]
    return Table(title, ["model", *header], rows, note)


def _labelled(reports: Sequence[Report]) -> list[tuple[str, Report]]:
    """Return each report with the name of its rows: the source, or its last part while that tells them apart."""
    short = [report.model.rstrip("/").rsplit("/", 1)[-1] for report in reports]
    if len(set(short)) < len(short):
        short = [report.model for report in reports]
    return list(zip(short, reports))


def _rows_of(reports: Sequence[Report]) -> list[tuple[str, Report, str]]:
    """Return the rows of table 1: real images once a judge and split, then each model's own pictures and swaps."""
    rows, seen = [], set()
    for name, report in _labelled(reports):
        key = (report.judge, report.split, report.split_digest, report.records, tuple(report.attributes()))
        if report.scores and key not in seen:
            seen.add(key)
            rows.append(("real", report, "real"))
        for images in IMAGES[1:]:
            if any(score.images == images for score in report.scores):
                rows.append((f"{name} {images}", report, images))
    return rows


def _cell(report: Report, images: str, attribute: str, to: str | None = None, start: str | None = None) -> str:
    return _with_interval(report.find(images, attribute, to, start))


def _all_attributes(reports: Sequence[Report]) -> list[str]:
    return list(dict.fromkeys(name for report in reports for name in report.attributes()))


def _swapped(reports: Sequence[Report]) -> bool:
    return any(score.images == "swap" for report in reports for score in report.scores)


def _summary(reports: Sequence[Report]) -> Table:
    names = _all_attributes(reports)
    rows = [
        [row, *(_cell(report, images, name) for name in names), _cell(report, images, "*")]
        for row, report, images in _rows_of(reports)
    ]
    note = "Each number is the lowest of the readers', so that a mean may lie above the lowest directions that it is of: "
    note += "balanced accuracy (95% bootstrap interval), the mean over values of the share read as labelled"
    if _swapped(reports):
        note += "; for a swap the mean over ordered pairs of values of the share read as asked for, among the records that "
        note += "have the other value"
    title = "1. Does it slide?" if _swapped(reports) else "1. The judge on real images"
    return Table(title, ["images", *names, "mean"], rows, note + ".")


def _readers(reports: Sequence[Report]) -> Table:
    """What each reader of a panel reads, swaps beside real pictures, and what follows from their differences."""
    names, rows, words = _all_attributes(reports), [], []
    for model, report in _labelled(reports):
        images = "swap" if _swapped([report]) else "real"
        for reader in report.readers:
            known = {(s.images, s.attribute): s.value for s in report.readings if s.reader == reader and s.to is None}
            cells = (
                " / ".join(_number(known[kind, name]) for kind in dict.fromkeys((images, "real")) if (kind, name) in known)
                for name in (*names, "*")
            )
            rows.append([model, reader, *(cell or "–" for cell in cells)])
        words += [f"{model}: {verdict}." for verdict in report.verdicts()]
    note = "Balanced accuracy of each reader, swaps / real pictures. A judge looks at a picture as it is, and slightly blurred."
    return Table("The readers", ["model", "reader", *names, "mean"], rows, " ".join([note, *words]))


def _directions(reports: Sequence[Report]) -> Iterator[Table]:
    """Every value of every attribute, some columns a table; then every pair where there are more than two values."""
    values: dict[str, list[str]] = {}
    for name in _all_attributes(reports):
        scores = [s for report in reports for s in report.scores if s.attribute == name and s.to is not None]
        values[name] = list(dict.fromkeys(s.to for s in scores if s.to is not None))
    chunks: list[list[tuple[str, str]]] = [[]]
    for name, own in values.items():
        if chunks[-1] and len(chunks[-1]) + len(own) > _COLUMNS:
            chunks.append([])
        chunks[-1] += [(name, value) for value in own]
    for i, chunk in enumerate(chunks):
        rows = []
        for row, report, images in _rows_of(reports):
            if images == "real":
                counts = {(s.attribute, s.to): f"{s.records:,}" for s in report.scores if s.images == "real"}
                rows.append(["records", *(counts.get(column, "–") for column in chunk)])
            rows.append([row, *(_cell(report, images, name, value) for name, value in chunk)])
        names = dict.fromkeys(name for name, _ in chunk)
        first = reports[0]
        about_judge = {"plain accuracy": first.plain, "AUC": first.auc, "calibration error": first.calibration}
        note = "Of the records labelled with a value, the share read as having it"
        note += "; of the records swapped to it, the share read as having it." if _swapped(reports) else "."
        for what, known in about_judge.items():
            if numbers := [f"{n} {known[n]:.3f}" for n in names if not math.isnan(known.get(n, math.nan))]:
                note += f" The first reader's {what} on real images: {', '.join(numbers)}."
        title = "Each direction" + (f", {i + 1} of {len(chunks)}" if len(chunks) > 1 else "")
        yield Table(title, ["images", *(f"{name} {value}" for name, value in chunk)], rows if chunk else [], note)
    for name, own in values.items():
        if len(own) > 2:
            rows = [
                [row, start, *(_cell(report, images, name, to, start) for to in own)]
                for row, report, images in _rows_of(reports)
                if images == "swap"
                for start in own
            ]
            yield Table(f"{name}, each pair", ["images", "from", *(f"to {value}" for value in own)], rows)


def _published(reports: Sequence[Report]) -> Iterator[Table]:
    """Yield what others published of the same attributes: people's verdicts, and a classifier's of thirteen attributes."""
    names = [name for name in published.RATERS["Real Image"] if name in _all_attributes(reports)]
    header = ["images", *(f"{name} {what}" for name in names for what in ("naturalness", "accuracy"))]
    rows = [[row, *(f"{number:.1f}" for name in names for number in cells[name])] for row, cells in published.RATERS.items()]
    title, digits = "As published, in percent", (2, 2, 2, 3)
    yield Table(title, header, rows if names and _swapped(reports) else [], f"{published.RATERS_SOURCE}.")
    numbers = dict(published.EDITORS)
    for name, report in _labelled(reports):
        if published.THIRTEEN <= set(report.attributes()) and _swapped([report]):
            measured = (report.fidelity[m].value if m in report.fidelity else math.nan for m in ("psnr", "ssim"))
            means = (fmean(report.score(images, one).value for one in published.THIRTEEN) for images in ("real", "swap"))
            numbers[name] = (*(100 * mean for mean in means), *measured)
    rows = [[name, *(_number(n, d) for n, d in zip(row, digits))] for name, row in numbers.items()]
    header = ["model", "real, %", "swaps, %", "PSNR, dB", "SSIM"]
    ours = len(numbers) > len(published.EDITORS)
    yield Table(f"{title}: thirteen attributes", header, rows if ours else [], f"{published.EDITORS_SOURCE}.")


def _fidelity(reports: Sequence[Report]) -> Table:
    names = list(dict.fromkeys(name for report in reports for name in report.fidelity))
    called = {"mse": "MSE on [-1, 1]", "psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
    digits = {"mse": 5, "psnr": 2}

    def rows_of(report: Report) -> list[list[str]]:
        return [[_with_interval(report.fidelity.get(name), digits.get(name, 3)) for name in names]] if report.fidelity else []

    note = "Reconstructions against the images they are of; means over records of each image's number."
    return _of_models(reports, "2. Fidelity of reconstructions", [called[name] for name in names], rows_of, note)


def _truth(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for t in report.truth:
            outside = [_number(measure.value, 5) for measure in (t.outside, t.reconstruction_outside)]
            yield [t.attribute, f"{t.start} → {t.to}", _with_interval(t.inside), *outside, f"{t.records:,}"]

    note = (
        "Against the picture drawn with the attribute changed; no judge is asked. inside: where photo and twin differ by more "
        "than 8 grey levels, squared error over that of doing nothing: 0 = the twin, 1 = nothing done. outside: mean squared "
        "error against the photo, beside the reconstruction's."
    )
    header = ["swapped", "to", "inside", "outside", "reconstruction outside", "records"]
    return _of_models(reports, "The truth, without a judge", header, rows_of, note)


def _preservation(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for p in report.preservation:
            yield [p.attribute, _number(p.kept), _number(p.shift), f"{p.most_moved} ({_number(p.most_moved_shift)})"]

    note = (
        "kept: share of the other judged attributes whose judged value stays under a swap, against the reconstruction. "
        "shift: mean total variation distance of the probabilities; both by the first reader."
    )
    header = ["swapped", "kept", "shift", "moves most"]
    return _of_models(reports, "What a swap does to the other attributes", header, rows_of, note)


def _sliders(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for slider in report.sliders:
            effective = f"{_number(slider.effective_from, 2)} … {_number(slider.effective_to, 2)}"
            responses = (_number(response, 2) for response in slider.response)
            yield [slider.name, *responses, _number(slider.monotonic), effective]

    counts = {slider.records for report in reports for slider in report.sliders}
    note = (
        f"The first reader's mean probability at each slider position, over the first {max(counts, default=0):,} records. "
        "monotonic: share of records that rise by more than 0.05 and never fall by more than 0.01 between positions. "
        "effective: where the middle 80% of the mean rise takes place."
    )
    header = ["slider", *(f"{position:g}" for position in SLIDER_POSITIONS), "monotonic", "effective"]
    return _of_models(reports, "The judge along the slider", header, rows_of, note)


def _leak(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for leak in report.leak:
            counts = [f"{leak.probe_records:,}", f"{leak.records:,}"]
            yield [leak.attribute, _with_interval(leak), _number(leak.chance), leak.probe, *counts]

    note = "Balanced accuracy of a fresh probe on frozen latents: chance when the latent tells nothing, 1 when all."
    header = ["attribute", "probe accuracy", "chance", "probe", "learnt from", "tested on"]
    return _of_models(reports, "3. Leak", header, rows_of, note)


def _distances(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for d in report.distances:
            made, real = (f" {d.attribute} to {d.to}", f" {d.attribute} {d.to}") if d.attribute else ("", "")
            kid = "–" if math.isnan(d.kid) else f"{d.kid:.5f} ± {d.kid_std:.5f}"
            yield [d.images + made, "real" + real, _number(d.fid), kid, f"{d.records:,}", f"{d.real_records:,}"]

    note = _features_note(reports) + "KID: mean ± standard deviation over 100 subsets of at most 1,000."
    header = ["images", "against", "FID", "KID", "images", "real images"]
    return _of_models(reports, "4. Distribution", header, rows_of, note)


def _conditional(reports: Sequence[Report]) -> Table:
    def rows_of(report: Report) -> Iterator[list[str]]:
        for c in report.conditional:
            numbers = map(_number, (c.inception, c.between, c.within, c.bcfid, c.wcfid))
            yield [c.images, " + ".join(c.classes), f"{c.num_classes}", f"{c.records:,}", *numbers]

    note = (
        "A class is a joint value of the named attributes; a swap is of the class it was asked for, every other image "
        "of the class it is labelled. IS = BCIS · WCIS, of the judge's probabilities of the classes. BCFID and WCFID "
        "weigh classes alike, over those with two images on both sides. " + _features_note(reports)
    )
    header = ["images", "classes by", "classes", "images", "IS", "BCIS", "WCIS", "BCFID", "WCFID"]
    return _of_models(reports, "Distribution by class", header, rows_of, note.strip())


def _features_note(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(report.features for report in reports if report.features))
    return f"Features: {'; '.join(names)}. " if names else ""


def _cost(reports: Sequence[Report]) -> Table:
    verbs = [verb for verb in ("encode", "decode", "sample") if any(f"{verb}_flops" in report.cost for report in reports)]

    def rows_of(report: Report) -> Iterator[list[str]]:
        if cost := report.cost:
            row = [", ".join(f"{name} {count:,}" for name, count in cost["parameters"].items())]
            for verb in verbs:
                there = f"{verb}_flops" in cost
                row.append(f"{cost[f'{verb}_flops'] / 1e9:.3f}" if there else "–")
                row.append(f"{cost[f'{verb}_images_per_second']:,.0f}" if there else "–")
            yield [*row, f"{cost['device']}, {cost['threads']} threads, batch {cost['batch_size']}"]

    header = ["parameters", *(f"{verb} {what}" for verb in verbs for what in ("GFLOP", "images/s")), "on"]
    note = "GFLOP of one image in convolutions and matrix products, a multiply and an add counted as two."
    return _of_models(reports, "5. Cost", header, rows_of, note)


def markdown(reports: Sequence[Report]) -> str:
    """All tables of some reports as Markdown, with what they rest on and every warning above them."""
    lines = ["# Evaluation", ""]
    for report in reports:
        judged = f", judged by {report.judge}" if report.judge else ""
        seen = "" if report.images_seen is None else f", after {report.images_seen:,} images"
        lines.append(
            f"- {report.model} ({report.method}, {report.image_size} pixels{seen}): {report.rests_on}{judged}, seed {report.seed}"
        )
        lines += [f"  - **{warning}**" for warning in report.warnings]
    return "\n".join(lines) + "\n" + as_markdown(as_tables(reports))


def as_markdown(tables: Sequence[Table]) -> str:
    lines: list[str] = []
    for table in tables:
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(table.header) + " |")
        lines.append("|" + " --- |" * len(table.header))
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        if table.note:
            lines += ["", table.note]
    return "\n".join(lines) + "\n"
