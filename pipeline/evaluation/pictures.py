"""Sheets of pictures: swaps side by side, sweeps of every slider, and the swaps of which a judge is surest and least sure.

They are of the first records of a split, so that sheets of several models show the same faces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fader.filters import reduced
from fader.method import Batch, Method
from pipeline.data.shards import Split
from pipeline.evaluation.measure import evaluating, makes_pictures, pictures
from pipeline.evaluation.report import SLIDER_POSITIONS, slider_values
from pipeline.files import file_name
from pipeline.images import png_bytes, to_uint8
from pipeline.models import Model, editor, readers_of, sampler

SWEPT_FACES = 6
JUDGED_RECORDS = 256
SIDE_BY_SIDE = 6  # best and worst cases of an attribute, each
MOST_SLIDERS = 16  # pictures of sweeps and of cases: a page of 40 attributes would be too heavy to open
NEIGHBOURS, SEARCHED = 3, 4096  # training pictures beside a sample; those that are looked at
_COMPARED = 32  # pixels a side at which pictures are compared
_CELL = 128  # pixels a side at most, in pictures of many


@dataclass(frozen=True)
class Picture:
    """A PNG with its name (of the file) and what it shows."""

    name: str
    caption: str
    png: bytes


def swapped(method: Method, batch: Batch) -> tuple[list[str], Tensor]:
    """Decode each record as it is labelled and with each attribute changed to each of its other values. Returns words for
    the columns, and [N, columns, C, S, S] in [-1, 1] on the CPU: the picture, its reconstruction, and the swaps; of a
    method that only samples the sample of each record's labels and its swaps."""
    attributes, words, columns = method.attributes, [], []
    with evaluating(method.networks.values()), torch.inference_mode():
        if editor(method) is not None:
            assert batch.images is not None
            words, columns = ["picture"], [batch.images]
        picture, _ = pictures(method, batch)
        words.append("reconstruction" if columns else "sample")
        columns.append(picture(attributes.code(batch.attributes)))
        for j, step, changed, _ in attributes.swaps(batch.attributes):
            words.append(attributes[j].name if attributes[j].k == 2 else f"{attributes[j].name} +{step}")
            columns.append(picture(attributes.code(changed)))
    return words, torch.stack([column.float().cpu() for column in columns], 1)


def swap_sheet(model: Model, batch: Batch) -> Picture:
    words, rows = swapped(model.method, batch)
    most = MOST_SLIDERS + 2
    cells = [list(_pixels(row[:most])) for row in rows[:SWEPT_FACES]]
    return Picture("swaps", "Each attribute changed, alone", _sheet(cells, words[:most]))


def sweep_sheets(model: Model, batch: Batch) -> list[Picture]:
    """Draw a sheet a slider: records down, its positions across."""
    method, attributes, sheets = model.method, model.attributes, []
    with evaluating(method.networks.values()), torch.inference_mode():
        picture, _ = pictures(method, batch)
        code = attributes.code(batch.attributes)
        own, above = [_pixels(picture(code))], ["sample"]
        if editor(method) is not None:
            own, above = [_pixels(batch.images), *own], ["picture", "reconstruction"]
        for _, attribute, value, category in list(slider_values(attributes))[:MOST_SLIDERS]:
            columns = list(own)
            for position in SLIDER_POSITIONS:
                columns.append(_pixels(picture(attributes.with_slider(code, attribute.name, position, category))))
            name = attribute.name if category is None else f"{attribute.name}.{attribute.value_name(value)}"
            positions = [f"{position:+g}" if position else "0" for position in SLIDER_POSITIONS]
            sheet = _sheet(list(zip(*columns)), [*above, *positions], gaps=(len(own),))
            sheets.append(Picture(f"sweep-{file_name(name)}", name, sheet))
    return sheets


def neighbour_sheet(model: Model, first: Batch, read: Callable[[Callable[[Batch], None]], None]) -> Picture:
    """Draw a sample of each record's labels beside the training pictures that are nearest to it, pixel by pixel.

    read: calls a function with every batch of training pictures that are looked at.
    """
    method, count = model.method, len(first.index)
    samples = sampler(method)
    assert samples is not None and first.images is not None
    with evaluating(method.networks.values()), torch.inference_mode():
        noise = first.draws.normal("neighbours", (samples.noise_width,))
        made = samples.sample(noise, method.attributes.code(first.attributes)).float().clamp(-1, 1)
    asked = torch.cat([made, first.images])
    near, apart = asked.new_zeros(len(asked), 0, *asked.shape[1:]), asked.new_zeros(len(asked), 0)

    def small(images: Tensor) -> Tensor:
        return reduced(images, min(_COMPARED, images.shape[-1])).flatten(1)

    def look(batch: Batch) -> None:
        nonlocal near, apart
        assert batch.images is not None
        both = torch.cat([apart, torch.cdist(small(asked), small(batch.images))], 1)
        apart, index = both.topk(min(NEIGHBOURS, both.shape[1]), largest=False)
        near = torch.stack([torch.cat([own, batch.images])[rows] for own, rows in zip(near, index)])

    read(look)
    rms = (apart / small(asked).shape[1] ** 0.5)[:, 0]
    rows = [[own, *others] for own, others in zip(_pixels(made), map(_pixels, near[:count]))]
    says = f"Distance to the nearest (RMS, median): samples {rms[:count].median():.3f}, real ones {rms[count:].median():.3f}"
    return Picture("neighbours", says, _sheet(rows, ["sample", "nearest", "second", "third"][: 1 + near.shape[1]]))


