"""Reports as tables for people: on a terminal, in Markdown and on the report's page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation import published
from pipeline.evaluation.report import IMAGES, SLIDER_POSITIONS, Report

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


def _with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "–"
    interval = "" if math.isnan(low) else f" ({low:.{digits}f}–{high:.{digits}f})"
    return f"{value:.{digits}f}{interval}"


def as_tables(reports: Sequence[Report]) -> list[Table]:
    """Everything in some reports as tables, side by side where several speak of the same."""
    tables = [_summary(reports), _readers(reports), *_directions(reports), *_published(reports)]
    tables += [_fidelity_table(reports), _truth_table(reports), _preservation_table(reports), _slider_table(reports)]
    tables += [_leak_table(reports), _distance_table(reports), _conditional_table(reports), _cost_table(reports)]
    return [table for table in tables if table.rows]


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
    for s in report.scores:
        if (s.images, s.attribute, s.to, s.start) == (images, attribute, to, start):
            return _with_interval(s.value, s.low, s.high)
    return "–"


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
    note = (
        "Each number is the lowest of the readers': balanced accuracy (95% bootstrap interval), the mean over values of the "
        "share read as labelled"
    )
    if _swapped(reports):
        note += (
            "; for a swap the mean over ordered pairs of values of the share read as "
            "asked for, among the records that have the other value"
        )
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
    title, seen, measures = "As published, in percent", _swapped(reports), ("psnr", "ssim")
    yield Table(title, header, rows if names and seen else [], f"{published.RATERS_SOURCE}.")
    ours = [
        [name, *(_number(100 * r.score(images).value, 2) for images in ("real", "swap")), *(_measured(r, m) for m in measures)]
        for name, r in _labelled(reports)
        if published.THIRTEEN <= set(r.attributes()) and _swapped([r])
    ]
    digits = (2, 2, 2, 3)
    rows = [[name, *(_number(n, d) for n, d in zip(row, digits))] for name, row in published.EDITORS.items()]
    header = ["model", "real, %", "swaps, %", "PSNR, dB", "SSIM"]
    yield Table(f"{title}: thirteen attributes", header, [*rows, *ours] if ours else [], f"{published.EDITORS_SOURCE}.")


def _measured(report: Report, name: str) -> str:
    measure = report.fidelity.get(name)
    return _number(measure.value, 3 if name == "ssim" else 2) if measure else "–"


def _fidelity_table(reports: Sequence[Report]) -> Table:
    names = list(dict.fromkeys(name for report in reports for name in report.fidelity))
    title = {"mse": "MSE on [-1, 1]", "psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
    digits = {"mse": 5, "psnr": 2}
    rows = []
    for model, report in _labelled(reports):
        if report.fidelity:
            cells = []
            for name in names:
                m = report.fidelity.get(name)
                cells.append(_with_interval(m.value, m.low, m.high, digits.get(name, 3)) if m else "–")
            rows.append([model, *cells])
    note = "Reconstructions against the images they are of; means over records of each image's number."
    return Table("2. Fidelity of reconstructions", ["model", *(title[name] for name in names)], rows, note)


def _truth_table(reports: Sequence[Report]) -> Table:
    rows = []
    for model, report in _labelled(reports):
        for t in report.truth:
            inside = _with_interval(t.inside.value, t.inside.low, t.inside.high)
            outside = [_number(measure.value, 5) for measure in (t.outside, t.reconstruction_outside)]
            rows.append([model, t.attribute, f"{t.start} → {t.to}", inside, *outside, f"{t.records:,}"])
    note = (
        "Against the same face drawn with the attribute changed; no judge is asked. inside: where photo and twin differ by more "
        "than 8 grey levels, squared error over that of doing nothing: 0 = the twin, 1 = nothing done. outside: mean squared "
        "error against the photo, beside the reconstruction's."
    )
    header = ["model", "swapped", "to", "inside", "outside", "reconstruction outside", "records"]
    return Table("The truth, without a judge", header, rows, note)


def _preservation_table(reports: Sequence[Report]) -> Table:
    rows = [
        [model, p.attribute, _number(p.kept), _number(p.shift), f"{p.most_moved} ({_number(p.most_moved_shift)})"]
        for model, report in _labelled(reports)
        for p in report.preservation
    ]
    note = (
        "kept: share of the other judged attributes whose judged value stays under a swap, against the reconstruction. "
        "shift: mean total variation distance of the probabilities; both by the first reader."
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
        for model, report in _labelled(reports)
        for slider in report.sliders
    ]
    counts = {slider.records for report in reports for slider in report.sliders}
    note = (
        f"The first reader's mean probability at each slider position, over the first {max(counts, default=0):,} records. "
        "monotonic: share of records that rise by more than 0.05 and never fall by more than 0.01 between positions. "
        "effective: where the middle 80% of the mean rise takes place."
    )
    header = ["model", "slider", *(f"{position:g}" for position in SLIDER_POSITIONS), "monotonic", "effective"]
    return Table("The judge along the slider", header, rows, note)


def _leak_table(reports: Sequence[Report]) -> Table:
    rows = [
        [model, leak.attribute, _with_interval(leak.value, leak.low, leak.high), _number(leak.chance), leak.probe]
        + [f"{leak.probe_records:,}", f"{leak.records:,}"]
        for model, report in _labelled(reports)
        for leak in report.leak
    ]
    note = "Balanced accuracy of a fresh probe on frozen latents: chance when the latent tells nothing, 1 when all."
    header = ["model", "attribute", "probe accuracy", "chance", "probe", "learnt from", "tested on"]
    return Table("3. Leak", header, rows, note)


def _distance_table(reports: Sequence[Report]) -> Table:
    rows = []
    for model, report in _labelled(reports):
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
        for model, report in _labelled(reports)
        for c in report.conditional
    ]
    note = (
        "A class is a joint value of the named attributes; a swap is of the class it was asked for, every other image "
        "of the class it is labelled. IS = BCIS · WCIS, of the judge's probabilities of the classes. BCFID and WCFID "
        "weigh classes alike, over those with two images on both sides. " + _features_note(reports)
    )
    header = ["model", "images", "classes by", "classes", "images", "IS", "BCIS", "WCIS", "BCFID", "WCFID"]
    return Table("Distribution by class", header, rows, note.strip())


def _features_note(reports: Sequence[Report]) -> str:
    names = list(dict.fromkeys(report.features for report in reports if report.features))
    return f"Features: {'; '.join(names)}. " if names else ""


def _cost_table(reports: Sequence[Report]) -> Table:
    verbs = [verb for verb in ("encode", "decode", "sample") if any(f"{verb}_flops" in report.cost for report in reports)]
    rows = []
    for model, report in _labelled(reports):
        if cost := report.cost:
            row = [model, ", ".join(f"{name} {count:,}" for name, count in cost["parameters"].items())]
            for verb in verbs:
                there = f"{verb}_flops" in cost
                row.append(f"{cost[f'{verb}_flops'] / 1e9:.3f}" if there else "–")
                row.append(f"{cost[f'{verb}_images_per_second']:,.0f}" if there else "–")
            rows.append([*row, f"{cost['device']}, {cost['threads']} threads, batch {cost['batch_size']}"])
    header = ["model", "parameters", *(f"{verb} {what}" for verb in verbs for what in ("GFLOP", "images/s")), "on"]
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
            f"{report.split_records:,} records of the {report.split} split (digest {report.split_digest[:12]})"
            f"{judged}, seed {report.seed}"
        )
        lines += [f"  - **{warning}**" for warning in report.warnings]
    return "\n".join(lines) + "\n" + as_markdown(as_tables(reports))


def as_markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown."""
    lines: list[str] = []
    for table in tables:
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(table.header) + " |")
        lines.append("|" + " --- |" * len(table.header))
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        if table.note:
            lines += ["", table.note]
    return "\n".join(lines) + "\n"
