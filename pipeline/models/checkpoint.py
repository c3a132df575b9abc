"""Write and read checkpoints: folders that are there whole or not at all, with a digest of every file.

A checkpoint is `RUN/checkpoints/images-000064000/`:

    networks.safetensors    "network/parameter or buffer"
    ema.safetensors         the same names, when a group keeps a moving average
    optimizers.safetensors  "network/parameter/moment"
    state.json              clock, stream counters, and whatever else the run hands over
    digests.json            sha256 of each file above

and `best.json` beside them names the one that validation found best, with the metric and its value.

It is written under a temporary name, flushed to disk and renamed. A reader takes the newest whose digests hold. Names
that begin with a dot are being written (`.tmp`), being removed (`.gone`), or about to be replaced (`.old`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.files import digest_of, replacing_folder, write_whole

if TYPE_CHECKING:  # a served model needs no engine and none of its libraries
    from pipeline.engine import State

log = logging.getLogger(__name__)

FORMAT = 2  # since 2 random numbers have another key
_PREFIX = "images-"
_BEST = "best.json"
_PARTS = ("networks", "ema", "optimizers")


def folder(run: Path) -> Path:
    return run / "checkpoints"


def _place(run: Path, images: int) -> Path:
    """Return the folder of the checkpoint at so many images seen, whether it is there or not."""
    return folder(run) / f"{_PREFIX}{images:012d}"


def images_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(".").removeprefix(_PREFIX).split(".")[0])


def write(run: Path, images: int, state: State, extra: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> Path:
    """Write one checkpoint; it is there whole or not at all. extra: JSON values that go into state.json. metrics: what was
    measured of this very state, by which the best are kept. Raises OSError: the disk refuses."""
    target = _place(run, images)
    story = json.dumps({"format": FORMAT, "images": images, "metrics": dict(metrics or {}), **extra}, indent=1)
    if target.exists() and _is_sound(target) and (target / "state.json").read_text() == story:
        return target
    with replacing_folder(target) as temporary:
        for part in _PARTS:
            tensors = getattr(state, part)
            if tensors:
                _save(tensors, temporary / f"{part}.safetensors")
        (temporary / "state.json").write_text(story)
        digests = {path.name: digest_of(path) for path in sorted(temporary.iterdir())}
        (temporary / "digests.json").write_text(json.dumps(digests, indent=1))
    return target


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its word for whatever the system refuses
        raise OSError(f"{path.parent.parent} takes no {path.name}: {error}") from error


def kept(run: Path) -> list[Path]:
    """Return every checkpoint of a run, newest first and unverified; one that was to be replaced where nothing replaced it."""
    whole = {path.name: path for path in folder(run).glob(f"{_PREFIX}*") if path.is_dir()}
    for old in folder(run).glob(f".{_PREFIX}*.old"):
        whole.setdefault(_place(run, images_of(old)).name, old)
    return [whole[name] for name in sorted(whole, reverse=True)]


def clear_unfinished(run: Path) -> None:
    """Remove what a kill left half written or half removed; put back what was to be replaced and was not."""
    for left in folder(run).glob(f".{_PREFIX}*"):
        whole = _place(run, images_of(left))
        if left.suffix == ".old" and not whole.exists():
            os.replace(left, whole)
        else:
            shutil.rmtree(left, ignore_errors=True)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill half-way leaves nothing that looks like one, because it gets another name first."""
    gone = checkpoint.with_name(f".{checkpoint.name.removeprefix('.')}.{os.getpid()}.gone")
    try:
        os.replace(checkpoint, gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("%s is not removed: %s", checkpoint, error)


def at(run: Path, images: int) -> Path | None:
    return next((path for path in kept(run) if images_of(path) == images), None)


def latest(run: Path, up_to: float = math.inf) -> Path | None:
    """The newest checkpoint, of at most `up_to` images seen, that holds what its digests say.

    Damaged ones are named in a warning and passed over.
    """
    for checkpoint in kept(run):
        if images_of(checkpoint) <= up_to and _is_sound(checkpoint):
            return checkpoint
    return None


def note_best(run: Path, images: int, about: Mapping[str, Any]) -> None:
    write_whole(folder(run) / _BEST, json.dumps({**about, "images": images}, indent=1))


def validated(run: Path) -> Path | None:
    """Return the checkpoint that validation found best; None when none was kept or the one that was is gone."""
    try:
        return at(run, int(json.loads((folder(run) / _BEST).read_text())["images"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def named(run: Path, which: str) -> Path:
    """A sound checkpoint by its name: latest, best or images-64000. Raises ValueError: there is none."""
    if which == "latest":
        newest = latest(run)
        if newest is None:
            raise ValueError(f"{run} has no sound checkpoint yet; train on with 'fader train --resume {run}'")
        return newest
    digits = which.removeprefix(_PREFIX)
    if which == "best":
        checkpoint = validated(run)
    elif which.startswith(_PREFIX) and digits.isdecimal():
        checkpoint = at(run, int(digits))
    else:
        raise ValueError(f"checkpoint {which!r} is none of latest, best, {_PREFIX}N")
    if checkpoint is None:
        there = [f"{_PREFIX}{images_of(path)}" for path in reversed(kept(run))]
        there += ["latest", *(["best"] if validated(run) else [])] if there else ["none"]
        raise ValueError(f"{run} keeps no checkpoint {which}; there are: {', '.join(there)}")
    check(checkpoint)
    return checkpoint


def finished(run: Path) -> bool:
    """Whether the run's newest sound checkpoint is the one with which its training ended."""
    newest = latest(run)
    return newest is not None and bool(json.loads((newest / "state.json").read_text()).get("finished"))


def metrics_of(checkpoint: Path) -> dict[str, float]:
    """What was measured of a checkpoint when it was written; nothing when it cannot be read."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text()).get("metrics", {}))
    except (OSError, ValueError):
        return {}


def by_metric(checkpoints: list[Path], metric: str, mode: Literal["max", "min"]) -> list[Path]:
    """Return those that have the metric, the best first, the earlier of equals first."""
    sign = -1 if mode == "max" else 1
    values = {path: metrics_of(path).get(metric, math.nan) for path in reversed(checkpoints)}
    return sorted((path for path, value in values.items() if math.isfinite(value)), key=lambda path: sign * values[path])


def _is_sound(checkpoint: Path) -> bool:
    try:
        check(checkpoint)
    except ValueError as error:
        log.warning("%s; the one before it is used", error)
        return False
    return True


def check(checkpoint: Path) -> None:
    """Hold a checkpoint against its digests; raise ValueError where it is unfinished or damaged, and say how."""
    try:
        digests = json.loads((checkpoint / "digests.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{checkpoint} has no readable digests.json: unfinished or damaged") from None
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{checkpoint} lacks {name}: damaged")
        try:
            actual = digest_of(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): damaged") from None
        if actual != digest:
            raise ValueError(f"{path} does not match its digest: damaged")


def read(checkpoint: Path) -> tuple[State, dict[str, Any]]:
    """Return the state of a verified checkpoint and its state.json; raise ValueError where a later version wrote it."""
    extra = json.loads((checkpoint / "state.json").read_text())
    if extra["format"] > FORMAT:
        raise ValueError(f"{checkpoint} has format {extra['format']}, this version reads up to {FORMAT}: upgrade to use it")
    from pipeline.engine import State

    files = {part: checkpoint / f"{part}.safetensors" for part in _PARTS}
    return State(**{part: load_file(path) if path.exists() else {} for part, path in files.items()}), extra


def read_networks(checkpoint: Path, ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """State dicts by network; with `ema` the averaged ones where there are any."""
    tensors = load_file(checkpoint / "networks.safetensors")
    averaged = checkpoint / "ema.safetensors"
    if ema and averaged.exists():
        tensors |= load_file(averaged)
    return by_network(tensors)


def by_network(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors named "network/key" as state dicts by network."""
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        network, _, key = name.partition("/")
        networks.setdefault(network, {})[key] = tensor
    return networks