Case = tuple[float, str, np.ndarray, np.ndarray]
"""The probability of what was asked for, a record's key, and its picture before and after: uint8 [S, S, C]."""


def case_sheets(model: Model, judge: Model, split: Split, batches: Sequence[Batch]) -> list[Picture]:
    """Draw a sheet an attribute: pictures above their swaps, from the judge's lowest probability to its highest."""
    attributes, reader = model.attributes, readers_of([judge], model.attributes)[0]
    cases: dict[str, list[Case]] = {attribute.name: [] for attribute in tuple(attributes)[:MOST_SLIDERS]}
    with evaluating([*model.method.networks.values(), *judge.method.networks.values()]), torch.inference_mode():
        for batch in batches:
            keys = [str(split.keys[row]) for row in batch.index.tolist()]
            before = _pixels(batch.images)
            for j, target, made in _to_judge(model, batch):
                block = reader.own(reader.probabilities(made))[j]
                asked = block.gather(1, target.clamp(min=0)[:, None])[:, 0].tolist()
                known = (attributes[j].hard(batch.attributes[:, j]) >= 0).tolist()
                new = [case for case, right in zip(zip(asked, keys, before, _pixels(made)), known) if right]
                cases[attributes[j].name] = _extremes([*cases[attributes[j].name], *new])
    return [_case_sheet(name, kept, makes_pictures(model.method)) for name, kept in cases.items() if kept]


def _case_sheet(name: str, kept: Sequence[Case], with_swaps: bool) -> Picture:
    probabilities, keys, before, after = zip(*kept)
    gaps = (SIDE_BY_SIDE,) if len(kept) > SIDE_BY_SIDE else ()
    sheet = _sheet([before, after] if with_swaps else [before], [f"{p:.2f}" for p in probabilities], gaps)
    return Picture(f"cases-{file_name(name)}", f"{name}; lowest: {', '.join(keys[:3])}", sheet)


def _extremes(cases: list[Case]) -> list[Case]:
    """Return the lowest and the highest probabilities, rising; all when there are few."""
    cases = sorted(cases, key=lambda case: case[:2])
    return cases if len(cases) <= 2 * SIDE_BY_SIDE else cases[:SIDE_BY_SIDE] + cases[-SIDE_BY_SIDE:]


def _to_judge(model: Model, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
    """Return (column, value asked for [N], pictures to judge) of every swap; of a judge, the pictures and their labels."""
    method, attributes, labels = model.method, model.attributes, batch.attributes
    if not makes_pictures(method):
        return [(j, a.hard(labels[:, j]), batch.images) for j, a in enumerate(attributes) if j < MOST_SLIDERS]
    picture, _ = pictures(method, batch)
    return [
        (j, target, picture(attributes.code(changed))) for j, _, changed, target in attributes.swaps(labels) if j < MOST_SLIDERS
    ]


def _pixels(images: Tensor) -> np.ndarray:
    """[N, C, S, S] in [-1, 1] to uint8 [N, S', S', 3], shrunk where many stand side by side."""
    arrays = to_uint8(images).cpu().numpy()
    arrays = np.repeat(arrays, 3, -1) if arrays.shape[-1] == 1 else arrays
    if arrays.shape[1] <= _CELL:
        return arrays
    return np.stack([np.asarray(Image.fromarray(a).resize((_CELL, _CELL), Image.Resampling.BOX)) for a in arrays])


def _sheet(rows: Sequence[Sequence[np.ndarray]], above: Sequence[str], gaps: Sequence[int] = ()) -> bytes:
    """Cells [S, S, 3] in rows with a line of words above each column, and a gap before some."""
    size = rows[0][0].shape[0]
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
            image = Image.fromarray(cell).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (left, line + r * (side + gap)))
    return png_bytes(np.asarray(sheet))
