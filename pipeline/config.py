"""One YAML file is one experiment: typed, frozen, strict, with one `base:` and key=value overrides."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, Field

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attributes
from fader.method import METHODS, Method
from fader.methods.judge import refuse_judges_networks
from pipeline.images import Preprocessing
from pipeline.settings import check_keys, describe, method_settings, nearest, translated


class Part(BaseModel, extra="forbid", frozen=True, strict=True):
    """Base of an experiment's parts."""


class AugmentConfig(Part):
    """How far training pictures are moved and changed; 0 = not at all.
    What goes both ways goes evenly up to its bound. Blur, rescaling and noise leave half of the pictures alone and go evenly up
    to their bounds for the others; they take away what is too faint for a person to see."""

    rotation_degrees: float = Field(0.0, ge=0, le=45)
    translation: float = Field(0.0, ge=0, le=0.5, description="as a share of the side, in both directions")
    brightness: float = Field(0.0, ge=0, lt=1, description="0.1: times 0.9 to 1.1")
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0, lt=1)
    hue: float = Field(0.0, ge=0, le=0.5, description="in turns of the colour circle")
    blur: float = Field(0.0, ge=0, le=8, description="Gaussian, sigma in pixels of a picture of 64; larger with the side")
    rescaling: float = Field(0.0, ge=0, lt=1, description="shrunk by this share of the side, and grown again")
    noise: float = Field(0.0, ge=0, le=1, description="Gaussian, sigma on [-1, 1]")

    def __bool__(self) -> bool:
        return any(self.model_dump().values())


class DataConfig(Part):
    """Which records, as which pixels, through which loader."""

    path: str = Field(description="folder of a shard set, as `fader prepare` wrote it")
    attributes: tuple[str, ...] = Field(min_length=1, description="names in the order of the code; ['*'] takes all of the set")
    image_size: int = Field(64, ge=8, description="pixels a side")
    crop: Literal["celeba", "center", "letterbox"] = Field("celeba", description="the crop rule of pipeline.images")
    channels: Literal[1, 3] = Field(3, description="3 for colour, 1 for grey")
    loader: Literal["dali", "pillow"] = "dali"
    cache: Literal["auto", "device", "host", "none"] = Field("auto", description="of decoded records; auto: as memory allows")
    flip: bool = Field(True, description="mirror half of the training records left to right, a coin a record and draw")
    augment: AugmentConfig = AugmentConfig()
    threads: int = Field(2, ge=1, description="decoding threads a rank")
    prefetch: int = Field(3, ge=1, description="batches made ahead")
    quarantine_share: float = Field(0.001, ge=0, le=0.5, description="of a split that need not decode (a few may, unless 0)")
    window: int | None = Field(None, ge=1, description="shards shuffled together; none = the whole split")
    replacement: bool = Field(False, description="draw records independently instead of once an epoch")
    balance: dict[str, float | dict[str, float]] = Field({}, description="share drawn of what is present, or {value: share}")

    @pydantic.field_validator("path")
    @classmethod
    def _no_password(cls, path: str) -> str:
        if re.search("://[^/]*:[^/]*@|^https?://[^/]*@", path):
            raise ValueError("it holds a password, which every run would keep; fsspec takes logins from FSSPEC_FTP, …")
        return path

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(image_size=self.image_size, crop=self.crop, channels=self.channels)


