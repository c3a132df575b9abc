"""Read what a launcher left in the environment, and meet the other processes of a launch."""

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

log = logging.getLogger(__name__)

OTHER_WAYS = {  # what Accelerate's launcher sets for ways of training that this system does not know: words and variables
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "torch.compile (dynamo)": "ACCELERATE_DYNAMO_BACKEND",
}
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # where Accelerate looks
_PATIENCE_SECONDS = {False: 2.0, True: 30.0}  # without and with a launcher; processes that are there meet at once
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's words


@dataclass(frozen=True)
class Launcher:
    """What Accelerate's launcher left in the environment. deepspeed: its settings, None when it was not asked for."""

    precision: str
    deepspeed: dict[str, Any] | None

    @staticmethod
    def read() -> "Launcher":
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
                raise ValueError(f"{who} {what}, the experiment says precision: {precision}, which counts; leave out the other")


def refuse_other_ways() -> None:
    """Raise ValueError when the launcher asks for a way of training that this system does not know.
    Mostly nobody meant it: without --config_file Accelerate takes the answers that were once given to `accelerate config`."""
    for way, name in OTHER_WAYS.items():
        if os.environ.get(name, "").lower() not in ("", "no", "false", "0"):
            raise ValueError(
                f"the launcher asks for {way} ({name}={os.environ[name]}), which this system does not know; if nobody asked, "
                "it is a default that `accelerate config` left: name a file, as --config_file launch/accelerate/one_node.yaml"
            )


def refuse_leftovers() -> None:
    """Raise ValueError when the environment names one process of a launch, and not the others' number or meeting place."""
    alone = {"RANK": "0", "LOCAL_RANK": "-1", **dict.fromkeys(_SIZES, "1")}
    said = {name: os.environ[name] for name, value in alone.items() if os.environ.get(name, "") not in ("", value)}
    if not (os.environ.get("MASTER_PORT") or "0").isdecimal() and said:
        said["MASTER_PORT"] = os.environ["MASTER_PORT"]
    whole = "MASTER_ADDR" in os.environ and any(os.environ.get(name) for name in _SIZES)
    if said and not dist.is_initialized() and not (whole and all(map(str.isdecimal, said.values()))):
        words = " ".join(f"{name}={value}" for name, value in said.items())
        raise ValueError(
            f"the environment says {words}, as a launcher does, but not all that processes of a launch need (WORLD_SIZE, "
            f"MASTER_ADDR, MASTER_PORT); if no launcher set that, it is left over: 'unset {' '.join(said)}'"
        )


def launched() -> bool:
    """Return whether a launcher (Accelerate's, torchrun) started this process and watches over it."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Say what this process waits for while the processes of a launch look for one another, and let signals end it.
    Torch waits for them outside Python, where no handler is heard, and variables that are left over make it wait for nobody.
    There is nothing to save yet."""
    sizes = {name: os.environ[name] for name in _SIZES if os.environ.get(name, "1") not in ("", "1")}
    if not sizes or dist.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    place = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    said = " ".join(f"{name}={value}" for name, value in sizes.items())
    others = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    unset = f"; if no launcher set that, it is left over: end this with Ctrl-C, and 'unset {' '.join([*sizes, *others])}'"
    helps = "" if launched() else unset
    words = f"waiting at {place} for the other processes of a launch, because the environment says {said}{helps}"
    timer = threading.Timer(_PATIENCE_SECONDS[launched()], log.warning, (words,))
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in heard.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in heard.items():
            signal.signal(number, handler)


def _launched(name: str) -> str:
    value = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "")
    return "" if value.lower() in ("none", "auto") else value
