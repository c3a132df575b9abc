"""What a rank hears of the world's wish that it ends."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pipeline.training import interruption
from pipeline.training.interruption import Listener, Reason


def send(number: signal.Signals, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)
        time.sleep(0.001)  # the handler runs between two lines of Python


def test_a_signal_that_is_repeated_changes_nothing_and_a_persons_word_counts_more():
    before = signal.getsignal(signal.SIGUSR1)
    with Listener() as listener:
        assert listener.heard() is Reason.NONE
        send(signal.SIGUSR1, 5)
        assert listener.heard() is Reason.SIGUSR1
        send(signal.SIGTERM, 5)
        send(signal.SIGUSR1)
        assert listener.heard() is Reason.SIGTERM
        send(signal.SIGINT, 2)
        assert listener.heard() is Reason.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_gone_is_heard_but_not_under_nohup(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with Listener() as listener:
            send(signal.SIGHUP)
            assert listener.heard() is (Reason.NONE if nohup else Reason.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_file_is_heard_and_one_from_before_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "_LOOK_SECONDS", 0.0)
    stop = tmp_path / "stop"
    stop.touch()
    with Listener() as listener:
        listener.look_for(stop)
        assert listener.heard() is Reason.NONE and not stop.exists()
        stop.touch()
        assert listener.heard() is Reason.STOP_FILE
        stop.unlink()
        assert listener.heard() is Reason.STOP_FILE, "what was heard stays heard"


def test_only_who_was_launched_minds_that_its_parent_is_gone(monkeypatch):
    for launched in (False, True):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none") if launched else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
        with Listener() as listener, monkeypatch.context() as patch:
            patch.setattr(os, "getppid", lambda: 1)
            assert listener.heard() is (Reason.LAUNCHER_GONE if launched else Reason.NONE)


def test_exit_codes():
    assert {reason.name: reason.exit_code for reason in Reason if reason} == {
        "STOP_FILE": 75, "SIGUSR1": 75, "LAUNCHER_GONE": 143, "SIGHUP": 129, "SIGTERM": 143, "SIGINT": 130,
    }  # fmt: skip
