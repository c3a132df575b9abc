"""What a launcher left in the environment for the engine to take over."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OTHER_WAYS = {  # what Accelerate's launcher sets for ways of training that this system does not know: words and variables
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "torch.compile (dynamo)": "ACCELERATE_DYNAMO_BACKEND",
}
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's words


@dataclass(frozen=True)
class Launcher:
    """What Accelerate's launcher left in the environment. deepspeed: its settings, None when it was not asked for."""

    precision: str
    deepspeed: dict[str, Any] | None

    @staticmethod
    def read() -> Launcher:
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") or "no"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
            return Launcher(precision, None)
        file = _launched("CONFIG_FILE")
        if file:
            try:
                return Launcher(precision, json.loads(Path(file).read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise ValueError(f"the launcher's DeepSpeed file {file} is not readable as JSON: {error}") from None
        tree: dict[str, Any] = {"zero_optimization": {"stage": int(_launched("ZERO_STAGE") or 2)}}  # as Accelerate
        for device in ("optimizer", "param"):
            place = _launched(f"OFFLOAD_{device.upper()}_DEVICE")
            if place:
                tree["zero_optimization"][f"offload_{device}"] = {"device": place}
        for name in ("GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
            value = os.environ.get(f"ACCELERATE_{name}", "auto").lower()
            if value not in ("", "none", "auto"):
                tree[name.lower()] = float(value)
        return Launcher(precision, tree)

    def check_precision(self, precision: str) -> None:
        """Raises ValueError when the launcher, or its DeepSpeed file, names another precision than the experiment."""
        named = {"the launcher says mixed precision": self.precision}
        for kind in ("bf16", "fp16"):
            if (self.deepspeed or {}).get(kind, {}).get("enabled") is True:
                named["the launcher's DeepSpeed file enables"] = kind
        for who, what in named.items():
            if what not in ("no", PRECISION[precision]):
                raise ValueError(
                    f"{who} {what}, the experiment says precision: {precision}; leave it out of the launcher, "
                    "the experiment owns it"
                )


def refuse_other_ways() -> None:
    """Raise ValueError when the launcher asks for a way of training that this system does not know.

    Mostly nobody meant it: without --config_file Accelerate takes the answers that were once given to `accelerate config`.
    """
    for way, name in OTHER_WAYS.items():
        if os.environ.get(name, "").lower() not in ("", "no", "false", "0"):
            raise ValueError(
                f"the launcher asks for {way} ({name}={os.environ[name]}), which this system does not know; if nobody asked, "
                "it is a default that `accelerate config` left: name a file, as --config_file launch/accelerate/one_node.yaml"
            )


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """An environment variable has another value while this lasts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _launched(name: str) -> str:
    value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "")
    return "" if value.lower() in ("none", "auto") else value
