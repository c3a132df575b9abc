"""A model for use: a method with its weights, and what is known about it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fader.attributes import Attributes
from fader.method import Method
from pipeline.images import Preprocessing, preprocess, to_float, to_uint8
from pipeline.models.capabilities import Aligning, Capability, Editing, Judging, Sampling, aligner, editor, judge, sampler


@dataclass
class Model:
    """A method with its weights, in eval mode, and its card. source: where it came from, for messages. run: the folder of
    the run that it is of. variant: which of that run's weights it has, as names of files about them end: "" for the
    newest as they are used, else such as "-images-64000" or "-raw"."""

    method: Method
    card: dict[str, Any]
    attributes: Attributes
    preprocessing: Preprocessing
    judges: tuple[Model, ...]
    source: str
    run: Path | None = None
    variant: str = ""

    def edit(self, image: Image.Image, **sliders: str | float) -> Image.Image:
        """Move sliders on a picture, as in `model.edit(image, Smiling=1.5, Beard="full")`; the result is square, as the
        model reads it. Raises ValueError: an unknown attribute or value; the model does not edit."""
        editing = self.editing
        moves = [editing.slider(name, value) for name, value in sliders.items()]
        pixels = preprocess(image.convert("RGB"), self.preprocessing.fitting(*image.size))
        images = to_float(torch.from_numpy(pixels[None].copy()))
        edited = editing.edit(images, editing.labels(images)[0], [moves])[:, 0]
        return Image.fromarray(to_uint8(edited.expand(-1, 3, -1, -1))[0].numpy())

    def digest(self) -> str:
        """Return the SHA-256 of all weights by name, which a run and its export share."""
        digest = hashlib.sha256()
        for name, network in sorted(self.method.networks.items()):
            for key, tensor in network.state_dict().items():
                digest.update(f"{name}/{key}".encode())
                digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can do; a service offers the first."""
        known = ((editor, "editing"), (sampler, "sampling"), (judge, "judging"), (aligner, "aligning"))
        return tuple(getattr(self, name) for asked, name in known if asked(self.method) is not None)

    @property
    def editing(self) -> Editing:
        """Raises ValueError when the model cannot edit, as its siblings do."""
        return Editing(self.method, self.source, self.judges[0].judging if self.judges else None)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.method, self.source, self.card.get("labels") or ())

    @property
    def judging(self) -> Judging:
        return Judging(self.method, self.source)

    @property
    def aligning(self) -> Aligning:
        return Aligning(self.method, self.source)
