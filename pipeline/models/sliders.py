"""Read what a person writes about attributes: a slider's position, or what a photo shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fader.attributes import Attribute, Attributes


@dataclass(frozen=True)
class Slider:
    """One slider and its position.

    category: the value of a k-way attribute that it moves. value: -1 = absent, 1 = present, beyond = exaggerated.
    """

    attribute: str
    category: int | None
    value: float

    def name(self, attributes: Attributes) -> str:
        """Return its name as `parse_slider` reads it: `Smiling`, or `Beard.moustache`."""
        if self.category is None:
            return self.attribute
        return f"{self.attribute}.{attributes[attributes.index(self.attribute)].categories[self.category]}"


def parse_slider(attributes: Attributes, name: str, value: str | float) -> Slider:
    """Read `Smiling`, 1.5; `Beard.moustache`, 1; or `Beard`, "moustache", which is the same. Raises ValueError: unknown
    attribute or category; a value that is no number."""
    attribute, category = _resolve(attributes, name)
    if attribute.kind == "k-way" and category is None:
        if value not in attribute.categories:
            raise ValueError(
                f"{name}={value}: {name} is one of {', '.join(attribute.categories)}; "
                f"write {name}={attribute.categories[0]} or {name}.{attribute.categories[0]}=1"
            )
        return Slider(attribute.name, attribute.categories.index(str(value)), 1.0)
    number = _number(name, value, "-1 is absent, 1 is present, beyond is exaggerated")
    return Slider(attribute.name, category, number)


def parse_label(attributes: Attributes, name: str, value: str | float) -> float:
    """Read one of a picture's own labels: 0 or 1, a category's name or number, or a share. Raises ValueError: unknown
    attribute, or a value that it does not have."""
    attribute, category = _resolve(attributes, name)
    if category is not None:
        raise ValueError(f"{name}={value}: write {attribute.name}={attribute.value_name(category)}")
    if attribute.kind == "k-way" and value in attribute.categories:
        return float(attribute.categories.index(str(value)))
    possible = ", ".join(attribute.categories) or ("from 0 to 1" if attribute.kind == "continuous" else "0 or 1")
    number = _number(name, value, f"{name} is {possible}")
    allowed = 0 <= number <= 1 if attribute.kind == "continuous" else number in attribute.values
    if not allowed:
        raise ValueError(f"{name}={value}: {name} is {possible}")
    return number


def moved(attributes: Attributes, code: Tensor, sliders: Sequence[Slider]) -> Tensor:
    for slider in sliders:
        code = attributes.with_slider(code, slider.attribute, slider.value, slider.category)
    return code


def _resolve(attributes: Attributes, name: str) -> tuple[Attribute, int | None]:
    resolved, category = attributes.resolve(name)
    return attributes[attributes.index(resolved)], category


def _number(name: str, value: str | float, scale: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value}: not a number; {scale}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}: not a finite number; {scale}")
    return number
