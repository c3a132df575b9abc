"""What a shard set holds, in text and pictures: counts, balance, co-occurrence, sizes, JPEG quality, duplicates."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from pipeline.data.datasets import SPLITS
from pipeline.data.shards import ShardSet, Split
from pipeline.images import Preprocessing, png_bytes, preprocess

RARE_SHARE = 0.2
"""Values below this part of an even share (10% of a binary attribute, 2% of a 10-way one) are called rare: without
balance a network may pass them over."""
_MOST_READ = 20_000  # pictures whose quality is looked up
_MOST_ROWS, _ROW_LENGTH, _CELL = 16, 10, 96
_LUMINANCE = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
     87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
     72, 92, 95, 98, 112, 100, 103, 99]
)  # fmt: skip
"""ITU-T T.81, table K.1: what the quality of a JPEG scales."""


@dataclass(frozen=True)
class Inspection:
    """text: to print. pictures: PNG bytes by name. metrics: the numbers of it worth keeping, by name."""

    text: str
    pictures: dict[str, bytes]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Values:
    """Every value of every attribute as one column. names [m]; held [n, m]: 1, 0, or nan where unknown."""

    names: list[str]
    held: np.ndarray


def inspect(whole: ShardSet, *, seed: int = 0) -> Inspection:
    """Look through a finished shard set. Labels of all records are read, and the tables of at most 20,000 JPEGs.

    seed: which pictures the contact sheet shows. Raises ValueError: a picture on the contact sheet does not decode.
    """
    splits = [whole.split(name) for name in SPLITS if whole.info["splits"][name]["records"]]
    values = {split.name: _values(split) for split in splits}
    together = _Values(values[splits[0].name].names, np.concatenate([values[s.name].held for s in splits]))
    width, height = (np.concatenate([getattr(s, side) for s in splits]) for side in ("width", "height"))
    size = np.concatenate([split.size for split in splits])
    quality, num_read = _qualities(splits, seed)
    duplicates, torn, about_duplicates = _duplicates(whole)
    formats = Counter(whole.manifest["extension"].to_pylist()).most_common()
    lines = [_head(whole, splits, int(size.sum())), *_balance(splits, values, whole.info["attributes"])]
    lines += [_spread("width", width, "pixels"), _spread("height", height, "pixels"), _spread("file size", size, "bytes")]
    lines.append("formats: " + ", ".join(f"{extension} {count:,}" for extension, count in formats))
    lines += [_spread(f"JPEG quality, read off the tables of {num_read:,}", quality, "of 100"), about_duplicates]
    pictures = {"attributes": _histogram(together), "cooccurrence": _cooccurrence(together)} if together.names else {}
    pictures |= {"contact": _contact(splits, values, np.random.default_rng(seed))}
    pictures |= {"sizes": _sizes(width, height, size, quality)}
    metrics = {f"{s.name}/records": float(len(s)) for s in splits}
    metrics |= {"duplicates/records": float(duplicates), "duplicates/across_splits": float(torn)}
    return Inspection("\n".join(lines), pictures, metrics)


def _values(split: Split) -> _Values:
    names, columns = [], []
    for attribute, labels in zip(split.attributes, split.labels.T):
        for value in range(attribute.k) if attribute.kind == "k-way" else (1,):
            held = (labels > 0.5 if attribute.kind == "continuous" else labels == value).astype(np.float32)
            end = {"k-way": f" {attribute.value_name(value)}", "continuous": " > 0.5"}.get(attribute.kind, "")
            names.append(attribute.name + end)
            columns.append(np.where(labels < 0, np.nan, held))
    return _Values(names, np.stack(columns, 1) if columns else np.zeros((len(split), 0), np.float32))


def _share(held: np.ndarray) -> np.ndarray:
    """The share [m] of the known that hold each value; nan where none is known."""
    known = np.isfinite(held).sum(0)
    return np.where(known, np.nansum(held, 0) / np.maximum(known, 1), np.nan)


def _head(whole: ShardSet, splits: Sequence[Split], size: int) -> str:
    number = sum(len(split) for split in splits)
    counts = ", ".join(f"{split.name} {len(split):,} ({len(split) / number:.0%})" for split in splits)
    shards = sum(len(split.shards) for split in splits)
    left_out = f"\nleft out when it was made: {len(whole.info['left_out']):,}" if whole.info["left_out"] else ""
    about = f"{number:,} records, {size / 1e6:,.1f} MB of pictures, in {shards} shards; data digest {whole.digest[:16]}"
    return f"{whole.name}: {about}\n{counts}{left_out}"


def _balance(splits: Sequence[Split], values: dict[str, _Values], attribute_list: list[dict]) -> list[str]:
    """A line for each value: its share in each split, and how many are unknown; then what is rare."""
    names = values[splits[0].name].names
    if not names:
        return ["no attributes"]
    wide = max(9, *map(len, names))
    lines = [f"\n{'share of':{wide}}" + "".join(f"{split.name:>10}" for split in splits) + "   unknown"]
    shares = [_share(values[split.name].held) for split in splits]
    unknown = sum(np.isnan(values[split.name].held).sum(0) for split in splits)
    for j, name in enumerate(names):
        cells = "".join(f"{'-':>10}" if np.isnan(s[j]) else f"{s[j]:>10.1%}" for s in shares)
        lines.append(f"{name:{wide}}{cells}{int(unknown[j]):>10,}")
    even = [1 / len(entry["categories"]) if entry["categories"] else 0.5 for entry in attribute_list]
    even = [share for share, entry in zip(even, attribute_list) for _ in entry["categories"] or [""]]
    least = [min(s, 1 - s) if e == 0.5 else s for s, e in zip(shares[0], even)]
    rare = [f"{name} ({s:.1%})" for name, s, e in zip(names, least, even) if s < RARE_SHARE * e]
    words = f"rare in {splits[0].name} (below {RARE_SHARE:.0%} of an even share)"
    return [*lines, f"\n{words}: {', '.join(rare) or 'none'}"]


def _spread(what: str, values: np.ndarray, unit: str) -> str:
    if not len(values):
        return f"{what}: none"
    least, low, middle, high, most = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    if least == most:
        return f"{what}: {least:,.0f} {unit} everywhere"
    usual = f"median {middle:,.0f}, nine in ten from {low:,.0f} to {high:,.0f}"
    return f"{what}: {least:,.0f} to {most:,.0f} {unit}, {usual}"


def _duplicates(whole: ShardSet) -> tuple[int, int, str]:
    """How many pictures are equal byte for byte to another, how many groups of them stand in several splits, and words."""
    groups: dict[str, list[str]] = {}
    for digest, split in zip(whole.manifest["digest"].to_pylist(), whole.manifest["split"].to_pylist()):
        groups.setdefault(digest, []).append(split)
    equal = [splits for splits in groups.values() if len(splits) > 1]
    count, torn = sum(map(len, equal)), sum(len(set(splits)) > 1 for splits in equal)
    if not equal:
        return 0, 0, "duplicates: no two pictures are equal"
    leak = f"; {torn:,} of them stand in several splits, so a test would meet what was trained on" if torn else ""
    return count, torn, f"duplicates: {count:,} pictures in {len(equal):,} groups of equal bytes{leak}"


def jpeg_quality(table: Sequence[int]) -> int:
    """The quality, 1 to 100, of which a luminance table comes nearest to what the IJG's library would write."""
    return int(np.abs(_TABLE_SUMS - sum(table)).argmin()) + 1


