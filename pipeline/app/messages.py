"""What the page and the server say to each other over the WebSocket.

Text is JSON. A binary message is the length of its JSON (4 bytes, big-endian), that JSON, then a picture's bytes.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

_Name = Annotated[str, Field(max_length=300)]
_Sliders = Annotated[dict[_Name, float], Field(max_length=1_000)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Photo(_Message):
    """A photo, whose bytes follow. align: find the faces and cut them out; otherwise the crop rule cuts the whole photo."""

    kind: Literal["photo"]
    name: _Name
    align: bool


class Drawn(_Message):
    """Begin with a face that nobody has: a drawn one, or the one that a sampler makes of this number as its seed."""

    kind: Literal["drawn"]
    number: int = Field(ge=0, le=999_999)


class Choose(_Message):
    """Take another face of the photo."""

    kind: Literal["choose"]
    face: int = Field(ge=0)


class Move(_Message):
    """Show the face with these sliders moved; the answer carries the same number."""

    kind: Literal["move"]
    number: int
    sliders: _Sliders


class Strip(_Message):
    """Show steps of one slider, from -2 to 2, beside the other sliders."""

    kind: Literal["strip"]
    slider: _Name
    sliders: _Sliders


class Save(_Message):
    """Give the picture as a PNG: the square, or the whole photo with the edited face in it."""

    kind: Literal["save"]
    pasted: bool
    sliders: _Sliders


class Live(_Message):
    """Edit the face in a frame of a camera, whose bytes follow; the page sends the next when it has this one back."""

    kind: Literal["live"]
    sliders: _Sliders


class Models(_Message):
    """Name the models that can be opened, and the runs that can be watched."""

    kind: Literal["models"]


class Pick(_Message):
    """Go on with another model; the page gives its photo again."""

    kind: Literal["pick"]
    address: _Name


class Watch(_Message):
    """Give a run's curves and newest picture, unless its spool still has this size."""

    kind: Literal["watch"]
    run: _Name
    size: int


class Next(_Message):
    """Show the next picture of a study."""

    kind: Literal["next"]


class Rated(_Message):
    """Keep what was said of a study's picture, and show the next. value: the number of the value that it shows."""

    kind: Literal["rated"]
    natural: bool
    value: int = Field(ge=0)


Message = Photo | Drawn | Choose | Move | Strip | Save | Live | Models | Pick | Watch | Next | Rated
_ANY: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def read(data: str | bytes) -> tuple[Message, bytes]:
    """Return a message and the bytes that follow it. Raises ValueError: it is none of these messages."""
    rest = b""
    if isinstance(data, bytes):
        end = 4 + int.from_bytes(data[:4], "big")
        data, rest = data[4:end], data[end:]
    try:
        return _ANY.validate_json(data), rest
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "message"
        raise ValueError(f"the server does not understand this message: {where}: {first['msg']}") from None


def packed(head: dict[str, Any], picture: bytes) -> bytes:
    """Return a binary message."""
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + text + picture
