"""A model for use: a method with its weights, its sliders, and what they do to pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fader.attributes import Attribute, Attributes
from fader.method import Aligns, Decodes, Encodes, Judges, Method
from pipeline.images import Preprocessing

BATCH_SIZE = 64


@dataclass(frozen=True)
class Slider:
    """One slider: -1 = absent, 1 = present, beyond = exaggerated. category: the value of a k-way attribute it moves."""

    attribute: str
    category: int | None
    value: float


@dataclass
class Model:
    """A method with its weights, in eval mode, and what is known about it.

    card: what an export's card.json holds. source: where it came from, for messages. run: the folder of the run it is
    of. variant: which of that run's weights, as its files' names end: "" for the newest as they are used, else such as
    "-images-64000" or "-raw".
    """

    method: Method
    card: dict[str, Any]
    attributes: Attributes
    preprocessing: Preprocessing
    judge: Model | None
    source: str
    run: Path | None = None
    variant: str = ""

    def slider(self, name: str, value: str | float) -> Slider:
        """`Smiling`, 1.5; `Beard.moustache`, 1; or `Beard`, "moustache", which is the same.

        Raises:
            ValueError: unknown attribute or category; a value that is no number.
        """
        attribute, category = self._resolve(name)
        if attribute.kind == "k-way" and category is None:
            if value not in attribute.categories:
                raise ValueError(
                    f"{name}={value}: {name} is one of {', '.join(attribute.categories)}; "
                    f"write {name}={attribute.categories[0]} or {name}.{attribute.categories[0]}=1"
                )
            return Slider(attribute.name, attribute.categories.index(str(value)), 1.0)
        number = _number(name, value, "-1 is absent, 1 is present, beyond is exaggerated")
        return Slider(attribute.name, category, number)

    def label(self, name: str, value: str | float) -> float:
        """One of a photo's own labels as a person writes it: 0 or 1, a category's name or number, or a share.

        Raises:
            ValueError: unknown attribute, or a value that it does not have.
        """
        attribute, category = self._resolve(name)
        if category is not None:
            raise ValueError(f"{name}={value}: write {attribute.name}={attribute.value_name(category)}")
        if attribute.kind == "k-way" and value in attribute.categories:
            return float(attribute.categories.index(str(value)))
        there = ", ".join(attribute.categories) or ("from 0 to 1" if attribute.kind == "continuous" else "0 or 1")
        number = _number(name, value, f"{name} is {there}")
        allowed = 0 <= number <= 1 if attribute.kind == "continuous" else number in attribute.values
        if not allowed:
            raise ValueError(f"{name}={value}: {name} is {there}")
        return number

    def _resolve(self, name: str) -> tuple[Attribute, int | None]:
        try:
            attribute, category = self.attributes.resolve(name)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        return self.attributes[self.attributes.index(attribute)], category

    @torch.inference_mode()
    def labels(self, images: Tensor, given: Mapping[str, float] | None = None) -> tuple[Tensor, dict[str, str]]:
        """What pictures show, as the decoder needs it to reconstruct them.

        Each attribute is taken from `given`, else read by the model's judge, else estimated: the value with which the
        reconstruction is nearest to the picture, one attribute after another, twice around.

        Args:
            images: [N, C, S, S] in [-1, 1].
            given: labels that the user knows, for all the pictures.

        Returns:
            [N, A] labels, and for each attribute "given", "judge" or "estimated".
        """
        self._must_edit()
        self._check_images(images)
        given = given or {}
        labels = torch.full((len(images), len(self.attributes)), -1.0, device=images.device)
        how = {}
        read = self._judged(images)
        for j, attribute in enumerate(self.attributes):
            if attribute.name in given:
                labels[:, j], how[attribute.name] = given[attribute.name], "given"
            elif attribute.name in read:
                labels[:, j], how[attribute.name] = read[attribute.name], "judge"
            else:
                how[attribute.name] = "estimated"
        unknown = [name for name, way in how.items() if way == "estimated"]
        return self._estimated(images, labels, unknown), how

    def _judged(self, images: Tensor) -> dict[str, Tensor]:
        if self.judge is None:
            return {}
        logits = self.judge.method.judge(images)  # type: ignore[attr-defined]
        preds = self.judge.attributes.preds(logits, self.judge.method.settings.head)
        return {a.name: preds[:, j] for j, a in enumerate(self.judge.attributes) if a in tuple(self.attributes)}

    def _estimated(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
        latent = self.method.encode(images, labels) if names else None  # type: ignore[attr-defined]
        for name in [*names, *names] if len(names) > 1 else names:
            attribute = self.attributes[self.attributes.index(name)]
            values = [0.0, 0.25, 0.5, 0.75, 1.0] if attribute.kind == "continuous" else attribute.values
            errors = []
            for value in values:
                code = self.attributes.code(self.attributes.swapped(labels, name, value))
                decoded = self.method.decode(latent, code)  # type: ignore[attr-defined]
                errors.append((decoded - images).square().flatten(1).mean(1))
            best = torch.stack(errors, 1).argmin(1)
            labels = labels.clone()
            labels[:, self.attributes.index(name)] = torch.tensor(values, device=labels.device)[best].float()
        return labels

    @torch.inference_mode()
    def edit(self, images: Tensor, labels: Tensor, settings: Sequence[Sequence[Slider]]) -> Tensor:
        """Decode pictures under several settings of the sliders; an empty setting is the reconstruction.

        Args:
            images: [N, C, S, S] in [-1, 1].
            labels: [N, A], the pictures' own.

        Returns:
            [N, len(settings), C, S, S] in [-1, 1].
        """
        self._must_edit()
        self._check_images(images)
        latent = self.method.encode(images, labels)  # type: ignore[attr-defined]
        decoded = []
        for sliders in settings:
            code = self.attributes.code(labels)
            for slider in sliders:
                code = self.attributes.with_slider(code, slider.attribute, slider.value, slider.category)
            decoded.append(self.method.decode(latent, code).float().clamp(-1, 1))  # type: ignore[attr-defined]
        return torch.stack(decoded, 1)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """What a judge sees: [N, attributes.code_width], a block of k probabilities an attribute.

        Raises:
            ValueError: the model does not judge.
        """
        if not isinstance(self.method, Judges):
            raise ValueError(f"{self.source}: {self.method.name} is not a judge")
        self._check_images(images)
        return torch.cat(self.attributes.probabilities(self.method.judge(images), self.method.settings.head), 1)

    @torch.inference_mode()
    def corrections(self, windows: Tensor) -> Tensor:
        """By which similarity the faces in windows are off: [N, 4], real and imaginary part of factor and of shift.

        Raises:
            ValueError: the model does not align.
        """
        if not isinstance(self.method, Aligns):
            raise ValueError(f"{self.source}: {self.method.name} does not align faces")
        off = self.method.align(windows)
        return torch.cat([torch.view_as_real(off.factor), torch.view_as_real(off.shift)], 1)

    def _must_edit(self) -> None:
        if not (isinstance(self.method, Encodes) and isinstance(self.method, Decodes)):
            raise ValueError(f"{self.source}: {self.method.name} does not encode and decode; it has no sliders to move")

    def _check_images(self, images: Tensor) -> None:
        size = (self.method.channels, self.method.image_size, self.method.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(f"{self.source}: pictures are {list(images.shape)}; it takes {['N', *size]}")


def _number(name: str, value: str | float, scale: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name}={value}: not a number; {scale}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}: not a finite number; {scale}")
    return number
