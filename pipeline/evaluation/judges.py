"""Which judge may speak about a model's pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fader.attributes import Attribute, Attributes
from fader.method import Judges

if TYPE_CHECKING:
    from pipeline.images import Preprocessing
    from pipeline.models import Model


def check_judge(judge: Model, attributes: Attributes, preprocessing: Preprocessing, source: str) -> None:
    """Refuse a judge that cannot speak about the pictures of a model.

    Args:
        attributes, preprocessing: the model's. source: what errors call it.

    Raises:
        ValueError: it does not judge, lacks an attribute or has it with other values, or sees images of another size
            or preprocessing.
    """
    if not isinstance(judge.method, Judges):
        raise ValueError(f"{judge.source}: {judge.method.name} is not a judge; name a run or model of method 'judge'")
    known = {attribute.name: attribute for attribute in judge.attributes}
    for attribute in attributes:
        if attribute.name not in known:
            raise ValueError(
                f"the judge {judge.source} does not know {attribute.name}, which {source} changes "
                f"(it knows {', '.join(known)}); train a judge on the same attributes"
            )
        if known[attribute.name] != attribute:
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
