"""Say on a model's card what it is: its method, its numbers and their limits, its terms, the packages it needs."""

import contextlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fader.method import Method
from fader.networks.normalization import num_parameters

logger = logging.getLogger(__name__)

FORMAT = 2  # since 2 without the networks that only training needs
_TERMS = {
    "celeba": "CelebA is for non-commercial research only, and so is a model trained on it.",
    "faces": "The faces are drawn by this project and come under its own licence, Apache-2.0.",
}
_ANY_TERMS = "Ask whoever owns them. CelebA is for non-commercial research only, and so is a model trained on it."
_OURS = "attribute-sliders"
_PACKAGES = (_OURS, "torch", "safetensors", "numpy", "Pillow", "pydantic", "PyYAML", "mlflow")


def about_method(method: Method) -> dict[str, Any]:
    """Return what a card says of the method: enough to build it again, and the parameters of each of its networks."""
    return {
        "method": method.name,
        "settings": json.loads(json.dumps(method.settings_dict())),
        "networks": {name: num_parameters(network) for name, network in method.networks.items()},
        "attributes": method.attributes.to_list(),
        "image_size": method.image_size,
        "channels": method.channels,
    }


def licence(data: str | None) -> str:
    """Return the terms of a model that was trained on the data set of this name."""
    named = f" ({data})" if data else ""
    return f"Weights carry the terms of the images they were trained on{named}. {_TERMS.get(data or '', _ANY_TERMS)}"


def limits(card: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """Return what a user must know before trusting a model: how far its pictures and its numbers reach.

    card: the model's, without these. evaluation: what `evaluated` gave.
    """
    data, rule = card["data"], card["preprocessing"]
    known = [f"it reads pictures of {rule['image_size']}x{rule['image_size']} pixels, cut by the rule '{rule['crop']}'"]
    if data:
        known.append(f"it was trained on {data['records']['train']:,} pictures of {data['name']}; others may do worse")
    if not evaluation:
        known.append("it was not evaluated: no number says how well it works")
    return known + evaluation.get("warnings", [])


def evaluated(run: Path, chosen: Path, variant: str) -> dict[str, Any]:
    """Return the report `fader evaluate` left in the run's folder; empty when these weights were not evaluated."""
    path = run / "report" / f"evaluation-test{variant}.json"
    if not path.is_file():
        return {}
    if path.stat().st_mtime < chosen.stat().st_mtime:
        logger.warning("%s is older than %s: its numbers are left out", path, chosen.name)
        return {}
    return json.loads(path.read_text())


def versions_here() -> dict[str, str]:
    """Return the versions of the packages that decide what weights do, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def requirements() -> list[str]:
    """Return what a served model needs beside our own code, as pip reads it, without suffixes of builds such as "+cpu"."""
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions_here().items() if name != _OURS]
