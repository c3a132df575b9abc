"""What a trained method can do for people: edit photos, sample pictures, judge them, align faces.

Whoever needs to know what a method can do asks here: `editor(method)` and its three siblings give the method itself,
or None. A model's capabilities (`Model.capabilities`) also know how a service calls them and what a user can try next.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fader.draws import Draws
from fader.filters import reduced
from fader.method import Aligns, Edits, Judges, Method, Samples
from pipeline.models.sliders import Slider, moved, parse_label, parse_slider

BATCH_SIZE = 64
MOST_ROWS = 4_096  # of one request, so that none takes all memory


def _able(protocol: type) -> Callable[[Method], Any]:
    """Return what gives a method itself if it can do what the protocol asks, and None otherwise."""
    return lambda method: method if isinstance(method, protocol) else None


editor, sampler, judge, aligner = map(_able, (Edits, Samples, Judges, Aligns))


class Capability:
    """One thing that a model can do, and how a service calls it: an array and parameters in, an array out.

    needs, lacks: the protocol of a method that can do it, and what is said of one that cannot. about, command: what its
    attributes are for, and what a user can try next. pictures: a service may give pictures of any size instead of an array
    of `dtype`. sliders: the answer depends on the parameters `sliders` and
    `attributes`, JSON objects. use: what the model is meant for. takes, gives: the shapes of one row of the two arrays.
    """

    needs: ClassVar[type]
    lacks: ClassVar[str]
    about: ClassVar[str]
    command: ClassVar[str]
    dtype: ClassVar[str] = "float32"
    pictures: ClassVar[bool] = False
    sliders: ClassVar[bool] = False
    use: ClassVar[str]

    def __init__(self, method: Any, source: str) -> None:
        if not isinstance(method, self.needs):
            raise ValueError(f"{source}: {method.name} {self.lacks}")
        self.method, self.attributes, self.source = method, method.attributes, source
        self.takes = self.gives = self.pixels = (method.channels, method.image_size, method.image_size)

    def summary(self) -> str:
        return self.about.format(names=", ".join(self.attributes.names))

    def next_command(self, address: str) -> str:
        """Return the command that a user can try next with the model of this address, quoted for the shell."""
        slider = "=".join(map(str, self.example_slider())) if self.sliders else ""
        return shlex.join(["fader", *(word.format(address=address, slider=slider) for word in self.command.split())])

    def answer(self, array: Any, params: Mapping[str, str]) -> np.ndarray:
        """Return what a service answers, computed in batches. Raises ValueError: unknown attribute, a value that is no
        number, or an array of another shape."""
        try:
            rows = torch.from_numpy(np.array(array, self.dtype))
        except (TypeError, ValueError):
            raise ValueError(f"{self.source} takes {self._expected()}; what came is no such array") from None
        if rows.ndim == 0 or tuple(rows.shape[1:]) != self.takes:
            raise ValueError(f"{self.source} takes {self._expected()}, not {list(rows.shape)}")
        if not 0 < len(rows) <= MOST_ROWS:
            raise ValueError(f"{self.source} takes 1 to {MOST_ROWS:,} rows at once, not {len(rows):,}")
        return torch.cat([self._answer(batch, params) for batch in rows.split(BATCH_SIZE)]).numpy()

    def _expected(self) -> str:
        shape = ", ".join(map(str, ("N", *self.takes)))
        return f"{self.dtype} [{shape}]" + (" or base64 PNG or JPEG pictures" if self.pictures else "")

    def _answer(self, batch: Tensor, params: Mapping[str, str]) -> Tensor:
        raise NotImplementedError

    def example_slider(self) -> tuple[str, float | str]:
        """The slider that examples move: the first attribute's."""
        first = self.attributes[0]
        return (first.name, first.categories[0]) if first.kind == "k-way" else (first.name, 1.5)

    def slider(self, name: str, value: str | float) -> Slider:
        return parse_slider(self.attributes, name, value)

    def label(self, name: str, value: str | float) -> float:
        return parse_label(self.attributes, name, value)

    def _asked(self, params: Mapping[str, str]) -> tuple[dict[str, float], list[Slider]]:
        labels = {name: self.label(name, value) for name, value in _object(params, "attributes").items()}
        return labels, [self.slider(name, value) for name, value in _object(params, "sliders").items()]

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.pixels:
            raise ValueError(f"{self.source} takes {['N', *self.pixels]}, not {list(images.shape)}")


