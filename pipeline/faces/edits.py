"""Pictures of edited faces: a picture of each photo, rows of steps and swaps, grids of two sliders, as files of a folder."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.faces.photos import OURS, Portrait, description, free_stem, images_of, paste, pixels_of
from pipeline.files import file_name, write_all
from pipeline.images import grid, png_bytes, to_uint8
from pipeline.models import Editing, Model, Slider

SHEET_ROWS = 64  # photos on a sheet; a folder may hold thousands
_FRAME_MS = 80
_SOFTWARE = 0x0131  # TIFF 6.0


@dataclass(frozen=True)
class Wanted:
    """What is made of each photo.

    sliders: are moved in all of its pictures; there is a picture of them alone where there are any.
    sweeps: a row of the steps of one slider, by the name that it gets. grids: the steps of two, the first downwards.
    swaps: a row in which each attribute in turn has its next value. animate: each sweep as a moving WebP, too.
    pasted: the whole photo with the edited face in it, too.
    """

    sliders: Sequence[Slider] = ()
    sweeps: Mapping[str, Sequence[Slider]] = field(default_factory=dict)
    grids: Mapping[str, tuple[Sequence[Slider], Sequence[Slider]]] = field(default_factory=dict)
    swaps: bool = False
    animate: bool = False
    pasted: bool = False

    @property
    def moves(self) -> dict[str, str]:
        """What moves along the rows of each sheet, by its name, beside the sliders, as the options of `fader edit` say it."""
        rows = {"grid": ""} if self.sliders else {}
        rows |= {f"sweep-{file_name(name)}": span(name, steps) for name, steps in self.sweeps.items()}
        return rows | ({"swaps": "swap=all"} if self.swaps else {})


def span(name: str, steps: Sequence[Slider]) -> str:
    """Say the steps of a slider as `--sweep` takes them."""
    return f"{name}={steps[0].value:g}:{steps[-1].value:g}:{len(steps)}"


def fastest_batch(editing: Editing, images: Tensor, labels: Tensor) -> int:
    """Return with how many at a time a model edits these pictures the fastest: 1, 2, 4, 8 or 16."""
    took = {}
    for size in (16, 8, 4, 2, 1):
        began = time.perf_counter()
        for some, own in zip(images.split(size), labels.split(size)):
            editing.decode(editing.encode(some, own), own)
        took[size] = time.perf_counter() - began
    return min(took, key=lambda size: took[size])


class Album:
    """Makes pictures of photos, some photos at a time, and at last the sheets. Only our own pictures are replaced."""

    def __init__(self, model: Model, wanted: Wanted, folder: Path) -> None:
        self.editing, self.wanted, self.folder = model.editing, wanted, folder
        self.said = description(model, wanted.sliders)
        self.taken: set[str] = set()
        self.sheets: dict[str, list[Tensor]] = {self._stem(name): [] for name in wanted.moves}
        self.kinds = [name.removeprefix("sweep-") for name in wanted.moves]

    def add(self, portraits: Sequence[Portrait], labels: Tensor) -> list[Path]:
        """Write the pictures of photos whose own labels are [N, A]; return their paths."""
        images, files = images_of(portraits), {}
        rows = self._rows(images, labels)
        for kept, edits in zip(self.sheets.values(), rows):
            kept += edits[: max(0, SHEET_ROWS - len(kept))]
        tables = self._tables(images, labels)
        for i, cut in enumerate(portraits):
            stem = Path(cut.name).stem
            for kind, moves, edits in zip(self.kinds, self.wanted.moves.values(), rows):
                if kind == "grid":
                    files |= self._picture(stem, cut, pixels_of(edits[i, -1]))
                    continue
                name = self._stem(f"{stem}-{kind}")
                files[f"{name}.png"] = self._png(grid(_colour(edits[i, None])), moves)
                if self.wanted.animate and kind != "swaps":
                    files[f"{name}.webp"] = webp_bytes(edits[i, 2:])
            for name, table in tables.items():
                moves = " ".join(span(steps[0].name(self.editing.attributes), steps) for steps in self.wanted.grids[name])
                files[f"{self._stem(f'{stem}-{file_name(name)}')}.png"] = self._png(grid(_colour(table[i])), moves)
        return write_all(self.folder, files)

    def close(self) -> list[Path]:
        sheets = zip(self.sheets.items(), self.wanted.moves.values())
        files = {f"{name}.png": self._png(grid(_colour(torch.stack(rows))), moves) for (name, rows), moves in sheets}
        return write_all(self.folder, files)

    def _rows(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return for each sheet the photos, their reconstructions, and their edits: [N, 2 + edits, C, S, S]."""
        wanted, editing, latent = self.wanted, self.editing, self.editing.encode(images, labels)

        def decoded(changed: Tensor, sliders: Sequence[Slider] = ()) -> Tensor:
            return editing.decode(latent, changed, sliders)

        rows = [[decoded(labels, wanted.sliders)]] if wanted.sliders else []
        rows += [[decoded(labels, [*wanted.sliders, step]) for step in steps] for steps in wanted.sweeps.values()]
        if wanted.swaps:
            swaps = editing.attributes.swaps(labels)
            rows.append([decoded(changed, wanted.sliders) for _, step, changed, _ in swaps if step == 1])
        before = [images, decoded(labels)]
        return [torch.stack([*before, *edits], 1) for edits in rows]

    def _tables(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return for each grid [N, rows, columns, C, S, S]."""
        tables = {}
        for name, (down, across) in self.wanted.grids.items():
            settings = [[*self.wanted.sliders, one, other] for one in down for other in across]
            tables[name] = self.editing.edit(images, labels, settings).unflatten(1, (len(down), len(across)))
        return tables

    def _picture(self, stem: str, cut: Portrait, pixels: np.ndarray) -> dict[str, bytes]:
        files = {f"{self._stem(stem)}.png": self._png(pixels)}
        if self.wanted.pasted:
            files[f"{self._stem(f'{stem}-pasted')}.png"] = self._png(np.asarray(paste(cut, pixels)))
        return files

    def _png(self, picture: np.ndarray, moves: str = "") -> bytes:
        return png_bytes(picture, self.said | {"Sliders": f"{self.said['Sliders']} {moves}".strip()})

    def _stem(self, stem: str) -> str:
        """Return a stem that no other picture has, and no file of the folder that we did not make."""

        def is_taken(name: str) -> bool:
            files = (self.folder / f"{name}{suffix}" for suffix in (".png", ".webp"))
            return name in self.taken or any(path.exists() and not _is_ours(path) for path in files)

        stem = free_stem(stem, is_taken)
        self.taken.add(stem)
        return stem


def _is_ours(path: Path) -> bool:
    """Whether a picture says that it was made here."""
    try:
        with Image.open(path) as picture:
            return OURS in (picture.info.get("Software"), picture.getexif().get(_SOFTWARE))
    except (OSError, ValueError, SyntaxError):
        return False


def _colour(pictures: Tensor) -> Tensor:
    return pictures.expand(*pictures.shape[:-3], 3, *pictures.shape[-2:])


def webp_bytes(pictures: Tensor) -> bytes:
    """Return pictures [S, C, H, W] in [-1, 1] as a WebP that moves there and back for ever."""
    frames = [Image.fromarray(pixels) for pixels in to_uint8(_colour(pictures)).numpy()]
    exif, out = Image.Exif(), io.BytesIO()
    exif[_SOFTWARE] = OURS
    rest = [*frames[1:], *frames[-2:0:-1]]
    frames[0].save(out, "WEBP", save_all=True, append_images=rest, duration=_FRAME_MS, loop=0, quality=90, exif=exif)
    return out.getvalue()
