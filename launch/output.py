"""Give a command a standard output and error that cannot end it: a closed pipe, a full disk or a gone terminal costs words."""

import contextlib
import errno
import io
import os
import sys


class _Tolerant(io.FileIO):
    """A file descriptor that drops what it cannot take. failure: the first reason that is not a reader who left."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EBADF):
                self.failure = self.failure or error
            return len(data)


def make_tolerant() -> None:
    """Replace both streams of this process; they also write "?" for what the terminal's encoding does not have."""
    for number in range(3):  # in this order, because a new descriptor gets the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody listens in on it, as a test does
        with contextlib.suppress(OSError):
            stream and stream.flush()
        tolerant = io.TextIOWrapper(
            io.BufferedWriter(_Tolerant(number, "w", closefd=False)), encoding=stream.encoding if stream else "utf-8",
            errors="replace", line_buffering=number == 2 or os.isatty(number),
            write_through=bool(stream) and stream.write_through,
        )
        setattr(sys, name, tolerant)


def failures() -> list[str]:
    """Return what standard output did not take, in words, for standard error."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    failure = getattr(raw, "failure", None)
    return [f"note: standard output is not whole: {failure.strerror}"] if failure else []
