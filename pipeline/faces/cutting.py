"""Cut the faces of photos out as CelebA's are, into a folder of pictures with a contact sheet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.faces.alignment import NO_FACE, Face, crop, find, opencv, thumbnail
from pipeline.faces.photos import free_stem
from pipeline.files import write_whole
from pipeline.images import decode, jpeg_bytes, png_bytes
from pipeline.models import Model

SHEET_PAIRS = 24
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Cut:
    """What became of a photo. files: one for each of the faces that were cut out. error: why there is none."""

    photo: Path
    faces: Sequence[Face] = ()
    files: Sequence[Path] = ()
    error: Exception | None = None


class Cutter:
    """Cuts photos into a folder.
    out: the folder; made when the first photo is cut. kind: "png" or "jpg".
    every_face: cut out every face of a photo, not the largest alone. overwrite: replace pictures that are in `out` already."""

    def __init__(self, out: Path, kind: str, aligner: Model | None, every_face: bool, overwrite: bool) -> None:
        self.out, self.kind, self.aligner = out, kind, aligner
        self.every_face, self.overwrite = every_face, overwrite
        self.sheet = out / "sheet.png"
        self._taken = {self.sheet.stem}
        self._pairs: list[np.ndarray] = []

    def cut(self, photos: Sequence[Path]) -> Iterator[Cut]:
        """Cut one photo after another; one that cannot be cut does not stop the others.
        Raises ValueError: a picture of that name is there already; nothing is written then."""
        files = [self._file(photo.stem) for photo in photos]
        self._refuse_existing([*files, self.sheet])
        opencv()
        self.out.mkdir(parents=True, exist_ok=True)
        for photo, file in zip(photos, files):
            try:
                yield self._cut(photo, file)
            except (ValueError, OSError) as error:
                yield Cut(photo, error=error)

    def write_sheet(self) -> bool:
        """Write photos and crops side by side, four pairs across; False when nothing was cut."""
        pairs = self._pairs[:SHEET_PAIRS]
        if not pairs:
            return False
        across = min(4, len(pairs))
        pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % across)
        lines = [np.hstack(pairs[i : i + across]) for i in range(0, len(pairs), across)]
        write_whole(self.sheet, png_bytes(np.vstack(lines)))
        return True

    def _cut(self, photo: Path, file: Path) -> Cut:
        pixels = np.asarray(decode(photo.read_bytes()))
        faces = find(pixels, self.aligner)
        if not faces:
            raise ValueError(NO_FACE)
        count = len(faces) if self.every_face else 1
        files = [file, *(self._file(f"{file.stem}-face{number}") for number in range(2, count + 1))]
        self._refuse_existing(files)
        for face, path in zip(faces, files):
            picture = crop(pixels, face.frame)
            write_whole(path, png_bytes(picture) if self.kind == "png" else jpeg_bytes(Image.fromarray(picture), _JPEG_QUALITY))
            self._pairs.append(np.hstack([thumbnail(pixels, face, len(picture)), picture]))
        return Cut(photo, faces, files)

    def _file(self, stem: str) -> Path:
        stem = free_stem(stem, self._taken.__contains__)
        self._taken.add(stem)
        return self.out / f"{stem}.{self.kind}"

    def _refuse_existing(self, files: Sequence[Path]) -> None:
        for file in files:
            if file.exists() and not self.overwrite:
                raise ValueError(f"{file} is there already; name another folder, or --overwrite to replace what is in it")
