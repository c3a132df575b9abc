"""Every method and config begins with the losses it began with when tests/golden.json was written."""

from __future__ import annotations

import json

import pytest

from tests import golden

GOLDEN = json.loads(golden.FILE.read_text())
FAMILIES = golden.families()
# Processors and thread counts round differently, and Adam amplifies that: measured below 1e-6 in float64.
RELATIVE, ABSOLUTE = 1e-4, 1e-7


def off(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [
        f"{name}[{k}]: {a:g}, was {b:g}"
        for name in wanted
        for k, (a, b) in enumerate(zip(found[name], wanted[name], strict=True))
        if abs(a - b) > max(RELATIVE * abs(b), ABSOLUTE)
    ]


def test_every_method_and_config_has_its_losses():
    missing = FAMILIES.keys() - GOLDEN.keys()
    assert not missing, f"no golden losses of {', '.join(sorted(missing))}: python -m tests.golden writes them"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in GOLDEN])
def test_the_first_losses_are_what_they_were(name):
    wrong = off(golden.losses(FAMILIES[name]), GOLDEN[name])
    assert not wrong, f"{wrong[:5]}; if the change should alter results: python -m tests.golden"


def test_a_learning_rate_off_by_five_percent_is_seen(monkeypatch):
    step = golden.Engine._rate_factor
    monkeypatch.setattr(golden.Engine, "_rate_factor", lambda *given: 1.05 * step(*given))
    assert off(golden.losses(FAMILIES["method fader"]), GOLDEN["method fader"])