class RunConfig(Part):
    """Where the run lives and what it does at intervals, all counted in images seen (0 = never)."""

    folder: str = Field("", description="the run's folder; runs/NAME when empty")
    log_images: int = Field(3_200, ge=0)
    checkpoint_images: int = Field(64_000, ge=0)
    picture_images: int = Field(64_000, ge=0)
    evaluate_images: int = Field(0, ge=0, description="validation every so many images")
    evaluate_records: int = Field(1_000, ge=1, description="records of the validation split that it reads")
    evaluate_tables: tuple[str, ...] = Field((), description="swap, fidelity, leak; none = swaps, where judges are, and MSE")
    best: str = Field("", description="metric of the checkpoint that is kept as the best; empty = swap_accuracy (no judge: mse)")
    best_mse: float | None = Field(None, ge=0, description="the best's MSE should not exceed this")
    best_mse_factor: float = Field(1.25, ge=0, description="without it: not this times the lowest MSE seen; 0 = no bound")
    patience_images: int = Field(0, ge=0, description="stop after so many images without a better patience_metric")
    patience_metric: str = Field("", description="empty = what the best goes by")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every_images: int = Field(0, ge=0, description="beside them the first checkpoint of each so many images")
    keep_best: dict[str, Literal["max", "min"]] = Field({}, description="beside them the best by these validation metrics")
    nonfinite_updates: int = Field(20, ge=1, description="a phase's updates left out, with no clean log between, to go back at")
    rollbacks: int = Field(3, ge=0, description="how often a run goes back to a checkpoint before it ends in an error")
    watchdog_minutes: float = Field(10.0, ge=0, description="without a step, after which the run is ended; who hangs is named")

    @pydantic.model_validator(mode="after")
    def _best_needs_validation(self) -> "RunConfig":
        if self.keep_best and not self.evaluate_images:
            raise ValueError("keep_best goes by what validation finds: set run.evaluate_images, too")
        return self


class EngineConfig(Part):
    """How updates are spread over processes, and what a larger global batch changes in them."""

    backend: Literal["auto", "ddp", "deepspeed"] = Field("auto", description="auto: DeepSpeed if the launcher says so, else DDP")
    zero_stage: Literal[0, 1, 2] | None = Field(None, description="DeepSpeed's 0, 1 or 2; none = the launcher's, or 1")
    accumulation: int = Field(1, ge=1, description="parts in which a rank takes its share of a batch")
    gradient_compression: Literal["none", "bf16"] = Field("none", description="what gradients travel as between ranks")
    lr_scaling: Literal["none", "sqrt", "linear"] = Field("none", description="rates times (batch_size / reference) ** 0, 1/2, 1")
    reference_batch_size: int = Field(32, ge=1, description="the batch size that the learning rates were chosen for")
    warmup_images: int = Field(0, ge=0, description="images of each stage over which learning rates grow from 0")
    step: Literal["auto", "eager", "captured"] = Field("auto", description="captured: in CUDA graphs; auto: that on one GPU")
    channel_multiple: int = Field(1, ge=1, description="convolutions pad channels to one of these; 8 on tensor cores")
    compile: Literal["none", "networks"] = Field("none", description="by torch.compile, but for what is differentiated twice")


class TrackingConfig(Part):
    enabled: bool = True
    experiment: str = Field("fader", description="the MLflow experiment")
    parent: str = Field("", description="the MLflow run that this one belongs to, as one of a sweep")


