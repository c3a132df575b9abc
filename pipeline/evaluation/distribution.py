"""Table 4: how decoded images lie among real ones, whole and by class, as features of a network see them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.draws import Draws
from pipeline import metrics
from pipeline.evaluation.report import Conditional, Distance
from pipeline.models import Model


@dataclass(frozen=True)
class Features:
    """What the distribution table compares: images [N, C, H, W] in [-1, 1] to [N, F] float32, and what it is called."""

    name: str
    extract: Callable[[Tensor], Tensor]


def inception_features(file: Path, device: torch.device) -> Features:
    """Features of the TorchScript network in a file, which takes uint8 [N, 3, H, W] and does its own resizing, as the
    published Inception-v3 of 2015-12-05 does; where its forward takes `return_features`, that is asked for. Raises
    ValueError: the file is not there, is no TorchScript, or does not give [N, F]."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; name the TorchScript file of an Inception network")
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is not readable as TorchScript: {str(error).strip().splitlines()[0]}") from None
    options = {argument.name for argument in network.forward.schema.arguments}
    keywords = {"return_features": True} if "return_features" in options else {}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def extract(images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        features = network(pixels, **keywords)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{file} gives {shape} for {len(images)} images; features must be [N, F]")
        return features.float()

    return Features(f"{file.name} (sha256 {digest[:12]}), images rounded to uint8, resized by the network", extract)


def judge_features(judge: Model) -> Features:
    """What the last linear layer of a judge reads. Raises ValueError: the judge has no linear layer."""
    layers = [module for network in judge.method.networks.values() for module in network.modules()]
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    if not linear:
        raise ValueError(f"{judge.source} has no linear layer to take features from; name a network with --inception")
    read: list[Tensor] = []

    def extract(images: Tensor) -> Tensor:
        hook = linear[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            judge.judging.probabilities(images)
        finally:
            hook.remove()
        return read.pop().flatten(1).float()

    name = f"the last layer's input of the judge {judge.source}: not to be compared with published FID"
    return Features(name, extract)


@dataclass(frozen=True)
class Classes:
    """A definition of class: the joint values of some attributes. columns: theirs in the model's labels."""

    columns: tuple[int, ...]
    attributes: Attributes

    @property
    def names(self) -> tuple[str, ...]:
        return self.attributes.names

    @property
    def name(self) -> str:
        return "+".join(self.names)

    @property
    def num(self) -> int:
        return math.prod(attribute.k for attribute in self.attributes)

    def of(self, labels: Tensor) -> Tensor:
        """[N] int64 class of labels [N, A]; -1 where one of its attributes is unknown."""
        return self.attributes.joint(self._own(labels))

    def moved(self, labels: Tensor, draws: Draws) -> Tensor:
        """Labels [N, A] with each record moved to another class, drawn for the record; unknown stays unknown."""
        moved = self.attributes.moved_jointly(self._own(labels), draws, f"class.{self.name}")
        changed = labels.clone()
        for j, column in enumerate(self.columns):
            changed[:, column] = moved[:, j]
        return changed

    def _own(self, labels: Tensor) -> Tensor:
        return torch.stack([labels[:, column] for column in self.columns], 1)

    def probabilities(self, code: Tensor, slices: Sequence[slice]) -> Tensor:
        """[N, num]: the product of the judge's probabilities [N, code_width] of the attributes' values."""
        joint = torch.ones(len(code), 1, dtype=torch.float64, device=code.device)
        for column in self.columns:
            joint = (joint[:, :, None] * code[:, slices[column]].double()[:, None, :]).flatten(1)
        return joint


def class_definitions(attributes: Attributes, given: Sequence[Sequence[str]]) -> tuple[Classes, ...]:
    """Return the definitions that are given by names, or one for each attribute alone."""
    names = given or [(name,) for name in attributes.names]
    return tuple(Classes(tuple(map(attributes.index, own)), attributes.select(own)) for own in names)


def distances(attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], seed: int) -> list[Distance]:
    def distance(images: str, attribute: str | None, to: str | None, made: Tensor, real: Tensor) -> Distance:
        if min(len(made), len(real)) < 2:
            return Distance(images, attribute, to, len(made), len(real), math.nan, math.nan, math.nan)
        fid = metrics.frechet_distance(metrics.Gaussian.fit(made), metrics.Gaussian.fit(real))
        kid = metrics.kernel_distance(made, real, seed=seed)
        return Distance(images, attribute, to, len(made), len(real), fid, *kid)

    real = rows["features/real"]
    result = []
    if "features/reconstruction" in rows:
        result.append(distance("reconstruction", None, None, rows["features/reconstruction"], real))
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        for value in attribute.values:
            starts = [(step, (value - step) % attribute.k) for step in range(1, attribute.k)]
            made = torch.cat([rows[f"features/{attribute.name}/{step}"][label == start] for step, start in starts])
            result.append(distance("swap", attribute.name, attribute.value_name(value), made, real[label == value]))
    if "features/sample" in rows:
        result.append(distance("sample", None, None, rows["features/sample"], real))
    return result


def conditional(
    attributes: Attributes, labels: Tensor, rows: dict[str, Tensor], classes: Sequence[Classes]
) -> list[Conditional]:
    slices, result = attributes.code_slices(), []
    for definition in classes:
        own = definition.of(labels)
        known = own >= 0
        groups = {name: [(name, own)] for name in ("real", "reconstruction", "sample") if f"features/{name}" in rows}
        if len(definition.columns) > 1:
            groups["swap"] = [(definition.name, rows[f"classes/{definition.name}"].long())]
        else:
            k, zeroed = definition.num, own.clamp(min=0)
            groups["swap"] = [(f"{definition.name}/{step}", (zeroed + step) % k) for step in range(1, k)]
        real = rows["features/real"]
        for images in ("real", "reconstruction", "swap", "sample"):
            if images not in groups or not known.any():
                continue
            made = torch.cat([rows[f"features/{name}"][known] for name, _ in groups[images]])
            judged = torch.cat([rows[f"probabilities/{name}"][known] for name, _ in groups[images]])
            asked = torch.cat([of[known] for _, of in groups[images]])
            both = [c for c in range(definition.num) if min((asked == c).sum(), (own == c).sum()) > 1]
            fid = (math.nan, math.nan)
            if images != "real" and both:
                fid = metrics.conditional_frechet([real[own == c] for c in both], [made[asked == c] for c in both])
            scores = metrics.inception_scores(definition.probabilities(judged, slices), asked)
            result.append(Conditional(images, definition.names, len(both), len(made), *scores, *fid))
    return result
