"""Everything that depends on which attributes there are: columns, codes, logits, sliders, and labels moved to other values.

A **label** is what the data stores: 0 … k-1 for a binary or k-way attribute, a number in [0, 1] for a continuous one, -1
where it is unknown. A **code** is what a decoder reads: k columns for each attribute (2 for binary and continuous), one-hot
for a known label, as in the official code. A **slider** is what a person moves: -1 is absent, 1 is present, and beyond is
exaggerated. With a = (slider + 1) / 2, the code of a binary attribute is (1 - a, a). A slider at -1 or 1 is therefore
exactly the code of the label 0 or 1.
"""

import difflib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fader.draws import Draws

Kind = Literal["binary", "k-way", "continuous"]
Head = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Attribute:
    """One attribute. `categories` names the k values of a k-way attribute, in label order; empty otherwise."""

    name: str
    kind: Kind = "binary"
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        if self.kind not in ("binary", "k-way", "continuous"):
            raise ValueError(f"attribute {self.name}: kind {self.kind!r} is none of binary, k-way, continuous")
        if (self.kind == "k-way") != bool(self.categories):
            raise ValueError(f"attribute {self.name}: categories are given for k-way attributes, and only for them")
        if self.kind == "k-way" and len(set(self.categories)) < 2:
            raise ValueError(f"attribute {self.name}: a k-way attribute needs at least two distinct categories")

    @property
    def k(self) -> int:
        """Columns of the attribute in a code."""
        return len(self.categories) if self.kind == "k-way" else 2

    @property
    def values(self) -> tuple[int, ...]:
        """The labels a swap can ask for: every category; the two ends of a binary or continuous attribute."""
        return tuple(range(self.k))

    def value_name(self, value: int) -> str:
        """How tables call a value: the category, or 0 / 1."""
        return self.categories[value] if self.categories else str(value)

    def logits_width(self, head: Head) -> int:
        """Scores that a classifier gives: k under softmax, one for a binary attribute under sigmoid, one for a continuous one."""
        if self.kind == "continuous" or (self.kind == "binary" and head == "sigmoid"):
            return 1
        return self.k

    def hard(self, labels: Tensor) -> Tensor:
        """Labels [N] as int64 values, -1 where unknown; a continuous label stands at its nearer end."""
        if self.kind == "continuous":
            labels = torch.where(labels < 0, labels, (labels >= 0.5).to(labels.dtype))
        return labels.long()

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "categories": list(self.categories)}


