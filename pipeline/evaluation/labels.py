"""Every slider of a model, in the order of the tables."""

from __future__ import annotations

from collections.abc import Iterator

from fader.attributes import Attribute, Attributes


def slider_values(attributes: Attributes) -> Iterator[tuple[int, Attribute, int, int | None]]:
    """Every slider: column, attribute, the value it raises, and that value again as `category` when k-way."""
    for j, attribute in enumerate(attributes):
        for value in attribute.values if attribute.kind == "k-way" else (1,):
            yield j, attribute, value, value if attribute.kind == "k-way" else None
