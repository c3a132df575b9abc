"""One pass over records: encode once, decode as often as the tables ask, keep by row what the judge says of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.method import Batch, Encodes, Method, ReduceSum, Samples, identity
from pipeline import metrics
from pipeline.evaluation.labels import slider_values
from pipeline.evaluation.report import SLIDER_POSITIONS

if TYPE_CHECKING:
    from pipeline.evaluation.distribution import Classes, Features
    from pipeline.models import Model

SLIDER_RECORDS = 256
PROBE_RECORDS = 4000


def decoded(method: Method, latent: Any, code: Tensor) -> Tensor:
    """Images as a person would see them: float32, within [-1, 1]."""
    return method.decode(latent, code).float().clamp(-1, 1)  # type: ignore[attr-defined]


class JudgedBy:
    """A judge's probabilities and judged values, for all that it knows, found by name."""

    def __init__(self, method: Method) -> None:
        self.method, self.attributes = method, method.attributes

    def probabilities(self, images: Tensor) -> list[Tensor]:
        """One [N, k] block an attribute."""
        logits = self.method.judge(images)  # type: ignore[attr-defined]
        head = "softmax" if logits.shape[1] == self.attributes.logits_width("softmax") else "sigmoid"
        return self.attributes.probabilities(logits, head)

    def columns(self, attributes: Attributes) -> list[int]:
        """Where the judge has these attributes."""
        return [self.attributes.index(name) for name in attributes.names]


def flat_latent(latent: Any) -> Tensor:
    """[N, F] float32: every tensor of what `encode` gave, flattened and joined: all the decoder knows of the image.

    Raises:
        ValueError: there is no tensor in it.
    """
    parts = list(_tensors(latent))
    if not parts:
        raise ValueError(f"encode gave {type(latent).__name__} without any tensor; the leak table cannot read it")
    return torch.cat([part.flatten(1).float() for part in parts], 1)


def _tensors(latent: Any) -> Iterator[Tensor]:
    if isinstance(latent, Tensor):
        yield latent
    elif isinstance(latent, dict):
        for key in sorted(latent):
            yield from _tensors(latent[key])
    elif isinstance(latent, (list, tuple)):
        for part in latent:
            yield from _tensors(part)
    elif is_dataclass(latent):
        for part in fields(latent):
            yield from _tensors(getattr(latent, part.name))


