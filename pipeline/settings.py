"""Reads a method's settings from a plain tree: strictly, with nested keys, and with what earlier versions called them."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import pydantic

from fader.method import METHODS

MOVED: dict[str, dict[str, str]] = {  # by method: the old key, and where its value goes, to one place or more
    "fader": {
        "lambda_reconstruction": "reconstruction.weight", "lambda_max": "latent.weight", "lambda_shape": "latent.rise",
        "ramp_images": "latent.ramp_images", "warmup_images": "latent.warmup_images", "latent_dropout": "latent.dropout",
        "hidden_channels": "latent.hidden_channels classifier.hidden_channels", "discriminator_steps": "latent.steps",
        "latent_discriminator_learning_rate": "latent.learning_rate", "lambda_patch": "patch.weight",
        "patch_steps": "patch.steps", "patch_discriminator_learning_rate": "patch.learning_rate",
        "smooth_label": "patch.smooth_label", "lambda_classifier": "classifier.weight",
        "classifier_steps": "classifier.steps", "classifier_learning_rate": "classifier.learning_rate",
        "lambda_fisher": "solved.weight", "fisher_steps": "solved.steps", "fisher_half_life": "solved.half_life",
        "fisher_hidden": "solved.num_hidden",
    }
}  # fmt: skip
_ANY = dict.fromkeys(("leak_target", "feedback_images", "fisher_records", "fisher_ridge", "fisher_every"), ...)
GONE = {"fader": {**_ANY, "fool": "flipped", "critic": "moments"}}  # with the one value that changed nothing; ... = any
_TAKEN_BACK = "this was taken back, see docs/log.md"


def whither(method: str, key: str) -> str | None:
    """What a config that still has an old key of a method is told; None for a key that no version had."""
    if key in MOVED.get(method, {}):
        return "is now " + " and ".join(f"method.{new}" for new in MOVED[method][key].split())
    return "is no more: " + _TAKEN_BACK if key in GONE.get(method, {}) else None


def translated(method: str, settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings of a run or an export as this version writes them; those of this version stay as they are.
    Raises ValueError: they ask for what was taken back."""
    moved, gone, tree = MOVED.get(method, {}), GONE.get(method, {}), {}
    for key, value in settings.items():
        if value == "feedback" and key == "lambda_shape" or key in gone and gone[key] not in (..., value):
            raise ValueError(f"{source} was made with method.{key}: {value}; {_TAKEN_BACK}")
        if key in moved:
            for place in moved[key].split():
                part, _, name = place.partition(".")
                tree.setdefault(part, {})[name] = value
        elif key not in gone:
            tree[key] = value
    return tree


def method_settings(name: str, tree: Mapping[str, Any], source: str) -> Any:
    """A method's settings from a plain tree, read as strictly as the rest."""
    for key in tree:
        place = whither(name, str(key))
        if place and key not in METHODS[name].Settings.__dataclass_fields__:
            raise ValueError(f"{source}: method.{key} {place}")
    return _settings(METHODS[name].Settings, tree, "method", source)


def _settings(kind: type, tree: Mapping[str, Any], place: str, source: str) -> Any:
    """A settings dataclass from a plain tree; fields that are settings dataclasses themselves have nested keys."""
    hints = typing.get_type_hints(kind)
    check_keys(tree, {field.name for field in dataclasses.fields(kind)}, f"{place}.", source)
    given = {}
    for key, value in tree.items():
        if not dataclasses.is_dataclass(hints[key]):
            try:
                given[key] = _adapter(hints[key]).validate_json(json.dumps(value))
            except pydantic.ValidationError as error:
                raise ValueError(describe(error, source, place, key)) from None
        elif isinstance(value, Mapping):
            given[key] = _settings(hints[key], value, f"{place}.{key}", source)
        else:
            first = dataclasses.fields(hints[key])[0].name
            raise ValueError(f"{source}: {place}.{key} has keys of its own, such as {place}.{key}.{first} (found {value!r})")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {place}: {error}") from None


@lru_cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True))


def check_keys(tree: Mapping[str, Any], known: set[str], prefix: str, source: str) -> None:
    """Raises ValueError for a key that is not known; the nearest known one is offered."""
    for key in tree:
        if key not in known:
            raise ValueError(f"{source}: unknown key {prefix}{key}{nearest(str(key), known, prefix)}")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; there are: {', '.join(sorted(known))}"


def describe(error: pydantic.ValidationError, source: str, *outer: str) -> str:
    """The first fault that pydantic found, with its place, as one line."""
    first = error.errors()[0]
    place = ".".join(map(str, (*outer, *first["loc"])))
    what = first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f" (found {first['input']!r})"
    more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{source}: {place}: {what}{found}{more}"
