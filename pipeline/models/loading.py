"""Load a model from a run, an export or MLflow's registry."""

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attributes
from fader.method import METHODS, Method
from fader.methods.judge import refuse_judges_networks
from pipeline import config, tracking
from pipeline.data.shards import ShardSet
from pipeline.files import digest_of
from pipeline.images import Preprocessing
from pipeline.models import checkpoint as checkpoints
from pipeline.models.card import FORMAT, about_method, evaluated, licence, limits, versions_here
from pipeline.models.judges import check_judge
from pipeline.models.model import Model
from pipeline.models.store import open_store
from pipeline.settings import method_settings, translated

logger = logging.getLogger(__name__)

ALIAS = "challenger"
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def load(source: str | Path, *, checkpoint: str = "latest", ema: bool = True, own_judge: bool = True) -> Model:
    """Load a model for use from a run's folder, RUN@best, RUN@images-64000, an export's folder, models:/NAME@ALIAS or
    models:/NAME/VERSION. checkpoint: of a run whose source names none: latest (the newest sound one), best or images-N.
    ema: take the averaged weights where there are any. own_judge: load the model's judge too, if it names one.

    Raises ValueError: nothing is there, or it is damaged; the message says what to do.
    """
    folder, which = parse_source(source)
    if which is None and checkpoint != "latest":
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{source} is no run: only a run keeps checkpoints to choose from ({checkpoint} was asked for)")
        which = checkpoint
    if str(source).startswith("models:"):
        return _from_registry(str(source), ema, own_judge)
    if (folder / "card.json").is_file():
        return _from_export(folder, ema, own_judge)
    if (folder / "config.yaml").is_file():
        return _from_run(folder, which or "latest", ema, own_judge)
    if not folder.exists():
        raise ValueError(f"{source}: there is no such folder; give a run, an export or models:/NAME@{ALIAS}")
    raise ValueError(f"{source} is neither a run (config.yaml) nor an export (card.json)")


def parse_source(source: str | Path) -> tuple[Path, str | None]:
    """Split RUN@best into a folder and "best"; give anything else, also a folder with @ in its name, and None."""
    folder, at, which = str(source).rpartition("@")
    if at and not str(source).startswith("models:") and not Path(source).exists():
        return Path(folder), which
    return Path(source), None


def variant_of(run: Path, which: str) -> str:
    """Return how names of files about one of a run's checkpoints end: "" for the newest, "-images-64000" for another."""
    chosen = checkpoints.named(run, which)
    newest = which == "latest" or chosen == checkpoints.kept(run)[0]
    return "" if newest else f"-images-{checkpoints.images_of(chosen)}"


def _from_run(run: Path, which: str, ema: bool, own_judge: bool) -> Model:
    experiment = config.load_run(run)
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
    preprocessing, evaluation = experiment.data.preprocessing(), evaluated(run, chosen, variant)
    card = {
        "format": FORMAT,
        **about_method(method),
        "preprocessing": dataclasses.asdict(preprocessing),
        "images_seen": images,
        "ema": ema and averages,
        "metrics": evaluation.get("metrics", {}),
        "intervals": evaluation.get("intervals", {}),
        "config": experiment.to_dict(),
        "config_digest": experiment.digest,
        "data_digest": about.get("data_digest"),
        "commit": about.get("commit"),
        "packages": versions_here(),
        "data": about.get("data"),
        "licence": licence((about.get("data") or {}).get("name")),
    }
    card["limits"] = limits(card, evaluation)
    judges = []
    for address in experiment.judges if own_judge else ():
        if address.startswith("models:") or Path(address).exists():
            judges.append(load(address))
            check_judge(judges[-1], method.attributes, preprocessing, source, partly=True)
        else:
            logger.warning("%s names the judge %s, which is not here: it goes without one", run, address)
    if "labels" in about:
        card["labels"] = about["labels"]
    model = Model(method, card, method.attributes, preprocessing, tuple(judges), source, run, variant)
    card["intended_use"] = [capability.use for capability in model.capabilities]
    return model


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
    if digest_of(weights) != card["weights_digest"]:
        raise ValueError(f"{weights} does not match the digest in its card: damaged, or of another model; export again")
    kind = METHODS.get(card["method"])
    if kind is None:
        raise ValueError(f"{folder}: unknown method {card['method']!r}; there are: {', '.join(sorted(METHODS))}")
    settings = translated(kind.name, card["settings"], str(folder))
    try:
        settings = method_settings(kind.name, settings, str(folder))
    except ValueError as error:
        raise ValueError(f"{error} (a later version may know it: upgrade)") from None
    attributes = Attributes.from_list(card["attributes"])
    method = kind(settings, attributes, card["image_size"], card["channels"])
    refuse_judges_networks(method)
    _fill(method, checkpoints.by_network(load_file(weights)), str(folder))
    kept = [folder / name for name in judge_folders(card) if own_judge and (folder / name / "card.json").is_file()]
    judges = tuple(_from_export(one, True, False) for one in kept)
    return Model(method, card, attributes, Preprocessing(**card["preprocessing"]), judges, str(folder))