@contextmanager
def evaluating(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Every module in eval mode, and afterwards each as it was."""
    before = [(module, module.training) for network in networks for module in network.modules()]
    for module, _ in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class Pass:
    """Per-record results, filled in by row; rows of other ranks stay 0, so that a sum over ranks gathers them.

    All results are allocated beforehand: a rank that happens to have no batch still takes part in every sum.
    """

    def __init__(
        self, model: Model, judge: Model | None, device: torch.device, tables: Sequence[str], records: int
    ) -> None:
        self.method, self.attributes, self.device = model.method, model.attributes, device
        self.encodes, self.tables = isinstance(model.method, Encodes), tables
        self.judge = JudgedBy(judge.method) if judge else None
        self.columns = self.judge.columns(model.attributes) if self.judge else []
        self.kept: dict[str, Tensor] = {}
        self.features: Features | None = None
        self.classes: tuple[Classes, ...] = ()
        self.records = records
        self._preallocate(model, records)

    def describe_with(self, features: Features, classes: Sequence[Classes]) -> None:
        """Keep features and judged probabilities of real images, reconstructions, swaps and samples."""
        assert self.judge
        self.features, self.classes = features, tuple(classes)
        size = self.method.image_size
        with torch.inference_mode():
            width = features(torch.zeros(1, self.method.channels, size, size, device=self.device)).shape[1]
        for name in self._described():
            self.allocate(f"features/{name}", (self.records, width), torch.float32)
            self.allocate(f"probabilities/{name}", (self.records, self.attributes.code_width), torch.float32)
        for definition in self.classes:
            if len(definition.columns) > 1:
                self.allocate(f"classes/{definition.name}", (self.records,))

    def _described(self) -> list[str]:
        steps = [f"{attribute.name}/{step}" for attribute in self.attributes for step in range(1, attribute.k)]
        joint = [definition.name for definition in self.classes if len(definition.columns) > 1]
        samples = ["sample"] if isinstance(self.method, Samples) else []
        return ["real", "reconstruction", *steps, *joint, *samples]

    def _describe(self, name: str, index: Tensor, images: Tensor, judged: Sequence[Tensor] | None = None) -> None:
        if self.features is None:
            return
        assert self.judge
        judged = self.judge.probabilities(images) if judged is None else judged
        self.put(f"features/{name}", index, self.features(images))
        self.put(f"probabilities/{name}", index, torch.cat([judged[c] for c in self.columns], 1))

    def _preallocate(self, model: Model, records: int) -> None:
        width = len(self.attributes)
        if self.judge:
            self.allocate("real", (records, width))
            self.allocate("real_present", (records, width))
            self.allocate("real_confidence", (records, width))
        if not self.encodes:
            return
        size = model.preprocessing.image_size
        if "leak" in self.tables:
            with torch.inference_mode():
                image = torch.zeros(1, model.preprocessing.channels, size, size, device=self.device)
                labels = torch.zeros(1, width, device=self.device)
                latent = self.method.encode(image, labels)  # type: ignore[attr-defined]
            self.allocate("latent", (min(records, PROBE_RECORDS), flat_latent(latent).shape[1]), torch.float32)
        if "fidelity" in self.tables:
            for name, smallest in (("mse", 1), ("ssim", metrics.SSIM_FROM), ("ms_ssim", metrics.MS_SSIM_FROM)):
                if size >= smallest:
                    self.allocate(name, (records,))
        if self.judge and {"swap", "fidelity", "distribution"} & set(self.tables):
            self.allocate("reconstruction", (records, width))
            self.allocate("swap", (records, sum(attribute.k - 1 for attribute in self.attributes)))
        if self.judge and "fidelity" in self.tables:
            self.allocate("preserved", (width, len(self.judge.attributes), 2))
            self.allocate("preserved_counts", (width,))
            sliders = len(list(slider_values(self.attributes)))
            self.allocate("response", (min(records, SLIDER_RECORDS), sliders, len(SLIDER_POSITIONS)))

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        self.kept[name] = torch.zeros(shape, dtype=dtype, device=self.device)

    def put(self, name: str, index: Tensor, values: Tensor) -> None:
        """values [N, ...] become the rows `index` of a result; rows beyond its last are not wanted."""
        wanted = index < len(self.kept[name])
        self.kept[name][index[wanted]] = values[wanted].to(self.kept[name].dtype)

    def gathered(self, reduce_sum: ReduceSum) -> dict[str, Tensor]:
        """All records' results, on the CPU, on every rank."""
        return {name: reduce_sum(values).cpu() for name, values in sorted(self.kept.items())}

    def measure(self, batch: Batch) -> None:
        """Encode once, decode as often as the tables need, and keep what was seen."""
        method, attributes = self.method, self.attributes
        images, labels, index = batch.images, batch.attributes, batch.index
        assert images is not None
        if self.judge:
            real = self.judge.probabilities(images)
            self.put("real", index, torch.stack([real[c].argmax(1) for c in self.columns], 1))
            self.put("real_present", index, torch.stack([real[c][:, 1] for c in self.columns], 1))
            self.put("real_confidence", index, torch.stack([real[c].amax(1) for c in self.columns], 1))
        if not self.encodes:
            return
        latent = method.encode(images, labels)  # type: ignore[attr-defined]
        if "latent" in self.kept:
            self.put("latent", index, flat_latent(latent))
        if not {"swap", "fidelity", "distribution"} & set(self.tables):
            return
        code = attributes.code(labels)
        reconstruction = decoded(method, latent, code)
        for name, measure in (("mse", metrics.mse), ("ssim", metrics.ssim), ("ms_ssim", metrics.ms_ssim)):
            if name in self.kept:
                self.put(name, index, measure(reconstruction, images))
        if not self.judge:
            return
        before = self.judge.probabilities(reconstruction)
        self.put("reconstruction", index, torch.stack([before[c].argmax(1) for c in self.columns], 1))
        self._describe("real", index, images, real)
        self._describe("reconstruction", index, reconstruction, before)
        preds = []
        for j, step, changed, _ in attributes.swaps(labels):
            swap = decoded(method, latent, attributes.code(changed))
            after = self.judge.probabilities(swap)
            preds.append(after[self.columns[j]].argmax(1))
            self._describe(f"{attributes[j].name}/{step}", index, swap, after)
            if "fidelity" in self.tables:
                self._preserve(j, labels[:, j] >= 0, before, after)
        self.put("swap", index, torch.stack(preds, 1))
        if "fidelity" in self.tables and (index < SLIDER_RECORDS).any():
            self.put("response", index, self._response(latent, code))
        for definition in self.classes:
            if len(definition.columns) > 1:
                changed = definition.moved(labels, batch.draws)
                self._describe(definition.name, index, decoded(method, latent, attributes.code(changed)))
                self.put(f"classes/{definition.name}", index, definition.of(changed))
        if self.features is not None and isinstance(method, Samples):
            noise = batch.draws.normal("sample", (method.noise_width,))
            self._describe("sample", index, method.sample(noise, code).float().clamp(-1, 1))

    def _preserve(self, j: int, known: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Add, over the records whose label of attribute j is known, what its swap did to every judged attribute."""
        for a, (b, c) in enumerate(zip(before, after)):
            self.kept["preserved"][j, a, 0] += (b.argmax(1) == c.argmax(1))[known].sum()
            self.kept["preserved"][j, a, 1] += ((b - c).abs().sum(1) / 2)[known].double().sum()
        self.kept["preserved_counts"][j] += known.sum()

    def _response(self, latent: Any, code: Tensor) -> Tensor:
        """[N, sliders, positions]: the judge's probability of each slider's value."""
        assert self.judge
        sliders = []
        for j, attribute, value, category in slider_values(self.attributes):
            steps = []
            for position in SLIDER_POSITIONS:
                moved = self.attributes.with_slider(code, attribute.name, position, category)
                images = decoded(self.method, latent, moved)
                steps.append(self.judge.probabilities(images)[self.columns[j]][:, value])
            sliders.append(torch.stack(steps, 1))
        return torch.stack(sliders, 1)


# --- small validation inside the loop --------------------------------------------------------------------------------


def quick(
    method: Method,
    judge: Method | None,
    batches: Iterable[Batch],
    *,
    reduce_sum: ReduceSum = identity,
    prefix: str = "valid",
) -> dict[str, float]:
    """Reconstruction and swaps over some batches, for the loop: no intervals, no report.

    Args:
        method: encodes and decodes, or judges; its networks are put into eval mode and back.
        judge: knows every attribute of the method; None leaves the swaps out.
        batches: this rank's batches, columns as the method's attributes. Every rank must call, if with no batch.
        reduce_sum: sum over all ranks of a tensor on the device of the batches (the method's, where there is none).

    Returns:
        `valid/mse`, `valid/psnr`, `valid/swap_accuracy` (balanced, mean over attributes), `.NAME` (balanced),
        `.NAME_to_VALUE`, `valid/judge_accuracy` and `.NAME` (balanced, real images). What no record tells is left out;
        of a judge there are the last two only.
    """
    attributes, slides = method.attributes, isinstance(method, Encodes)
    judge = judge if slides else method
    seer = JudgedBy(judge) if judge else None
    columns = seer.columns(attributes) if seer else []
    names: list[tuple[str, str, str | None, str]] = []  # images, attribute, start, to; as pairs of sums
    for attribute in attributes:
        for value in attribute.values:
            names.append(("real", attribute.name, None, attribute.value_name(value)))
            for step in range(1, attribute.k):
                to = attribute.value_name((value + step) % attribute.k)
                names.append(("swap", attribute.name, attribute.value_name(value), to))
    place = {name: i for i, name in enumerate(names)}
    device = next((p.device for network in method.networks.values() for p in network.parameters()), torch.device("cpu"))
    sums = torch.zeros(3 + 2 * len(names), dtype=torch.float64, device=device)
    with evaluating([*method.networks.values(), *(judge.networks.values() if judge else ())]):
        for batch in batches:
            with torch.inference_mode():
                sums += _quick_sums(method, seer, columns, batch, place).to(device)
    sums = reduce_sum(sums.clone()).cpu()
    if not sums[0]:
        return {}
    out = {f"{prefix}/mse": float(sums[1] / sums[0]), f"{prefix}/psnr": float(sums[2] / sums[0])} if slides else {}
    share = {name: float(sums[3 + 2 * i] / sums[4 + 2 * i]) for name, i in place.items() if sums[4 + 2 * i]}
    for images, what in (("real", "judge_accuracy"), ("swap", "swap_accuracy")):
        balanced = []
        for attribute in attributes:
            own = {name: value for name, value in share.items() if name[:2] == (images, attribute.name)}
            if not own:
                continue
            balanced.append(sum(own.values()) / len(own))
            out[f"{prefix}/{what}.{attribute.name}"] = balanced[-1]
            if images == "swap":
                for to in map(attribute.value_name, attribute.values):
                    ends = [value for name, value in own.items() if name[3] == to]
                    if ends:
                        out[f"{prefix}/{what}.{attribute.name}_to_{to}"] = sum(ends) / len(ends)
        if balanced:
            out[f"{prefix}/{what}"] = sum(balanced) / len(balanced)
    return out


def _quick_sums(method: Method, seer: JudgedBy | None, columns: Sequence[int], batch: Batch, place: dict) -> Tensor:
    """[3 + 2 * places]: records, sums of MSE and PSNR, then right and counted of each place."""
    assert batch.images is not None
    attributes, labels = method.attributes, batch.attributes
    sums = torch.zeros(3 + 2 * len(place), dtype=torch.float64, device=labels.device)
    sums[0] = len(labels)
    latent = None
    if isinstance(method, Encodes):
        latent = method.encode(batch.images, labels)
        error = metrics.mse(decoded(method, latent, attributes.code(labels)), batch.images)
        sums[1], sums[2] = error.sum(), metrics.psnr(error).sum()
    if seer is None:
        return sums

    def add(name: tuple[str, str, str | None, str], right: Tensor, counted: Tensor) -> None:
        sums[3 + 2 * place[name]] += (right & counted).sum()
        sums[4 + 2 * place[name]] += counted.sum()

    real = seer.probabilities(batch.images)
    for j, attribute in enumerate(attributes):
        label = attribute.hard(labels[:, j])
        for value in attribute.values:
            preds = real[columns[j]].argmax(1)
            add(("real", attribute.name, None, attribute.value_name(value)), preds == value, label == value)
    if latent is None:
        return sums
    for j, step, changed, target in attributes.swaps(labels):
        preds = seer.probabilities(decoded(method, latent, attributes.code(changed)))[columns[j]].argmax(1)
        attribute, label = attributes[j], attributes[j].hard(labels[:, j])
        for start in attribute.values:
            to = attribute.value_name((start + step) % attribute.k)
            add(("swap", attribute.name, attribute.value_name(start), to), preds == target, label == start)
    return sums
