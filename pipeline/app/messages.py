"""What the page and the server say to each other over the WebSocket.

Text is JSON. A binary message is the length of its JSON (4 bytes, big-endian), that JSON, then a picture's bytes.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

_Name = Annotated[str, Field(max_length=300)]
_Number = Annotated[int, Field(ge=0)]
_Sliders = Annotated[dict[_Name, float], Field(max_length=1_000)]
_CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _message(kind: str, **fields: Any) -> type[BaseModel]:
    return create_model(kind.title(), __config__=_CONFIG, kind=(Literal[kind], ...), **{n: (t, ...) for n, t in fields.items()})


Photo = _message("photo", name=_Name, align=bool)  # its bytes follow. align: find and cut out faces; else the crop rule cuts it
Drawn = _message("drawn", number=Annotated[int, Field(ge=0, le=999_999)])  # a drawn face, or a sampler's of this seed
Choose = _message("choose", face=_Number)  # another face of the photo
Move = _message("move", number=int, sliders=_Sliders)  # the face with these sliders moved; the answer has the same number
Strip = _message("strip", slider=_Name, sliders=_Sliders)  # steps of one slider, from -2 to 2, beside the others
Save = _message("save", pasted=bool, sliders=_Sliders)  # a PNG of the square, or of the whole photo with the edited face in it
Live = _message("live", sliders=_Sliders)  # a camera's frame, whose bytes follow; the next comes when this one is back
Models = _message("models")  # name the models that can be opened, and the runs that can be watched
Pick = _message("pick", address=_Name)  # go on with another model; the page gives its photo again
Watch = _message("watch", run=_Name, size=int)  # a run's curves and newest picture, unless its spool still has this size
Next = _message("next")  # the next picture of a study
Rated = _message("rated", natural=bool, value=_Number)  # what was said of it, value: the number of the one it shows
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
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "big") + text + picture
