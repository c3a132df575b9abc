"""Write a run's model to a folder of plain tensors and JSON, and make that a version of a registered model."""

import json
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline import tracking
from pipeline.config import addresses
from pipeline.files import digest_of, replacing_folder
from pipeline.models.card import requirements
from pipeline.models.judges import check_judge
from pipeline.models.loading import ALIAS, judge_folders, load, parse_source
from pipeline.models.model import Model
from pipeline.models.serving import CODE, example, signature
from pipeline.models.store import open_store

_ROOT = Path(__file__).resolve().parents[2]  # of our own code, which travels with the model


@dataclass(frozen=True)
class Version:
    """A registered version; run_id: the MLflow run it is linked to, if the run was tracked; export: a folder."""

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
    run: str | Path, name: str, *, alias: str = ALIAS, out: str | Path | None = None,
    judge: str | Sequence[str] | None = None, checkpoint: str = "latest", ema: bool = True,
) -> Version:
    """Export a run and make it a version of a registered model, linked to the run's MLflow run.

    The store is MLFLOW_TRACKING_URI, else the one the run was tracked in, else MLflow's default. What tracking has not
    delivered yet is delivered first, so that the link leads somewhere. run: also RUN@best or RUN@images-N. alias: points
    to the new version afterwards. out: of the export, by default RUN/export. judge, checkpoint, ema: as in `export`.
    Raises ValueError: the run cannot be exported, MLflow does not take the name, or its store does not answer.
    """
    source, run = run, parse_source(run)[0]
    if not re.fullmatch(r"[^/:@.%\"'][^/:@%\"']*", name):
        raise ValueError(f"{name!r} cannot name a registered model; use letters, digits, dashes and underscores")
    folder = export(source, out or run / "export", judge, checkpoint=checkpoint, ema=ema)
    model = load(folder)
    if tracking.undelivered(run):
        tracking.sync(run)
    with open_store(tracking.store_of(run), create=True) as mlflow:
        store = tracking.without_password(mlflow.get_tracking_uri())
        run_id = tracking.run_id_of(run)
        version = _register(mlflow, model, folder, name, alias, run_id)
    return Version(name, int(version.version), alias, store, run_id, folder)


def _register(mlflow: Any, model: Model, folder: Path, name: str, alias: str, run_id: str | None) -> Any:
    client, card = mlflow.MlflowClient(), model.card
    tags = {key: str(card[key]) for key in ("method", "image_size", "data_digest", "config_digest", "commit")}
    tags |= {"attributes": ", ".join(model.attributes.names), "images_seen": str(card["images_seen"])}
    tags |= {"weights_digest": card["weights_digest"], "licence": card["licence"]}
    tags |= {f"metric.{tracking.safe(key)}": f"{value:.6g}" for key, value in card["metrics"].items()}
    if run_id is not None:
        experiment_id = client.get_run(run_id).info.experiment_id
    else:
        about = client.get_experiment_by_name(wanted := card["config"]["tracking"]["experiment"])
        experiment_id = about.experiment_id if about else client.create_experiment(wanted)
    params = {key: str(card[key]) for key in ("method", "image_size", "images_seen")}
    logged = client.create_logged_model(experiment_id, name, source_run_id=run_id, tags=tags, params=params)
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "model.py"
        code.write_text(CODE)
        mlflow.pyfunc.log_model(
            name=name, model_id=logged.model_id, python_model=str(code), artifacts={"export": str(folder)},
            signature=signature(model.capabilities[0]), input_example=example(model.capabilities[0]),
            pip_requirements=requirements(), code_paths=[str(_ROOT / package) for package in ("fader", "pipeline")],
        )
    if run_id is not None:
        output = mlflow.entities.LoggedModelOutput(logged.model_id, step=card["images_seen"])
        client.log_outputs(run_id, [output])
        about = {"timestamp": int(time.time() * 1000), "step": card["images_seen"], "model_id": logged.model_id}
        metric = mlflow.entities.Metric
        rows = [metric(tracking.safe(key), value, run_id=run_id, **about) for key, value in card["metrics"].items()]
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


def _describe(model: Model) -> str:
    card, first = model.card, model.capabilities[0]
    numbers = {name: f"{value:.4g}" for name, value in list(card["metrics"].items())[:20]}
    for name, (low, high) in card.get("intervals", {}).items():
        if name in numbers:
            numbers[name] += f" ({low:.4g} to {high:.4g})"
    lines = [
        f"{card['method']} at {card['image_size']} pixels after {card['images_seen']:,} images; {first.summary()}.",
        f"Meant for {first.use}.",
        *(f"{name}: {number}" for name, number in numbers.items()),
        *(f"Note: {limit}." for limit in card.get("limits", ())),
        card["licence"],
    ]
    return "\n\n".join(lines)


def export(
    run: str | Path, out: str | Path, judge: str | Sequence[str] | None = None, *, checkpoint: str = "latest", ema: bool = True
) -> Path:
    """Write a model for use: model.safetensors, card.json, and its judges' exports in judge/, judge-2/ …, whole; an export
    that is there already is replaced. run, checkpoint, ema: what `load` takes. judge: by default the run's own.

    Raises ValueError: the run cannot be loaded, the judge does not fit, or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export; choose another folder")
    model = load(run, checkpoint=checkpoint, ema=ema, own_judge=judge is None)
    if judge is not None:
        model.judges = tuple(load(address) for address in addresses(judge))
        for one in model.judges:
            check_judge(one, model.attributes, model.preprocessing, model.source, partly=True)
    with replacing_folder(out) as folder:
        _write(model, folder)
    return out


def _write(model: Model, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, network in model.method.networks.items()
        for key, tensor in network.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    card = model.card | {"weights_digest": digest_of(folder / "model.safetensors")}
    if model.judges:
        card["judge"] = [judge.source for judge in model.judges]
        for name, judge in zip(judge_folders(card), model.judges):
            _write(judge, folder / name)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