def judge_folders(card: Mapping[str, Any]) -> list[str]:
    """Return the names of the folders of an export's judges, as its card counts them: judge, judge-2 and so on."""
    named = card.get("judge")
    count = 1 if named is None or isinstance(named, str) else len(named)
    return ["judge", *(f"judge-{number}" for number in range(2, count + 1))]


def _from_registry(address: str, ema: bool, own_judge: bool) -> Model:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    with open_store(None) as mlflow, tempfile.TemporaryDirectory() as folder:
        version = version_of(mlflow, address, **match.groupdict())
        place = f"models:/{version.name}/{version.version}"
        if "artifacts" in {Path(entry.path).name for entry in mlflow.artifacts.list_artifacts(artifact_uri=place)}:
            mlflow.artifacts.download_artifacts(f"{place}/artifacts", dst_path=folder)  # our code lies beside it
        cards = sorted(Path(folder).rglob("card.json"), key=lambda card: len(card.parts))
        if not cards:
            raise ValueError(f"{address} holds no export (card.json); it was not registered by 'fader register'")
        model = _from_export(cards[0].parent, ema, own_judge)
    model.source = address
    for folder_name, judge in zip(judge_folders(model.card), model.judges):
        judge.source = f"{address} (its {folder_name})"
    model.card["registered"] = {"name": version.name, "version": int(version.version)}
    return model


def version_of(mlflow: Any, address: str, name: str, alias: str | None, version: str | None) -> Any:
    """Return the registered version behind an address. Raises ValueError: there is none."""
    client, store = mlflow.MlflowClient(), tracking.without_password(mlflow.get_tracking_uri())
    try:
        registered = client.get_registered_model(name)
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
        aliases = ", ".join(f"@{alias} (version {number})" for alias, number in registered.aliases.items())
        versions = [int(entry.version) for entry in client.search_model_versions(f"name='{name}'")]
        newest = f", versions up to {max(versions)}" if versions else ""
        raise ValueError(f"{address}: {name} has no such version; it has {aliases or 'no alias'}{newest}") from None


def _fill(method: Method, networks: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Load the weights of the networks that are needed for use, in eval mode, and drop the other networks."""
    if method.for_use:
        method.networks = {name: method.networks[name] for name in method.for_use}
    missing = sorted(set(method.networks) - set(networks))
    if missing:
        raise ValueError(f"{source}: holds the networks {', '.join(sorted(networks))}; its method has {missing[0]}, too")
    for name, network in method.networks.items():
        try:
            network.load_state_dict(networks[name], strict=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{source}: {name} does not take these weights: {why}") from None
        network.eval().requires_grad_(False)
