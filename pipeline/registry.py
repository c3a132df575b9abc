"""Models for use: load one from a run, an export or MLflow's registry; export a run; register a version.

An export is a folder: `model.safetensors` ("network/parameter or buffer"), `card.json`, and, when a judge belongs to
the model, its export in `judge/`. It is plain tensors and JSON; nothing in it is pickled. A registered version is an
MLflow pyfunc model "from code": a file of two lines that calls `served_model` below, with an export as its artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.method import METHODS, Aligns, Decodes, Encodes, Judges, Method
from pipeline import checkpoint as checkpoints
from pipeline import config, tracking
from pipeline.images import Preprocessing
from pipeline.shards import ShardSet

logger = logging.getLogger(__name__)

FORMAT = 1
ALIAS = "challenger"
BATCH_SIZE = 64
LICENCE = (
    "Weights carry the terms of the images they were trained on (see the data digest). "
    "CelebA is for non-commercial research only, and so is a model trained on it."
)
_OURS = "attribute-sliders"
_PACKAGES = (_OURS, "torch", "safetensors", "numpy", "Pillow", "mlflow")
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


# --- a model and its sliders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slider:
    """One slider: -1 = absent, 1 = present, beyond = exaggerated. category: the value of a k-way attribute it moves."""

    attribute: str
    category: int | None
    value: float


@dataclass
class Model:
    """A method with its weights, in eval mode, and what is known about it.

    card: what an export's card.json holds. source: where it came from, for messages. run: the folder of the run it is
    of. variant: which of that run's weights, as its files' names end: "" for the newest as they are used, else such as
    "-images-64000" or "-raw".
    """

    method: Method
    card: dict[str, Any]
    attributes: Attributes
    preprocessing: Preprocessing
    judge: Model | None
    source: str
    run: Path | None = None
    variant: str = ""

    def slider(self, name: str, value: str | float) -> Slider:
        """`Smiling`, 1.5; `Beard.moustache`, 1; or `Beard`, "moustache", which is the same.

        Raises:
            ValueError: unknown attribute or category; a value that is no number.
        """
        attribute, category = self._resolve(name)
        if attribute.kind == "k-way" and category is None:
            if value not in attribute.categories:
                raise ValueError(
                    f"{name}={value}: {name} is one of {', '.join(attribute.categories)}; "
                    f"write {name}={attribute.categories[0]} or {name}.{attribute.categories[0]}=1"
                )
            return Slider(attribute.name, attribute.categories.index(str(value)), 1.0)
        number = _number(name, value, "-1 is absent, 1 is present, beyond is exaggerated")
        return Slider(attribute.name, category, number)

    def label(self, name: str, value: str | float) -> float:
        """One of a photo's own labels as a person writes it: 0 or 1, a category's name or number, or a share.

        Raises:
            ValueError: unknown attribute, or a value that it does not have.
        """
        attribute, category = self._resolve(name)
        if category is not None:
            raise ValueError(f"{name}={value}: write {attribute.name}={attribute.value_name(category)}")
        if attribute.kind == "k-way" and value in attribute.categories:
            return float(attribute.categories.index(str(value)))
        there = ", ".join(attribute.categories) or ("from 0 to 1" if attribute.kind == "continuous" else "0 or 1")
        number = _number(name, value, f"{name} is {there}")
        allowed = 0 <= number <= 1 if attribute.kind == "continuous" else number in attribute.values
        if not allowed:
            raise ValueError(f"{name}={value}: {name} is {there}")
        return number

    def _resolve(self, name: str) -> tuple[Attribute, int | None]:
        try:
            attribute, category = self.attributes.resolve(name)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        return self.attributes[self.attributes.index(attribute)], category

    @torch.inference_mode()
    def labels(self, images: Tensor, given: Mapping[str, float] | None = None) -> tuple[Tensor, dict[str, str]]:
        """What pictures show, as the decoder needs it to reconstruct them.

        Each attribute is taken from `given`, else read by the model's judge, else estimated: the value with which the
        reconstruction is nearest to the picture, one attribute after another, twice around.

        Args:
            images: [N, C, S, S] in [-1, 1].
            given: labels that the user knows, for all the pictures.

        Returns:
            [N, A] labels, and for each attribute "given", "judge" or "estimated".
        """
        self._must_edit()
        self._check_images(images)
        given = given or {}
        labels = torch.full((len(images), len(self.attributes)), -1.0, device=images.device)
        how = {}
        read = self._judged(images)
        for j, attribute in enumerate(self.attributes):
            if attribute.name in given:
                labels[:, j], how[attribute.name] = given[attribute.name], "given"
            elif attribute.name in read:
                labels[:, j], how[attribute.name] = read[attribute.name], "judge"
            else:
                how[attribute.name] = "estimated"
        unknown = [name for name, way in how.items() if way == "estimated"]
        return self._estimated(images, labels, unknown), how

    def _judged(self, images: Tensor) -> dict[str, Tensor]:
        if self.judge is None:
            return {}
        logits = self.judge.method.judge(images)  # type: ignore[attr-defined]
        preds = self.judge.attributes.preds(logits, self.judge.method.settings.head)
        return {a.name: preds[:, j] for j, a in enumerate(self.judge.attributes) if a in tuple(self.attributes)}

    def _estimated(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
        latent = self.method.encode(images, labels) if names else None  # type: ignore[attr-defined]
        for name in [*names, *names] if len(names) > 1 else names:
            attribute = self.attributes[self.attributes.index(name)]
            values = [0.0, 0.25, 0.5, 0.75, 1.0] if attribute.kind == "continuous" else attribute.values
            errors = []
            for value in values:
                code = self.attributes.code(self.attributes.swapped(labels, name, value))
                decoded = self.method.decode(latent, code)  # type: ignore[attr-defined]
                errors.append((decoded - images).square().flatten(1).mean(1))
            best = torch.stack(errors, 1).argmin(1)
            labels = labels.clone()
            labels[:, self.attributes.index(name)] = torch.tensor(values, device=labels.device)[best].float()
        return labels

    @torch.inference_mode()
    def edit(self, images: Tensor, labels: Tensor, settings: Sequence[Sequence[Slider]]) -> Tensor:
        """Decode pictures under several settings of the sliders; an empty setting is the reconstruction.

        Args:
            images: [N, C, S, S] in [-1, 1].
            labels: [N, A], the pictures' own.

        Returns:
            [N, len(settings), C, S, S] in [-1, 1].
        """
        self._must_edit()
        self._check_images(images)
        latent = self.method.encode(images, labels)  # type: ignore[attr-defined]
        decoded = []
        for sliders in settings:
            code = self.attributes.code(labels)
            for slider in sliders:
                code = self.attributes.with_slider(code, slider.attribute, slider.value, slider.category)
            decoded.append(self.method.decode(latent, code).float().clamp(-1, 1))  # type: ignore[attr-defined]
        return torch.stack(decoded, 1)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """What a judge sees: [N, attributes.code_width], a block of k probabilities an attribute.

        Raises:
            ValueError: the model does not judge.
        """
        if not isinstance(self.method, Judges):
            raise ValueError(f"{self.source}: {self.method.name} is not a judge")
        self._check_images(images)
        return torch.cat(self.attributes.probabilities(self.method.judge(images), self.method.settings.head), 1)

    @torch.inference_mode()
    def corrections(self, windows: Tensor) -> Tensor:
        """By which similarity the faces in windows are off: [N, 4], real and imaginary part of factor and of shift.

        Raises:
            ValueError: the model does not align.
        """
        if not isinstance(self.method, Aligns):
            raise ValueError(f"{self.source}: {self.method.name} does not align faces")
        off = self.method.align(windows)
        return torch.cat([torch.view_as_real(off.factor), torch.view_as_real(off.shift)], 1)

    def _must_edit(self) -> None:
        if not (isinstance(self.method, Encodes) and isinstance(self.method, Decodes)):
            raise ValueError(f"{self.source}: {self.method.name} does not encode and decode; it has no sliders to move")

    def _check_images(self, images: Tensor) -> None:
        size = (self.method.channels, self.method.image_size, self.method.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(f"{self.source}: pictures are {list(images.shape)}; it takes {['N', *size]}")


def _number(name: str, value: str | float, scale: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{name}={value}: not a number; {scale}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}: not a finite number; {scale}")
    return number


# --- load -------------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    checkpoint: str = "latest",
    ema: bool = True,
    own_judge: bool = True,
    attributes: Sequence[str] | None = None,
) -> Model:
    """A model for use.

    Args:
        source: a run's folder, an export's folder, models:/NAME@ALIAS or models:/NAME/VERSION. RUN@best and
            RUN@images-64000 name one of a run's checkpoints.
        checkpoint: which checkpoint of a run whose source names none: latest (the newest sound one), best or images-N.
        ema: take the averaged weights where there are any.
        own_judge: load the model's judge too, if it names one.
        attributes: what the model must slide, in any order; None takes any.

    Raises:
        ValueError: nothing is there, it is damaged, or it has other attributes; the message says what to do.
    """
    folder, which = parse_source(source)
    if which is None and checkpoint != "latest":
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{source} is no run: only a run keeps checkpoints to choose from ({checkpoint} was asked for)")
        which = checkpoint
    if str(source).startswith("models:"):
        model = _from_registry(str(source), ema, own_judge)
    elif (folder / "card.json").is_file():
        model = _from_export(folder, ema, own_judge)
    elif (folder / "config.yaml").is_file():
        model = _from_run(folder, which or "latest", ema, own_judge)
    elif not folder.exists():
        raise ValueError(f"{source}: there is no such folder; give a run, an export or models:/NAME@{ALIAS}")
    else:
        raise ValueError(f"{source} is neither a run (config.yaml) nor an export (card.json)")
    if attributes is not None and set(attributes) != set(model.attributes.names):
        raise ValueError(
            f"{source} was trained on {', '.join(model.attributes.names)}, not on {', '.join(attributes)}: "
            "take a model of the same attributes"
        )
    return model


def parse_source(source: str | Path) -> tuple[Path, str | None]:
    """RUN@best to a folder and "best"; anything else, a folder with @ in its name too, to itself and None."""
    folder, at, which = str(source).rpartition("@")
    if at and not str(source).startswith("models:") and not Path(source).exists():
        return Path(folder), which
    return Path(source), None


def variant_of(run: Path, which: str) -> str:
    """How the names of files about one of a run's checkpoints end: "" for the newest, "-images-64000" for another.

    Raises:
        ValueError: as `pipeline.checkpoint.named`.
    """
    chosen = checkpoints.named(run, which)
    newest = which == "latest" or chosen == checkpoints.found(run)[0]
    return "" if newest else f"-images-{checkpoints.images_of(chosen)}"


def _from_run(run: Path, which: str, ema: bool, own_judge: bool) -> Model:
    experiment = config.load(run / "config.yaml")
    chosen = checkpoints.named(run, which)
    about = json.loads((run / "run.json").read_text()) if (run / "run.json").is_file() else {}
    if "attributes" in about:
        attributes = Attributes.from_list(about["attributes"])
    else:
        attributes = ShardSet.open(experiment.data.path).attributes
    method = config.build_method(experiment, attributes)
    source = str(run) if which == "latest" else f"{run}@{which}"
    _fill(method, checkpoints.read_networks(chosen, ema), source)
    images, averages = checkpoints.images_of(chosen), (chosen / "ema.safetensors").exists()
    variant = variant_of(run, which) + ("-raw" if averages and not ema else "")
    preprocessing = experiment.data.preprocessing()
    card = {
        "format": FORMAT,
        **_about_method(method),
        "preprocessing": preprocessing.to_dict(),
        "images_seen": images,
        "ema": ema and averages,
        "metrics": _evaluated(run, chosen, variant),
        "config": experiment.to_dict(),
        "config_digest": experiment.digest,
        "data_digest": about.get("data_digest"),
        "commit": about.get("commit"),
        "packages": _versions(),
        "licence": LICENCE,
    }
    judge = None
    if own_judge and experiment.judge:
        if experiment.judge.startswith("models:") or Path(experiment.judge).exists():
            judge = load(experiment.judge)
            _check_judge(method, preprocessing, judge, source)
        else:
            logger.warning("%s names the judge %s, which is not here: it goes without one", run, experiment.judge)
    return Model(method, card, method.attributes, preprocessing, judge, source, run, variant)


def _from_export(folder: Path, ema: bool, own_judge: bool) -> Model:
    try:
        card = json.loads((folder / "card.json").read_text())
        version = card["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'card.json'} is not a model's card: damaged; export the run again") from None
    if version > FORMAT:
        raise ValueError(f"{folder} has format {version}, this version reads up to {FORMAT}: upgrade to use it")
    if card["ema"] and not ema:
        raise ValueError(f"{folder} holds averaged weights only; load its run for the others")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} has a card but no model.safetensors: incomplete; export the run again")
    if _digest(weights) != card["weights_digest"]:
        raise ValueError(f"{weights} does not match the digest in its card: damaged, or of another model; export again")
    kind = METHODS.get(card["method"])
    if kind is None:
        raise ValueError(f"{folder}: unknown method {card['method']!r}; there are: {', '.join(sorted(METHODS))}")
    known = {field.name for field in dataclasses.fields(kind.Settings)}
    extra = sorted(set(card["settings"]) - known)
    if extra:
        raise ValueError(f"{folder}: {card['method']} has no setting {extra[0]!r} here: upgrade to use this model")
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in card["settings"].items()}
    attributes = Attributes.from_list(card["attributes"])
    method = kind(kind.Settings(**settings), attributes, card["image_size"], card["channels"])
    networks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(weights).items():
        network, _, key = name.partition("/")
        networks.setdefault(network, {})[key] = tensor
    _fill(method, networks, str(folder))
    has_judge = own_judge and (folder / "judge" / "card.json").is_file()
    judge = _from_export(folder / "judge", True, False) if has_judge else None
    return Model(method, card, attributes, Preprocessing.from_dict(card["preprocessing"]), judge, str(folder))


def _from_registry(address: str, ema: bool, own_judge: bool) -> Model:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    with _store(None) as mlflow, tempfile.TemporaryDirectory() as folder:
        version = _version(mlflow, address, **match.groupdict())
        path = mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=folder)
        cards = sorted(Path(path).rglob("card.json"), key=lambda card: len(card.parts))
        if not cards:
            raise ValueError(f"{address} holds no export (card.json); it was not registered by 'fader register'")
        model = _from_export(cards[0].parent, ema, own_judge)
    model.source = address
    if model.judge is not None:
        model.judge.source = f"{address} (its judge)"
    model.card["registered"] = {"name": version.name, "version": int(version.version)}
    return model


def _version(mlflow: Any, address: str, name: str, alias: str | None, version: str | None) -> Any:
    """The registered version behind an address.

    Raises:
        ValueError: no such name, alias or version; the message lists what there is.
    """
    client, store = mlflow.MlflowClient(), tracking.without_password(mlflow.get_tracking_uri())
    try:
        there = client.get_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models(max_results=20)]
        raise ValueError(
            f"{address}: no model {name!r} is registered in {store} (there are: {', '.join(names) or 'none'}); "
            "register one with 'fader register RUN --name NAME', or set MLFLOW_TRACKING_URI to another store"
        ) from None
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        aliases = ", ".join(f"@{alias} (version {number})" for alias, number in there.aliases.items())
        versions = [int(found.version) for found in client.search_model_versions(f"name='{name}'")]
        newest = f", versions up to {max(versions)}" if versions else ""
        raise ValueError(f"{address}: {name} has no such version; it has {aliases or 'no alias'}{newest}") from None


def _fill(method: Method, networks: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Load every network's weights, and let them stand in eval mode."""
    if set(networks) != set(method.networks):
        raise ValueError(
            f"{source}: holds the networks {', '.join(sorted(networks))}; "
            f"its method has {', '.join(sorted(method.networks))}"
        )
    for name, network in method.networks.items():
        try:
            network.load_state_dict(networks[name], strict=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{source}: {name} does not take these weights: {why}") from None
        network.eval().requires_grad_(False)


def _check_judge(method: Method, preprocessing: Preprocessing, judge: Model, source: str) -> None:
    """Raises ValueError when a judge cannot look at this model's pictures."""
    if not isinstance(judge.method, Judges):
        raise ValueError(f"{judge.source} is {judge.method.name}, not a judge: name another one for {source}")
    if judge.preprocessing != preprocessing:
        raise ValueError(
            f"the judge {judge.source} reads {judge.preprocessing}, {source} reads {preprocessing}: "
            "train a judge with the same data settings"
        )
    ours = {attribute.name: attribute for attribute in method.attributes}
    different = [a.name for a in judge.attributes if ours.get(a.name, a) != a]
    if different:
        raise ValueError(f"the judge {judge.source} knows {different[0]} with other values than {source} does")


# --- export -----------------------------------------------------------------------------------------------------------


def export(
    run: str | Path,
    out: str | Path,
    judge: str | Path | None = None,
    *,
    checkpoint: str = "latest",
    ema: bool = True,
) -> Path:
    """Write a model for use: model.safetensors, card.json, and its judge's export in judge/. All of it or nothing.

    Args:
        run, checkpoint, ema: what `load` takes.
        out: the export's folder; an export that is there already is replaced.
        judge: the judge to put in; by default the one the run names.

    Raises:
        ValueError: the run cannot be loaded, the judge does not fit, or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export; choose another folder")
    model = load(run, checkpoint=checkpoint, ema=ema, own_judge=judge is None)
    if judge is not None:
        model.judge = load(judge)
        _check_judge(model.method, model.preprocessing, model.judge, model.source)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        _write(model, temporary)
        temporary.chmod(0o755)
        if out.exists():
            old = temporary.with_suffix(".old")
            os.replace(out, old)
            os.replace(temporary, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(model: Model, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, network in model.method.networks.items()
        for key, tensor in network.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    card = model.card | {"weights_digest": _digest(folder / "model.safetensors")}
    if model.judge is not None:
        _write(model.judge, folder / "judge")
        card["judge"] = model.judge.source
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def _about_method(method: Method) -> dict[str, Any]:
    return {
        "method": method.name,
        "settings": json.loads(json.dumps(method.settings_dict())),
        "networks": {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in method.networks.items()
        },
        "attributes": method.attributes.to_list(),
        "image_size": method.image_size,
        "channels": method.channels,
    }


def _evaluated(run: Path, chosen: Path, variant: str) -> dict[str, float]:
    """The numbers `fader evaluate` left in the run's folder; empty when these weights were not evaluated."""
    path = run / "report" / f"evaluation-test{variant}.json"
    if not path.is_file():
        return {}
    if path.stat().st_mtime < chosen.stat().st_mtime:
        logger.warning("%s is older than %s: its numbers are left out", path, chosen.name)
        return {}
    return json.loads(path.read_text())["metrics"]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _requirements() -> list[str]:
    """What a served model needs beside this package, as pip reads it (a build's own suffix, "+cpu", is on no index)."""
    return [f"{name}=={version.partition('+')[0]}" for name, version in _versions().items() if name != _OURS]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- MLflow's registry ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """A registered version. run_id: the MLflow run it is linked to, if the run was tracked. export: its folder."""

    name: str
    version: int
    alias: str
    store: str
    run_id: str | None
    export: Path

    @property
    def address(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def register(
    run: str | Path,
    name: str,
    *,
    alias: str = ALIAS,
    out: str | Path | None = None,
    judge: str | Path | None = None,
    checkpoint: str = "latest",
    ema: bool = True,
) -> Version:
    """Export a run and make it a version of a registered model, linked to the run's MLflow run.

    The store is MLFLOW_TRACKING_URI, else the one the run was tracked in, else MLflow's default. What tracking has not
    delivered yet is delivered first, so that the link leads somewhere.

    Args:
        run: the run's folder, or RUN@best or RUN@images-N.
        name: the registered model; made when there is none of that name.
        alias: points to the new version afterwards.
        out: where the export is written; RUN/export by default.
        judge, checkpoint, ema: as in `export`.

    Raises:
        ValueError: the run cannot be exported, MLflow does not take the name, or its store does not answer.
    """
    source, run = run, parse_source(run)[0]
    if not re.fullmatch(r"[^/:@.%\"'][^/:@%\"']*", name):
        raise ValueError(f"{name!r} cannot name a registered model; use letters, digits, dashes and underscores")
    folder = export(source, out or run / "export", judge, checkpoint=checkpoint, ema=ema)
    model = load(folder)
    if tracking.undelivered(run):
        tracking.sync(run)
    with _store(tracking.store_of(run), create=True) as mlflow:
        store = tracking.without_password(mlflow.get_tracking_uri())
        run_id = tracking.run_id_of(run)
        version = _register(mlflow, model, folder, name, alias, run_id)
    return Version(name, int(version.version), alias, store, run_id, folder)


def _register(mlflow: Any, model: Model, folder: Path, name: str, alias: str, run_id: str | None) -> Any:
    client, card = mlflow.MlflowClient(), model.card
    tags = {key: str(card[key]) for key in ("method", "image_size", "data_digest", "config_digest", "commit")}
    tags |= {"attributes": ", ".join(model.attributes.names), "images_seen": str(card["images_seen"])}
    tags |= {"weights_digest": card["weights_digest"], "licence": card["licence"]}
    tags |= {f"metric.{_tag(key)}": f"{value:.6g}" for key, value in card["metrics"].items()}
    if run_id is not None:
        experiment_id = client.get_run(run_id).info.experiment_id
    else:
        about = client.get_experiment_by_name(wanted := card["config"]["tracking"]["experiment"])
        experiment_id = about.experiment_id if about else client.create_experiment(wanted)
    params = {key: str(card[key]) for key in ("method", "image_size", "images_seen")}
    logged = client.create_logged_model(experiment_id, name, source_run_id=run_id, tags=tags, params=params)
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "model.py"
        code.write_text(_CODE)
        mlflow.pyfunc.log_model(
            name=name,
            model_id=logged.model_id,
            python_model=str(code),
            artifacts={"export": str(folder)},
            signature=_signature(model),
            input_example=_example(model),
            pip_requirements=_requirements(),
        )
    if run_id is not None:
        output = mlflow.entities.LoggedModelOutput(logged.model_id, step=card["images_seen"])
        client.log_outputs(run_id, [output])
        about = {"timestamp": int(time.time() * 1000), "step": card["images_seen"], "model_id": logged.model_id}
        metric = mlflow.entities.Metric
        rows = [metric(_tag(key), value, run_id=run_id, **about) for key, value in card["metrics"].items()]
        for first in range(0, len(rows), 500):
            client.log_batch(run_id, metrics=rows[first : first + 500])
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{logged.model_id}"
    words = _describe(model)
    version = client.create_model_version(name, source, run_id, tags, description=words, model_id=logged.model_id)
    client.set_registered_model_alias(name, alias, version.version)
    return version


def _tag(name: str) -> str:
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


def _describe(model: Model) -> str:
    card = model.card
    lines = [
        f"{card['method']} at {card['image_size']} pixels after {card['images_seen']:,} images"
        + ("." if isinstance(model.method, Aligns) else f"; sliders: {', '.join(model.attributes.names)}."),
        *(f"{key}: {value:.4g}" for key, value in list(card["metrics"].items())[:20]),
        card["licence"],
    ]
    return "\n\n".join(lines)


def _signature(model: Model) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = TensorSpec(np.dtype("float32"), (-1, *_input_size(model)))
    if isinstance(model.method, Aligns):
        return ModelSignature(Schema([images]), Schema([TensorSpec(np.dtype("float32"), (-1, 4))]))
    if not isinstance(model.method, Decodes):
        probabilities = TensorSpec(np.dtype("float32"), (-1, model.attributes.code_width))
        return ModelSignature(Schema([images]), Schema([probabilities]))
    params = ParamSchema([ParamSpec("sliders", "string", "{}"), ParamSpec("attributes", "string", "{}")])
    return ModelSignature(Schema([images]), Schema([images]), params)


def _input_size(model: Model) -> tuple[int, int, int]:
    side = model.method.window_size if isinstance(model.method, Aligns) else model.method.image_size
    return model.method.channels, side, side


def _example(model: Model) -> Any:
    images = np.zeros((1, *_input_size(model)), np.float32)
    if not isinstance(model.method, Decodes):
        return images
    first = model.attributes[0]
    name = f"{first.name}.{first.categories[0]}" if first.kind == "k-way" else first.name
    return images, {"sliders": json.dumps({name: 1.0})}


_CODE = '''"""A model of attribute sliders, served: images and slider positions in, edited images out."""
from mlflow.models import set_model

from pipeline.registry import served_model

set_model(served_model())
'''


def served_model() -> Any:
    """The MLflow pyfunc model that answers for a registered version; see `answer` for what it takes."""
    import mlflow

    class Served(mlflow.pyfunc.PythonModel):
        def load_context(self, context: Any) -> None:
            self.model = load(context.artifacts["export"])
            self.model.source = self.model.card["config"]["name"]

        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
            return answer(self.model, model_input, params or {})

    return Served()


def answer(model: Model, images: np.ndarray, params: Mapping[str, str]) -> np.ndarray:
    """What a served model returns.

    Args:
        images: float32 [N, C, S, S] in [-1, 1], cropped and resized as the card's preprocessing says.
        params: `sliders`, a JSON object such as {"Smiling": 1.5, "Beard": "moustache"}; `attributes`, a JSON object of
            the pictures' own labels where they are known (the judge reads the others).

    Returns:
        Edited pictures, float32 as the input; of a judge, probabilities [N, code_width]; of an aligner, which takes
        its windows, corrections [N, 4].

    Raises:
        ValueError: unknown attribute, a value that is no number, or pictures of another size.
    """
    batches = torch.from_numpy(np.array(images, np.float32)).split(BATCH_SIZE)
    if isinstance(model.method, Aligns):
        return torch.cat([model.corrections(batch) for batch in batches]).numpy()
    if not isinstance(model.method, Decodes):
        return torch.cat([model.probabilities(batch) for batch in batches]).numpy()
    sliders = [model.slider(name, value) for name, value in _object(params, "sliders").items()]
    given = {name: model.label(name, value) for name, value in _object(params, "attributes").items()}
    edited = [model.edit(batch, model.labels(batch, given)[0], [sliders])[:, 0] for batch in batches]
    return torch.cat(edited).numpy()


def _object(params: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(params.get(name) or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {params.get(name)!r}; a JSON object is needed, as {{"Smiling": 1.5}}')
    return value


@contextlib.contextmanager
def _store(uri: str | None, create: bool = False) -> Iterator[Any]:
    """MLflow, speaking to one store and waiting seconds, not minutes, for one that is gone; its errors as ValueError.

    The environment variables that say so are MLflow's own, set while this lasts, where the user has not set them.

    Args:
        uri: the store; None takes MLFLOW_TRACKING_URI or MLflow's default.
        create: make the default store when there is none.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    wanted |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    ours = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(ours)
    import mlflow

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    store = mlflow.get_tracking_uri()
    try:
        database = store.removeprefix("sqlite:///")
        if database != store and not create and not Path(database).exists():
            raise ValueError(
                f"there is no MLflow store here ({database}); run this in the folder where the model was registered, "
                "or set MLFLOW_TRACKING_URI"
            )
        yield mlflow
    except mlflow.exceptions.MlflowException as error:
        raise ValueError(f"MLflow at {tracking.without_password(store)}: {tracking.reason(error)}") from None
    finally:
        for key in ours:
            os.environ.pop(key, None)