def _table_sum(quality: int) -> int:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return int(((_LUMINANCE * scale + 50) // 100).clip(1, 255).sum())


_TABLE_SUMS = np.array([_table_sum(quality) for quality in range(1, 101)])


def _qualities(splits: Sequence[Split], seed: int) -> tuple[np.ndarray, int]:
    rows = [(split, row) for split in splits for row in range(len(split))]
    if len(rows) > _MOST_READ:
        chosen = np.random.default_rng(seed).choice(len(rows), _MOST_READ, replace=False)
        rows = [rows[n] for n in sorted(chosen.tolist())]
    qualities = []
    for split, row in rows:
        try:
            with Image.open(io.BytesIO(split.bytes(row)), formats=("JPEG",)) as image:
                qualities.append(jpeg_quality(image.quantization[0]))
        except UnidentifiedImageError:
            continue
    return np.array(qualities), len(rows)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    return out.getvalue()


def _histogram(values: _Values) -> bytes:
    """A bar for each value: the records that hold it, and those that do not as the rest."""
    present, known = np.nansum(values.held, 0), np.isfinite(values.held).sum(0)
    figure, axes = _figure(9, 1.2 + 0.24 * len(values.names))
    axes.barh(values.names, known, color="#d9dde3")
    axes.barh(values.names, present, color="#3b6ea5")
    for row, (count, number) in enumerate(zip(present, known)):
        axes.text(count, row, f" {count / number:.1%}" if number else " unknown", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("records (dark: hold the value; light: known not to)")
    axes.margins(y=0.01)
    return _png(figure)


def cooccurrence(held: np.ndarray) -> np.ndarray:
    """P(column | row), [m, m]: the share that holds the column's value, of the records that hold the row's and whose column
    is known; nan where there are none. held: [n, m] of 1, 0, nan."""
    one, known = np.nan_to_num(held), np.isfinite(held).astype(np.float32)
    both, base = one.T @ one, one.T @ known
    return np.where(base > 0, both / np.maximum(base, 1), np.nan)


def _cooccurrence(values: _Values) -> bytes:
    side = 2.5 + 0.24 * len(values.names)
    figure, axes = _figure(side, side)
    picture = axes.imshow(cooccurrence(values.held), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(values.names)), values.names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(values.names)), values.names, fontsize=7)
    axes.set_title("share of the row's records that hold the column's value", fontsize=9)
    figure.colorbar(picture, fraction=0.046)
    return _png(figure)


def _sizes(width: np.ndarray, height: np.ndarray, size: np.ndarray, quality: np.ndarray) -> bytes:
    figure, (shapes, files, qualities) = _figure(12, 3.4, 3)
    kinds, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
    shapes.scatter(kinds[:, 0], kinds[:, 1], s=12 + 200 * counts / counts.max(), alpha=0.5, color="#3b6ea5")
    shapes.set(xlabel="width, pixels", ylabel="height, pixels", title="sizes", xlim=(0, None), ylim=(0, None))
    files.hist(size / 1e3, bins=40, color="#3b6ea5")
    files.set(xlabel="kB", ylabel="records", title="file sizes")
    qualities.hist(quality, bins=np.arange(0.5, 101.5), color="#3b6ea5")
    qualities.set(xlabel="quality", title="JPEG quality" if len(quality) else "JPEG quality: no JPEG")
    return _png(figure)


def _contact(splits: Sequence[Split], values: dict[str, _Values], chance: np.random.Generator) -> bytes:
    """A row of pictures for each value of the first split, and the value's name beside it."""
    split, rule = splits[0], Preprocessing(_CELL, crop="letterbox")
    rows = [(name, np.flatnonzero(held == 1)) for name, held in zip(values[split.name].names, values[split.name].held.T)]
    rows = [(name, those) for name, those in rows if len(those)][:_MOST_ROWS] or [("all", np.arange(len(split)))]
    gap, margin = 2, 150
    sheet = Image.new("RGB", (margin + _ROW_LENGTH * (_CELL + gap), len(rows) * (_CELL + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (name, those) in enumerate(rows):
        words = name[:24].encode("latin-1", "replace").decode("latin-1")
        pen.text((4, r * (_CELL + gap) + _CELL // 2 - 6), words, "black")
        for c, row in enumerate(chance.choice(those, min(_ROW_LENGTH, len(those)), replace=False).tolist()):
            cell = Image.fromarray(preprocess(split.picture(row), rule))
            sheet.paste(cell, (margin + c * (_CELL + gap), r * (_CELL + gap)))
    return png_bytes(np.asarray(sheet))