class Attributes(tuple[Attribute, ...]):
    """An ordered list of attributes; column j of a label tensor belongs to the j-th of them."""

    def __new__(cls, attributes: Iterable[Attribute]) -> "Attributes":
        made = super().__new__(cls, attributes)
        twice = sorted({name for name in made.names if made.names.count(name) > 1})
        if twice:
            raise ValueError(f"attribute {twice[0]!r} is named twice")
        return made

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self)

    def __repr__(self) -> str:
        return f"Attributes({', '.join(self.names)})"

    def to_list(self) -> list[dict[str, Any]]:
        return [attribute.to_dict() for attribute in self]

    @staticmethod
    def from_list(entries: Sequence[dict[str, Any]]) -> "Attributes":
        return Attributes([Attribute(e["name"], e["kind"], tuple(e.get("categories", ()))) for e in entries])

    def index(self, name: str) -> int:  # type: ignore[override]
        """Column of an attribute. Raises ValueError: no such attribute; the message offers the nearest name."""
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(name, self.names, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.names)}"
        raise ValueError(f"unknown attribute {name!r}; {hint}")

    def select(self, names: Sequence[str]) -> "Attributes":
        """The named attributes, in the order named. Raises ValueError: a name is unknown or stands twice."""
        return Attributes(self[self.index(name)] for name in names)

    @property
    def code_width(self) -> int:
        return sum(attribute.k for attribute in self)

    def code_slices(self) -> list[slice]:
        """Where each attribute's columns stand in a code."""
        return _slices([attribute.k for attribute in self])

    def code(self, labels: Tensor) -> Tensor:
        """Labels [N, A] to decoder code [N, code_width] float32.
        One-hot for a known category, (1 - v, v) for a continuous value, 1/k in every column for an unknown label.
        Raises ValueError: the number of columns is wrong."""
        self.check_width(labels)
        columns = []
        for j, attribute in enumerate(self):
            label = labels[:, j]
            if attribute.kind == "continuous":
                columns.append(torch.stack([1 - label, label], 1).float())
            else:
                categories = torch.arange(attribute.k, device=labels.device)
                columns.append((label[:, None] == categories).float())
            columns[-1] = torch.where((label < 0)[:, None], 1.0 / attribute.k, columns[-1])
        return torch.cat(columns, 1) if columns else labels.new_zeros(len(labels), 0)

    def members(self, labels: Tensor) -> Tensor:
        """The code, but with 0 in every column of an unknown label: the values that each record is known to have.
        Raises ValueError: the number of columns is wrong."""
        code = self.code(labels)
        known = [(labels[:, j : j + 1] >= 0).expand(-1, attribute.k) for j, attribute in enumerate(self)]
        return torch.where(torch.cat(known, 1), code, 0.0) if known else code

    def with_slider(self, code: Tensor, name: str, slider: float | Tensor, category: int | None = None) -> Tensor:
        """A copy of `code` with one attribute's slider moved.

        code: [N, code_width]. slider: a number or [N]: -1 = absent, 1 = present, beyond = exaggerated.
        category: which value of a k-way attribute the slider belongs to. At 1 the code is exactly that category, at -1 the
            category is absent and the others share the weight evenly.
        Raises ValueError: unknown attribute; a k-way attribute without category, or a category it does not have.
        """
        j = self.index(name)
        attribute = self[j]
        if attribute.kind == "k-way":
            if category is None or not 0 <= category < attribute.k:
                raise ValueError(f"{name} has {attribute.k} values; say which one slides, as {name}.{attribute.categories[0]}=1")
        else:
            category = 1
        strength = (torch.as_tensor(slider, dtype=code.dtype, device=code.device).expand(len(code)) + 1) / 2
        block = ((1 - strength) / (attribute.k - 1))[:, None].repeat(1, attribute.k)
        block[:, category] = strength
        code = code.clone()
        code[:, self.code_slices()[j]] = block
        return code

    def resolve(self, spec: str) -> tuple[str, int | None]:
        """`Name` or `Name.category` (its name or number) to (name, category).
        Raises ValueError: unknown attribute or category."""
        if spec in self.names:
            return spec, None
        name, dot, value = spec.rpartition(".")
        if not dot:
            self.index(spec)
        attribute = self[self.index(name)]
        if attribute.kind != "k-way":
            raise ValueError(f"{name} is {attribute.kind}; write {name}=1, without .{value}")
        if value in attribute.categories:
            return name, attribute.categories.index(value)
        if value.isdigit() and int(value) < attribute.k:
            return name, int(value)
        raise ValueError(f"{name} has no value {value!r}; it has {', '.join(attribute.categories)}")

    def logits_width(self, head: Head) -> int:
        return sum(attribute.logits_width(head) for attribute in self)

    def blocks(self, logits: Tensor, head: Head) -> list[Tensor]:
        """[N, logits_width] to one [N, width] block an attribute. Raises ValueError: the width is wrong."""
        widths = [attribute.logits_width(head) for attribute in self]
        if logits.ndim != 2 or logits.shape[1] != sum(widths):
            raise ValueError(f"logits are {tuple(logits.shape)}; {self!r} with a {head} head needs [N, {sum(widths)}]")
        return [logits[:, s] for s in _slices(widths)]

    def probabilities(self, logits: Tensor, head: Head = "softmax") -> list[Tensor]:
        """One [N, k] block an attribute: the probability of each value; for a continuous one (1 - v, v)."""
        out = []
        for block in self.blocks(logits.float(), head):
            if block.shape[1] == 1:
                present = torch.sigmoid(block[:, 0])
                out.append(torch.stack([1 - present, present], 1))
            else:
                out.append(torch.softmax(block, 1))
        return out

    def preds(self, logits: Tensor, head: Head = "softmax") -> Tensor:
        """[N, A] float labels: the most probable value; the number itself for a continuous attribute."""
        both = zip(self, self.probabilities(logits, head))
        return torch.stack([p[:, 1] if a.kind == "continuous" else p.argmax(1).float() for a, p in both], 1)

    def flipped(self, labels: Tensor, draws: Draws) -> Tensor:
        """The wrong labels the encoder aims for: 1 - y if binary or continuous, a random other category if k-way.
        Unknown labels stay unknown. Source: Lample et al. 2017, arXiv:1706.00409; the k-way rule as its authors answered in
        facebookresearch/FaderNetworks issue 11."""
        self.check_width(labels)
        columns = []
        for j, attribute in enumerate(self):
            label = labels[:, j]
            if attribute.kind == "k-way":
                other = (label + 1 + draws.integers(f"flip.{attribute.name}", attribute.k - 1)) % attribute.k
            else:
                other = 1 - label
            columns.append(torch.where(label < 0, label, other))
        return torch.stack(columns, 1)

    def resampled(self, draws: Draws) -> Tensor:
        """[N, A] labels drawn uniformly over each attribute's values ([0, 1] for a continuous one)."""

        def drawn(attribute: Attribute) -> Tensor:
            name = f"resample.{attribute.name}"
            return draws.uniform(name) if attribute.kind == "continuous" else draws.integers(name, attribute.k).float()

        return torch.stack([drawn(attribute) for attribute in self], 1)

    def swapped(self, labels: Tensor, name: str, value: int) -> Tensor:
        """A copy of the labels [N, A] with one attribute set to `value` in every row."""
        labels = labels.clone()
        labels[:, self.index(name)] = value
        return labels

    def swaps(self, labels: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield every change of one attribute to another of its values, for all records at once.
        Step s of an attribute with k values moves each record from its label v to (v + s) mod k, so that k - 1 decodes serve all
        ordered pairs. Records whose label is unknown are moved as if it were 0; nobody should count them.
        Yields: column, step, the changed labels [N, A], the value asked for [N] int64."""
        for j, attribute in enumerate(self):
            start = attribute.hard(labels[:, j]).clamp(min=0)
            for step in range(1, attribute.k):
                target = (start + step) % attribute.k
                changed = labels.clone()
                changed[:, j] = target.to(labels.dtype)
                yield j, step, changed, target

    def joint(self, labels: Tensor) -> Tensor:
        """[N] int64: the number of a record's values of all attributes together; -1 where one of them is unknown."""
        number, known = torch.zeros(len(labels), dtype=torch.int64, device=labels.device), (labels >= 0).all(1)
        for j, attribute in enumerate(self):
            number = number * attribute.k + attribute.hard(labels[:, j])
        return torch.where(known, number, -1)

    def moved_jointly(self, labels: Tensor, draws: Draws, name: str) -> Tensor:
        """Labels [N, A] of other joint values, drawn for each record; a record with an unknown label stays as it is."""
        count, start = math.prod(attribute.k for attribute in self), self.joint(labels)
        target, columns = (start + 1 + draws.integers(name, count - 1)) % count, []
        for attribute in reversed(self):
            columns.insert(0, target % attribute.k)
            target = target // attribute.k
        return torch.where(start[:, None] < 0, labels, torch.stack(columns, 1).to(labels.dtype))

    def check_labels(self, labels: Tensor) -> None:
        """Raises ValueError when a label is neither one of its attribute's values nor -1. Training does not call it each step."""
        self.check_width(labels)
        for j, attribute in enumerate(self):
            label = labels[:, j]
            if attribute.kind == "continuous":
                wrong = ((label < 0) & (label != -1)) | (label > 1)
            else:
                wrong = (label != label.round()) | (label < -1) | (label >= attribute.k)
            if wrong.any():
                found = f"{label[wrong][0].item():g}"
                raise ValueError(f"{attribute.name} has the label {found}; it is {attribute.kind}, k={attribute.k}")

    def check_width(self, labels: Tensor) -> None:
        """Raises ValueError when labels are not [N, A]."""
        if labels.ndim != 2 or labels.shape[1] != len(self):
            raise ValueError(f"labels are {tuple(labels.shape)}; {self!r} needs [N, {len(self)}]")


def one_changed(attributes: Attributes, labels: Tensor, shares: Tensor, draws: Draws) -> Tensor:
    """A copy of the labels [N, A] with one attribute of each record, drawn for it, moved to another value.
    shares: [N, A], how common the value of each label is. A record's attributes are drawn in inverse proportion to it, so that a
        rare value is changed about as often as a common one."""
    waits = -torch.log1p(-draws.uniform("changed", (len(attributes),))) * shares  # the shortest of exponential times
    chosen = waits.argmin(1, keepdim=True)
    return torch.where(chosen == torch.arange(len(attributes), device=labels.device), attributes.flipped(labels, draws), labels)


def _slices(widths: Sequence[int]) -> list[slice]:
    return [slice(end - width, end) for width, end in zip(widths, itertools.accumulate(widths))]