class Judging(Capability):
    """Read attributes off pictures; a service gets probabilities [N, code_width]."""

    needs, lacks = Judges, "is not a judge"
    about, command = "reads: {names}", "train CONFIG judge={address}"
    use = "measuring whether edits show what was asked for; not for judging people"
    pictures = True

    def __init__(self, method: Method, source: str) -> None:
        super().__init__(method, source)
        self.gives = (self.attributes.code_width,)

    def probabilities(self, images: Tensor) -> list[Tensor]:
        """Return one [N, k] block an attribute: the probability of each value; (1 - v, v) of a continuous one.

        Pictures that are larger than the judge's are reduced first.
        """
        with torch.inference_mode():
            if images.ndim == 4 and images.shape[-1] > self.pixels[-1]:
                images = reduced(images, self.pixels[-1])
            self._check_images(images)
            logits = self.method.judge(images)
        head = "softmax" if logits.shape[1] == self.attributes.logits_width("softmax") else "sigmoid"
        return self.attributes.probabilities(logits, head)

    def labels(self, images: Tensor) -> dict[str, Tensor]:
        """Return the most probable value of each attribute, [N] by its name; a continuous one's number itself."""
        read = zip(self.attributes, self.probabilities(images))
        return {a.name: block[:, 1] if a.kind == "continuous" else block.argmax(1).float() for a, block in read}

    def _answer(self, batch: Tensor, params: Mapping[str, str]) -> Tensor:
        return torch.cat(self.probabilities(batch), 1)


