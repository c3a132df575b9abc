"""One person's session: their photo, encoded once, and its pictures as sliders move. Nothing of it reaches a disk."""

import base64
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fader.draws import Draws
from pipeline.app.messages import Choose, Drawn, Live, Message, Photo, Save, Strip, packed
from pipeline.data.datasets.faces import draw_face
from pipeline.faces import photos
from pipeline.faces.alignment import Face, find, follow
from pipeline.images import decode, grid, jpeg_bytes, png_bytes
from pipeline.models import Editing, Model, Sampling, Slider

MOST_FACES = 12  # of one photo to choose from
FRAME_PIXELS = 1_000_000  # of a camera's frame
STEPS = torch.linspace(-2, 2, 9).tolist()
_jpeg = partial(jpeg_bytes, quality=92, subsampling=0)  # shows a move; what is saved is PNG


@dataclass(frozen=True)
class Encoded:
    """A face as the model holds it. labels: [1, A]. origins: whence each label comes, by its attribute's name."""

    portrait: photos.Portrait
    labels: Tensor
    origins: Mapping[str, str]
    latent: Any


class Session:
    """Answers one person. Its state is replaced whole, so that a move may be decoded while a photo is read.
    editing: what the model does, perhaps by ONNX Runtime; a sampler's face is its seed. pixels: the most that a photo may have.
    """

    def __init__(self, model: Model, editing: Editing | Sampling, aligner: Model | None, pixels: int) -> None:
        self.model, self.editing, self.aligner, self.pixels = model, editing, aligner, pixels
        self.data = b""
        self.options = ""
        self.portraits: Sequence[photos.Portrait] = ()
        self.face: Encoded | None = None
        self.followed: Face | None = None  # where the camera's last frame showed one

    def about(self) -> dict[str, Any]:
        """Say what the model is, for the page to make its sliders of."""
        card = self.model.card
        return {
            "kind": "model",
            "model": self.model.source,
            "about": f"{card['method']} at {card['image_size']} pixels after {card['images_seen']:,} images",
            "size": card["image_size"],
            "edits": isinstance(self.editing, Editing),
            "attributes": self.model.attributes.to_list(),
            "licence": card["licence"],
        }

    def answer(self, message: Message, data: bytes) -> dict[str, Any] | bytes:
        """Answer anything but a move.
        Raises ValueError: an unknown slider or face, no photo yet, or a photo that cannot be taken."""
        match message:
            case Photo():
                return self.open(message.name, data, message.align)
            case Drawn() if isinstance(self.editing, Sampling):
                return self.sampled(self.editing, message.number)
            case Drawn():
                face = png_bytes(np.asarray(draw_face(0, message.number)))
                return self.open(f"drawn-face-{message.number}.png", face, align=False)
            case Choose():
                return self.choose(message.face)
            case Strip():
                return packed({"kind": "strip", "slider": message.slider, "steps": STEPS}, self.strip(message))
            case Save():
                return packed({"kind": "saved", "name": self._name(message)}, self.save(message))
            case Live():
                return packed({"kind": "live"}, self.live(message, data))
        raise ValueError("this page shows a model; it has no study")

    def open(self, name: str, data: bytes, align: bool) -> dict[str, Any]:
        """Read a photo, find and cut its faces, and encode the largest. The photo stays in memory as it came."""
        if isinstance(self.editing, Sampling):
            raise ValueError("this model makes faces of its own; it takes no photo")
        photo = decode(data, most_pixels=self.pixels)
        rule = self.model.preprocessing
        try:
            portraits = photos.portraits(name, photo, rule, align, self.aligner)[:MOST_FACES]
        except photos.NoFace as error:
            whole, align = photos.portrait(name, photo, rule), False
            portraits = [dataclasses.replace(whole, notes=(f"{error}. The whole photo is shown instead.", *whole.notes))]
        self.data, self.options = data, " --align auto" * align
        if align and self.aligner is not None:
            self.options += f" --aligner {shlex.quote(self.aligner.source)}"
        empty = Image.new("RGB", (1, 1))
        self.portraits = [dataclasses.replace(cut, photo=empty) for cut in portraits]  # it is decoded again to paste
        return self.choose(0)

    def sampled(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Make the face of a seed, which draws where the sliders start; the page names all of them in each move."""
        seeds, names = torch.tensor([seed]), self.model.attributes.names
        labels = self.model.attributes.resampled(Draws.of(0, "page", 0, seeds))
        pixels = photos.pixels_of(sampling.sample(seeds, dict(zip(names, labels[0].tolist())))[0])
        self.data, whole = png_bytes(pixels), dataclasses.replace(self.model.preprocessing, crop="center")
        self.portraits = [photos.portrait(f"seed-{seed}.png", Image.fromarray(pixels), whole)]
        self.face = Encoded(self.portraits[0], labels, dict.fromkeys(names, "drawn"), seeds)
        return self._met(0, f"fader sample {shlex.quote(self.model.source)} --seed {seed} --count 1", "")

    def choose(self, number: int) -> dict[str, Any]:
        """Encode one of the photo's faces, and say where its sliders stand."""
        if number >= len(self.portraits):
            raise ValueError(f"the photo has {len(self.portraits)} faces; there is no number {number + 1}")
        portrait = self.portraits[number]
        images = photos.images_of([portrait])
        labels, origins = self.editing.labels(images)
        self.face = Encoded(portrait, labels, origins, self.editing.encode(images, labels))
        command = f"fader edit {shlex.quote(portrait.name)} --model {shlex.quote(self.model.source)}{self.options}"
        first = self.model.attributes[0]
        idle = f"--sweep {shlex.quote('.'.join([first.name, *first.categories[:1]]))}=-2:2:9"
        return self._met(number, command + f" --face {number + 1}" * bool(number), idle)

    def _met(self, number: int, command: str, idle: str) -> dict[str, Any]:
        """Describe the face that is chosen. command: what makes it again; idle: what is added while nothing is moved."""
        face, portrait = self._face(), self.portraits[number]
        return {
            "kind": "face",
            "name": portrait.name,
            "notes": portrait.notes,
            "faces": [_address(cut.pixels) for cut in self.portraits],
            "chosen": number,
            "labels": face.labels[0].tolist(),
            "origins": dict(face.origins),
            "command": command,
            "idle": idle,
        }

    def shown(self, sliders: Mapping[str, float]) -> bytes:
        """Return the face with these sliders moved, as JPEG."""
        return _jpeg(Image.fromarray(self._pixels(sliders)))

    def live(self, asked: Live, data: bytes) -> bytes:
        """Return a frame with the largest upright face in it edited, as JPEG. Its own attributes are those of the photo."""
        frame, labels = decode(data, most_pixels=FRAME_PIXELS), self._face().labels
        faces = find(np.asarray(frame), detector=partial(follow, last=self.followed))
        self.followed = faces[0] if faces else None
        if not faces or not isinstance(self.editing, Editing):
            return _jpeg(frame)
        cut = photos.portrait("frame", frame, self.model.preprocessing, faces[0])
        latent = self.editing.encode(photos.images_of([cut]), labels)
        pixels = photos.pixels_of(self.editing.decode(latent, labels, self._sliders(asked.sliders))[0])
        return _jpeg(photos.paste(cut, pixels))

    def strip(self, asked: Strip) -> bytes:
        """Return the steps of one slider side by side, as PNG."""
        face, others = self._face(), self._sliders(asked.sliders)
        settings = [[*others, self.editing.slider(asked.slider, step)] for step in STEPS]
        row = torch.stack([self._decoded(face, setting)[0] for setting in settings])
        return png_bytes(grid(row[None]))

    def save(self, asked: Save) -> bytes:
        """Return what the page shows as PNG, which says of which model and which sliders it is."""
        pixels, portrait = self._pixels(asked.sliders), self._face().portrait
        said = photos.description(self.model, self._sliders(asked.sliders))
        if not asked.pasted:
            return png_bytes(pixels, said)
        whole = dataclasses.replace(portrait, photo=decode(self.data, most_pixels=self.pixels))
        return png_bytes(np.asarray(photos.paste(whole, pixels)), said)

    def _name(self, asked: Save) -> str:
        stem = self._face().portrait.name.rpartition("/")[2].rpartition(".")[0] or "face"
        return f"{stem}-{'pasted' if asked.pasted else 'edited'}.png"

    def _pixels(self, sliders: Mapping[str, float]) -> np.ndarray:
        face = self._face()
        return photos.pixels_of(self._decoded(face, self._sliders(sliders))[0])

    def _decoded(self, face: Encoded, sliders: Sequence[Slider]) -> Tensor:
        if isinstance(self.editing, Sampling):
            return self.editing.sample(face.latent, sliders=sliders)
        return self.editing.decode(face.latent, face.labels, sliders)

    def _sliders(self, sliders: Mapping[str, float]) -> list[Slider]:
        return [self.editing.slider(name, value) for name, value in sliders.items()]

    def _face(self) -> Encoded:
        if self.face is None:
            raise ValueError("there is no photo yet: give one first")
        return self.face


def _address(pixels: np.ndarray) -> str:
    """Return a uint8 picture [S, S, C] as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(pixels.squeeze())).decode()}"
