"""Which judge may speak about a model's pictures, and what it reads off them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fader.attributes import Attribute, Attributes
from pipeline.models import capabilities

if TYPE_CHECKING:
    from pipeline.images import Preprocessing
    from pipeline.models.model import Model


class Reader:
    """A judge's readings of pictures, for a model whose attributes it knows, perhaps among others.

    judged: all the attributes it knows.
    """

    def __init__(self, judge: Model, attributes: Attributes) -> None:
        self._judging, self.judged = judge.judging, judge.attributes
        self._columns = [judge.attributes.index(name) for name in attributes.names]

    def probabilities(self, images: Tensor) -> list[Tensor]:
        """Return one [N, k] block for each attribute that the judge knows."""
        return self._judging.probabilities(images)

    def own(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Of such blocks, return those of the model's attributes, in the model's order."""
        return [blocks[column] for column in self._columns]


def check_judge(
    judge: Model, attributes: Attributes, preprocessing: Preprocessing, source: str, partly: bool = False
) -> None:
    """Refuse a judge that cannot speak about the pictures of a model.

    Args:
        attributes, preprocessing: the model's. source: what errors call it.
        partly: a judge may do without attributes of the model, whose values are then estimated.

    Raises:
        ValueError: it does not judge, lacks an attribute or has it with other values, or sees images of another size
            or preprocessing.
    """
    if capabilities.judge(judge.method) is None:
        raise ValueError(f"{judge.source}: {judge.method.name} is not a judge; name a run or model of method 'judge'")
    known = {attribute.name: attribute for attribute in judge.attributes}
    for attribute in attributes:
        if attribute.name not in known and not partly:
            raise ValueError(
                f"the judge {judge.source} does not know {attribute.name}, which {source} changes "
                f"(it knows {', '.join(known)}); train a judge on the same attributes"
            )
        if known.get(attribute.name, attribute) != attribute:
            raise ValueError(
                f"the judge {judge.source} knows {attribute.name} as {_kind(known[attribute.name])}, "
                f"{source} as {_kind(attribute)}; train a judge on the same attributes"
            )
    if judge.preprocessing != preprocessing:
        raise ValueError(
            f"the judge {judge.source} sees images as {_describe(judge.preprocessing)}, {source} makes them as "
            f"{_describe(preprocessing)}; train a judge with the same preprocessing"
        )


def _kind(attribute: Attribute) -> str:
    return attribute.kind + (f" ({', '.join(attribute.categories)})" if attribute.categories else "")


def _describe(preprocessing: Preprocessing) -> str:
    return ", ".join(f"{name} {value}" for name, value in preprocessing.to_dict().items())
