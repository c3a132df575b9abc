"""Settings that say beside each field what it means and which values it takes."""

import dataclasses
import typing
from typing import Any, Literal


def setting(default: Any, about: str, *, least: float | None = None, most: float | None = None) -> Any:
    """A field of a settings dataclass.
    about: what the setting means, for who reads the code. least, most: the bounds of its value, both allowed."""
    return dataclasses.field(default=default, metadata={"about": about, "least": least, "most": most})


class Settings:
    """Base of settings dataclasses: each value is held to the bounds and the choices of its field.
    Raises ValueError: a value is outside its bounds, or none of its choices."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                raise ValueError(f"{field.name} {value!r} is none of {', '.join(typing.get_args(hint))}")
            least, most = field.metadata.get("least"), field.metadata.get("most")
            if value is not None and least is not None and value < least:
                raise ValueError(f"{field.name} is {value}; it must be at least {least}")
            if value is not None and most is not None and value > most:
                raise ValueError(f"{field.name} is {value}; it must be at most {most}")