def addresses(named: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    """Return the models that are named: none, one, some joined by commas, or a list.
    Raises ValueError: one is named twice."""
    parts = str(named).split(",") if isinstance(named, (str, Path)) else named or ()
    several = tuple(str(part).strip() for part in parts if str(part).strip())
    if twice := [name for i, name in enumerate(several) if Path(name) in map(Path, several[:i])]:
        raise ValueError(f"{twice[0]} is named twice; name it once, because it reads nothing anew the second time")
    return several


class Experiment(Part, arbitrary_types_allowed=True):
    """A whole experiment. `method` is the settings dataclass of METHODS[method.name]."""

    name: str
    method_name: str
    method: Any
    data: DataConfig
    batch_size: int = Field(32, ge=1, description="records of one step over all ranks")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="fp16 scales its losses and needs CUDA")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything that is drawn")
    judge: tuple[str, ...] | str | None = Field(
        None, description="runs, exports or models:/ addresses that judge this run: one, or a list of judges of different builds"
    )
    engine: EngineConfig = EngineConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def folder(self) -> Path:
        return Path(self.run.folder or f"runs/{self.name}")

    @property
    def judges(self) -> tuple[str, ...]:
        return addresses(self.judge)

    def to_dict(self) -> dict[str, Any]:
        """The resolved tree, as a config file would hold it."""
        tree = self.model_dump(mode="json", exclude={"method", "method_name"})
        method = {"name": self.method_name, **json.loads(json.dumps(dataclasses.asdict(self.method)))}
        return {"name": tree.pop("name"), "method": method, **tree}

    def dump(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def digest(self) -> str:
        """The sha256 of what decides the result: the settings without names, places, tracking, and how records are read.
        Which records they are, the digest of the data says (`ShardSet.digest`), not the folder they lie in."""
        tree = {key: value for key, value in self.to_dict().items() if key not in ("name", "judge", "run", "tracking")}
        for key in ("path", "threads", "prefetch", "cache"):
            del tree["data"][key]
        for key in ("step", "compile"):
            del tree["engine"][key]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.1 says text) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment.
    path: a YAML file; its `base:` names another, relative to it, whose keys it overrides.
    overrides: `key.path=value` with the value in YAML.
    Raises ValueError: unreadable file, unknown key (the nearest known one is offered), wrong type, unknown method."""
    return _overridden(_read(Path(path), ()), overrides, str(path))


def load_run(run: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run's folder; settings of a run by an earlier version are translated. Else as `load`."""
    path = Path(run) / "config.yaml"
    tree = _read(path, ())
    if isinstance(tree.get("method"), Mapping):
        tree["method"] = translated(str(tree["method"].get("name")), tree["method"], str(run))
    return _overridden(tree, overrides, str(path))


def _overridden(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    for override in overrides:
        tree = _override(tree, override)
    return build(tree, source)


def build(tree: Mapping[str, Any], source: str) -> Experiment:
    """An experiment from a plain tree; `source` is named in errors."""
    tree = dict(tree)
    if not isinstance(tree.get("method"), Mapping) or "name" not in tree["method"]:
        raise ValueError(f"{source}: needs method: {{name: …}}, one of {', '.join(sorted(METHODS))}")
    settings = dict(tree.pop("method"))
    name = settings.pop("name")
    if name not in METHODS:
        raise ValueError(f"{source}: unknown method {name!r}{nearest(name, METHODS)}")
    _check_tree(tree, Experiment, "", source)
    method = method_settings(name, settings, source)
    try:
        shell = Experiment.model_validate_json(json.dumps({**tree, "method_name": name, "method": None}))
    except pydantic.ValidationError as error:
        raise ValueError(describe(error, source)) from None
    augment = shell.data.augment
    if METHODS[name].learns_geometry and (augment.rotation_degrees or augment.translation):
        raise ValueError(f"{source}: data.augment has rotation_degrees or translation, and {name} learns from how they stand")
    return shell.model_copy(update={"method": method})


def build_method(experiment: Experiment, available: Attributes) -> Method:
    """The experiment's method over the attributes it names, out of those a shard set has.
    Raises ValueError: an attribute the set does not have; settings that do not fit the image size; a network kept for judges."""
    names = available.names if experiment.data.attributes == ("*",) else experiment.data.attributes
    kind = METHODS[experiment.method_name]
    method = kind(experiment.method, available.select(names), experiment.data.image_size, experiment.data.channels)
    refuse_judges_networks(method)
    return method


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: its base leads back to itself")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such config file") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; name a config file in it") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds {type(tree).__name__}, not keys with values")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), tree)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r} is not an override; write key.path=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def _check_tree(tree: Mapping[str, Any], model: type[BaseModel], prefix: str, source: str) -> None:
    known = {name for name in model.model_fields if name != "method_name"}
    check_keys(tree, known, prefix, source)
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel) and isinstance(tree.get(name), Mapping):
            _check_tree(tree[name], nested, f"{prefix}{name}.", source)