class Editing(Capability):
    """Move sliders on photos. judge: reads what photos show; without one it is estimated."""

    needs, lacks = Edits, "does not encode and decode; it has no sliders to move"
    about, command = "sliders: {names}", "edit PHOTO --model {address} --set {slider} --out DIR"
    use = "research on editing attributes: photos of people who agreed to it, shown as edited"
    pictures = sliders = True

    def __init__(self, method: Method, source: str, judge: Judging | None = None) -> None:
        super().__init__(method, source)
        self.judge = judge

    @torch.inference_mode()
    def labels(self, images: Tensor, given: Mapping[str, float] | None = None) -> tuple[Tensor, dict[str, str]]:
        """Say what pictures [N, C, S, S] in [-1, 1] show, as the decoder needs it to reconstruct them: labels [N, A], and
        for each attribute "given" (the user knows it, for all the pictures), "judge" (which reads it), or "estimated":
        the value with which the reconstruction is nearest to the picture, one attribute after another, twice around."""
        self._check_images(images)
        given, read = given or {}, self.judge.labels(images) if self.judge else {}
        known = {a.name: a for a in self.judge.attributes} if self.judge else {}
        labels, origins = torch.full((len(images), len(self.attributes)), -1.0, device=images.device), {}
        for j, attribute in enumerate(self.attributes):
            name = attribute.name
            if name in given:
                labels[:, j], origins[name] = given[name], "given"
            elif known.get(name) == attribute:
                labels[:, j], origins[name] = read[name], "judge"
            else:
                origins[name] = "estimated"
        return self._estimated(images, labels, [name for name, by in origins.items() if by == "estimated"]), origins

    def _estimated(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
        latent = self.method.encode(images, labels) if names else None
        for name in [*names, *names] if len(names) > 1 else names:
            attribute = self.attributes[self.attributes.index(name)]
            values = [0.0, 0.25, 0.5, 0.75, 1.0] if attribute.kind == "continuous" else attribute.values
            errors = []
            for value in values:
                decoded = self.method.decode(latent, self.attributes.code(self.attributes.swapped(labels, name, value)))
                errors.append((decoded - images).square().flatten(1).mean(1))
            best = torch.stack(errors, 1).argmin(1)
            labels = labels.clone()
            labels[:, self.attributes.index(name)] = torch.tensor(values, device=labels.device)[best].float()
        return labels

    @torch.inference_mode()
    def edit(self, images: Tensor, labels: Tensor, settings: Sequence[Sequence[Slider]]) -> Tensor:
        """Decode pictures [N, C, S, S] in [-1, 1], whose own labels are [N, A], under several settings of the sliders:
        [N, settings, C, S, S]; an empty setting is the reconstruction."""
        latent = self.encode(images, labels)
        return torch.stack([self.decode(latent, labels, sliders) for sliders in settings], 1)

    @torch.inference_mode()
    def encode(self, images: Tensor, labels: Tensor) -> Any:
        """Encode pictures once, for `decode` to decode them as often as sliders move."""
        self._check_images(images)
        return self.method.encode(images, labels)

    @torch.inference_mode()
    def decode(self, latent: Any, labels: Tensor, sliders: Sequence[Slider] = ()) -> Tensor:
        """Return encoded pictures with these sliders moved: [N, C, S, S] in [-1, 1]."""
        code = moved(self.attributes, self.attributes.code(labels), sliders)
        return self.method.decode(latent, code).float().clamp(-1, 1)

    def _answer(self, batch: Tensor, params: Mapping[str, str]) -> Tensor:
        given, sliders = self._asked(params)
        return self.edit(batch, self.labels(batch, given)[0], [sliders])[:, 0]


class Sampling(Capability):
    """Make pictures that nobody photographed, each of a seed of its own; a service takes seeds [N] int64.

    occurring: labels of some training records, a line each.
    """

    needs, lacks = Samples, "does not sample pictures"
    about, command = "attributes of what it samples: {names}", "sample {address} --set {slider} --out DIR"
    use = "research on editing attributes: pictures shown as made by a model"
    dtype = "int64"
    sliders = True

    def __init__(self, method: Method, source: str, occurring: Sequence[str] = ()) -> None:
        super().__init__(method, source)
        self.takes = ()
        rows = [[float(label) for label in row.split()] for row in occurring]
        self.occurring = torch.tensor(rows) if rows else None

    @torch.inference_mode()
    def sample(
        self, seeds: Tensor, given: Mapping[str, float] | None = None, sliders: Sequence[Slider] = (), only: bool = False,
        truncation: float | None = None, to: int | None = None,
    ) -> Tensor:
        """Return one picture for each seed [N], the same whatever the other seeds are: [N, C, S, S] in [-1, 1].

        given: labels that all the pictures get; `sliders` are moved afterwards. only: labels that are neither given nor
        moved are 0, absent. By default they are drawn by the seed, together, from training records that come nearest to
        what is asked for; or every value equally likely, where the model knows of no records. truncation: see `truncated`.
        to: a seed to whose noise the pictures go from their own: z cos θ + z' sin θ, which is N(0, 1) for every θ.
        """
        draws, asked = Draws.of(0, "sample", 0, seeds), {**(given or {}), **self._labels_of(sliders)}
        columns = [self.attributes.index(name) for name in asked]
        values = torch.tensor(list(asked.values()))
        if only:
            labels = torch.zeros(len(seeds), len(self.attributes))
        elif self.occurring is None:
            labels = self.attributes.resampled(draws)
        else:
            right = ((self.occurring[:, columns] - values).abs() < 0.5).sum(1)
            near = self.occurring[right == right.max()]
            labels = near[draws.integers("record", len(near))]
        labels[:, columns] = values
        code = moved(self.attributes, self.attributes.code(labels), sliders)
        noise = draws.normal("noise", (self.method.noise_width,))
        if to is not None:
            other = Draws.of(0, "sample", 0, torch.tensor([to])).normal("noise", (self.method.noise_width,))
            angles = torch.linspace(0, math.pi / 2, len(seeds))[:, None]
            noise = noise * angles.cos() + other * angles.sin()
        noise = noise if truncation is None else truncated(noise, truncation)
        return self.method.sample(noise, code).float().clamp(-1, 1)

    def _labels_of(self, sliders: Sequence[Slider]) -> dict[str, float]:
        """Return the label that each slider stands for; one that only takes a category away stands for none."""
        labels = {}
        for slider in sliders:
            if slider.category is None:
                labels[slider.attribute] = float(slider.value > 0)
            elif slider.value > 0:
                labels[slider.attribute] = float(slider.category)
        return labels

    def _answer(self, batch: Tensor, params: Mapping[str, str]) -> Tensor:
        return self.sample(batch, *self._asked(params))


def truncated(noise: Tensor, most: float) -> Tensor:
    """Numbers from N(0, 1) moved, in their order, to where those lie that are within [-most, most]: F_most⁻¹(F(z)). Less
    noise gives pictures nearer to the average: better ones, and more alike.

    Source: Brock et al. 2019, arXiv:1809.11096, section 3.1, which draws again what is beyond.
    """
    wide = noise.double()
    share = torch.special.erf(torch.tensor(most / math.sqrt(2), dtype=torch.float64))
    return (torch.special.erfinv(torch.special.erf(wide / math.sqrt(2)) * share) * math.sqrt(2)).to(noise.dtype)


class Aligning(Capability):
    """Say by which similarity the faces in windows are off; a service gets corrections [N, 4]."""

    needs = Aligns
    about, command = "aligns faces", "align PHOTO OUT --model {address}"
    lacks = "does not align faces; give a model of the method aligner, as configs/celeba_aligner.yaml trains"
    use = "cutting faces out of photos as the training pictures were cut"

    def __init__(self, method: Method, source: str) -> None:
        super().__init__(method, source)
        self.takes, self.gives = (method.channels, method.window_size, method.window_size), (4,)

    @torch.inference_mode()
    def _answer(self, batch: Tensor, params: Mapping[str, str]) -> Tensor:
        """Return the real and imaginary part of factor and of shift."""
        off = self.method.align(batch)
        return torch.cat([torch.view_as_real(off.factor), torch.view_as_real(off.shift)], 1)


def _object(params: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(params.get(name) or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {params.get(name)!r}; a JSON object is needed, as {{"Smiling": 1.5}}')
    return value
