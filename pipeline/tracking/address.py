"""Say which MLflow store is in use, keep its password out of everything that is written, and refuse what is no address."""

import os
import re
from pathlib import Path
from typing import TextIO
from urllib.parse import unquote

_VARIABLE = "MLFLOW_TRACKING_URI"


def asked_for() -> str | None:
    return os.environ.get(_VARIABLE) or None


_IN_QUERY = re.compile(r"([?&][\w-]*(?:password|passwd|pwd|token|secret|key|signature|sig)=)[^&\s'\"]+", re.IGNORECASE)


def without_password(text: str) -> str:
    """Return a text, such as an address or an error, as it may be shown and kept."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    text = _IN_QUERY.sub(r"\1***", text)
    user, at, _ = (asked_for() or "").partition("://")[2].rpartition("@")
    password = user.partition(":")[2]
    if not at or len(password) <= 3:
        return text
    return text.replace(f"{user}@", "").replace(password, "***").replace(unquote(password), "***")


def named(uri: str) -> str:
    """Return a store's name in files: without its password, and a relative SQLite path made absolute."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return without_password(uri)


def check(uri: str) -> None:
    """Raise ValueError for a server's address without http://, which MLflow would take for a folder."""
    if re.fullmatch(r"(localhost|[\w-]+(\.[\w-]+)+|[\w-]+(?=:\d))(:\d+)?(/.*)?", uri) and not Path(uri).is_dir():
        raise ValueError(f"{_VARIABLE} is {uri}, which is no address: write http://{uri} (or https://{uri})")


class WithoutPasswords:
    """A stream into which no password is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_password(text))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
