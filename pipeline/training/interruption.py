"""Note what asks a run to end: a signal, a stop file, a terminal or a launcher that is gone. The loop heeds it.

Ranks hear of these things at different moments, or not all of them do. So each only notes what it heard; at a step
boundary the ranks agree on the largest `Reason` that any of them knows, save the same step and end together.
"""

import enum
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.engine.launcher import launched

EXIT_AGAIN = 75  # sysexits' EX_TEMPFAIL: all is saved, and the run wants to go on
STOP_FILE = "stop"
_LOOK_SECONDS = 1.0
_AT_ONCE = 3  # times Ctrl-C after which the process does not wait for a step boundary


class Reason(enum.IntEnum):
    """Why a run is asked to end. Where several reasons meet the largest counts: a person's word over a time limit."""

    NONE = 0
    STOP_FILE = 1
    SIGUSR1 = 2
    LAUNCHER_GONE = 3
    SIGHUP = 4
    SIGTERM = 5
    SIGINT = 6

    @property
    def exit_code(self) -> int:
        """75 when the run wants to go on in another job; 128 and the signal's number when somebody ended it."""
        if self in (Reason.STOP_FILE, Reason.SIGUSR1):
            return EXIT_AGAIN
        return 128 + (signal.SIGTERM if self is Reason.LAUNCHER_GONE else signal.Signals[self.name])

    def __str__(self) -> str:
        return {Reason.STOP_FILE: "its stop file", Reason.LAUNCHER_GONE: "the end of its launcher"}.get(self, self.name)


_SIGNALS = {signal.Signals[reason.name]: reason for reason in Reason if reason.name in signal.Signals.__members__}


class Interrupted(Exception):
    """The run was asked to end, and ended after its state was saved."""

    def __init__(self, reason: Reason, run: Path, images: int) -> None:
        super().__init__(f"stopped by {reason} after {images:,} images, state saved in {run}")
        self.reason = reason


class Listener:
    """While entered, signals are noted instead of ending the process; the third Ctrl-C ends it at once.
    Other signals may come as often as they like: a batch job repeats its own until all ranks have heard it."""

    def __init__(self) -> None:
        self._heard = Reason.NONE
        self._times = 0
        self._previous: dict[int, Any] = {}
        self._parent = os.getppid() if launched() else None
        self._stop_file: Path | None = None
        self._looked = -_LOOK_SECONDS

    def __enter__(self) -> "Listener":
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores it
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def look_for(self, stop_file: Path) -> None:
        """From now on this file ends the run; one that is left from before is removed. For one rank only.
        Raises OSError: there is one, and it cannot be removed."""
        stop_file.unlink(missing_ok=True)
        self._stop_file = stop_file

    def heard(self) -> Reason:
        """What this rank knows. Cheap: the stop file is looked for once a second."""
        reason = self._heard
        if self._parent is not None and os.getppid() != self._parent:
            reason = max(reason, Reason.LAUNCHER_GONE)
        if self._stop_file is not None and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._looked = time.monotonic()
            if self._stop_file.exists():
                self._heard = max(self._heard, Reason.STOP_FILE)
        return max(reason, self._heard)

    def _note(self, number: int, _: object) -> None:
        self._times += number == signal.SIGINT
        self._heard = max(self._heard, _SIGNALS[signal.Signals(number)])
        if self._times >= _AT_ONCE:
            raise KeyboardInterrupt
