"""Every method, one file each. Importing this package fills `fader.method.METHODS`."""

from __future__ import annotations

from fader.method import METHODS
from fader.methods.aligner import Aligner, AlignerSettings
from fader.methods.fader import Fader, FaderSettings
from fader.methods.judge import Judge, JudgeSettings

__all__ = ["METHODS", "Aligner", "AlignerSettings", "Fader", "FaderSettings", "Judge", "JudgeSettings"]
