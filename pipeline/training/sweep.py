"""A sweep: one experiment at every point of a grid of settings; what its children are, and what came of them."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config, models
from pipeline.config import Experiment
from pipeline.data.shards import ShardSet
from pipeline.engine import Ranks
from pipeline.evaluation import Specification, Table, evaluate, keeping
from pipeline.evaluation.compare import Compared
from pipeline.training.judges import panel_of

MSE_FACTOR = 1.25  # the chosen point's MSE may exceed the reference's by this
_LAMBDA = "method.latent.weight"


@dataclass(frozen=True)
class Child:
    """One point of the grid. settings: key to the value as it was written. label: the same, short, for names."""

    number: int
    label: str
    settings: Mapping[str, str]
    experiment: Experiment

    @property
    def folder(self) -> Path:
        return self.experiment.folder


@dataclass(frozen=True)
class Sweep:
    """A grid over an experiment. axes: swept key to its values as they were written."""

    name: str
    folder: Path
    axes: Mapping[str, tuple[str, ...]]
    base: Experiment
    children: tuple[Child, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"sweep": dict(self.axes), "base": self.base.to_dict()}


def plan(path: str | Path, words: Sequence[str], folder: Path | None = None) -> Sweep:
    """The children of a sweep, in order: the first key's values change slowest.

    path: the experiment's config file.
    words: `key.path=value`, or `key.path=value,value…` for a key that is swept; lists keep their brackets.
    folder: where the children's runs go; runs/NAME_sweep by default.
    Raises ValueError: nothing is swept, a key stands twice, two children are the same experiment, or what `config.load` refuses.
    """
    given: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{word!r} is not a setting; write key.path=value,value,…")
        if key in given:
            raise ValueError(f"{key} stands twice; write all its values at once, as {key}={given[key][0]},{text}")
        given[key] = _values(text)
    axes = {key: values for key, values in given.items() if len(values) > 1}
    fixed = [f"{key}={values[0]}" for key, values in given.items() if len(values) == 1]
    if not axes:
        raise ValueError("nothing is swept: give a key several values, as method.latent.weight=1e-4,1e-3,1e-2")
    for key in axes:
        if key in ("name", "run.folder"):
            raise ValueError(f"{key} cannot be swept: a sweep names its children itself")
    base = config.load(path, fixed)
    folder = folder or Path("runs") / f"{base.name}_sweep"
    children = []
    for number, values in enumerate(itertools.product(*axes.values())):
        settings = dict(zip(axes, values))
        label = _label(settings)
        point = config.load(path, [*fixed, *(f"{key}={value}" for key, value in settings.items())])
        run = point.run.model_copy(update={"folder": str(folder / label)})
        experiment = point.model_copy(update={"name": f"{base.name} {label}", "run": run})
        children.append(Child(number, label, settings, experiment))
    seen: dict[Any, Child] = {}
    for child in children:
        for key in ((child.experiment.digest, child.experiment.data.path), child.label):
            if key in seen:
                raise ValueError(f"{child.label} and {seen[key].label} are the same experiment")
            seen[key] = child
    return Sweep(f"{base.name} sweep", folder, axes, base, tuple(children))


def _values(text: str) -> tuple[str, ...]:
    """Parts between commas that stand in no brackets and no quotes."""
    parts = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|\"[^\"]*\"|[^,])+", text)
    if ",".join(parts) != text:
        raise ValueError(f"{text!r}: a value is empty; write value,value,…")
    return tuple(part.strip() for part in parts)


def _label(settings: Mapping[str, str]) -> str:
    """`latent.weight-1e-3--seed-1`: each key without its section, the whole key where two are then the same."""
    short = [_short(key) for key in settings]
    pairs = zip(short if len(set(short)) == len(short) else settings, settings.values())
    return "--".join(f"{key}-{re.sub(r'[^A-Za-z0-9_.+-]+', '_', value).strip('_')}" for key, value in pairs)


def _short(key: str) -> str:
    return key.partition(".")[2] or key


def has_begun(child: Child) -> bool:
    """Return whether a child's folder holds its run; raise ValueError where that is of other settings or other data."""
    if not (child.folder / "run.json").is_file():
        return False
    about, data = json.loads((child.folder / "run.json").read_text()), child.experiment.data.path
    if config.load_run(child.folder).digest != child.experiment.digest:
        raise ValueError(f"{child.folder} holds a run of other settings; give this sweep another --folder")
    if about["data_digest"] != ShardSet.open(data).digest:
        raise ValueError(f"{child.folder} holds a run of other data than {data}; give this sweep another --folder")
    return True


def with_parent(child: Child, run_id: str | None) -> Experiment:
    """The child's experiment, its MLflow run one of the sweep's."""
    tracking = child.experiment.tracking.model_copy(update={"parent": run_id or ""})
    return child.experiment.model_copy(update={"tracking": tracking})


def report_of(child: Child, specification: Specification) -> Path:
    """Return where the evaluation of a child lies, as JSON."""
    split = ShardSet.open(child.experiment.data.path).split(specification.split)
    variant = models.variant_of(child.folder, specification.checkpoint)
    return child.folder / "report" / f"{keeping.file_name(specification, variant, len(split))}.json"


def evaluate_child(child: Child, specification: Specification, ranks: Ranks, progress: Callable[[int, int], None]) -> list[Path]:
    """Evaluate a child and keep its report; return the files, or none when that was done for these weights.
    Raises Interrupted: while a judge was trained; the same call goes on with it."""
    data = Path(child.experiment.data.path)
    own = dataclasses.replace(specification, models=(str(child.folder),), data=data, device=str(ranks.device))
    [model] = own.load()
    shards = own.open(model)
    judges = panel_of([model], shards, own, ranks)
    if keeping.is_kept(report_of(child, own), model, judges, shards, own):
        return []
    report = evaluate(model, judges, shards, own, ranks, progress=progress)
    files = keeping.keep(model, report, own) if ranks.is_main else []
    if ranks.is_main:
        keeping.track(model, report, files)
    ranks.wait()
    return files


def bound(sweep: Sweep, compared: Sequence[Compared | None]) -> tuple[float, str]:
    """The MSE that the chosen point may have, and what it rests on: λ = 0 where it was swept, else the lowest MSE."""
    errors = {child.label: run.metrics["mse"] for child, run in zip(sweep.children, compared) if run and "mse" in run.metrics}
    if not errors:
        return math.inf, "no MSE is known"
    without = [c.label for c in sweep.children if c.label in errors and _is_zero(c.settings.get(_LAMBDA))]
    rests_on = without or list(errors)
    lowest = min(errors[label] for label in rests_on)
    return MSE_FACTOR * lowest, f"{MSE_FACTOR:g} times the {'MSE of λ = 0' if without else 'lowest MSE'} ({lowest:.5f})"


def _is_zero(text: str | None) -> bool:
    try:
        return text is not None and float(text) == 0
    except ValueError:
        return False


def chosen(sweep: Sweep, compared: Sequence[Compared | None]) -> Child | None:
    """The child of the highest balanced swap accuracy among those within the bound; None when no child has both."""
    limit, _ = bound(sweep, compared)
    able = [
        (run.metrics["swap_accuracy"], -child.number, child)
        for child, run in zip(sweep.children, compared)
        if run and "swap_accuracy" in run.metrics and run.metrics.get("mse", math.inf) <= limit
    ]
    return max(able)[2] if able else None


def table(sweep: Sweep, compared: Sequence[Compared | None], split: str) -> Table:
    """A row a child: its settings, reconstruction, swaps by attribute, and the mean of what leaks; the chosen starred."""
    metrics = [run.metrics if run else {} for run in compared]
    swaps = [name for measured in metrics for name in measured if name.startswith("swap_accuracy.") and "_to_" not in name]
    names = list(dict.fromkeys(name.partition(".")[2] for name in swaps))
    leaky = any(name.startswith("leak.") for measured in metrics for name in measured)
    best, (_, why) = chosen(sweep, compared), bound(sweep, compared)
    rows = []
    for child, run, measured in zip(sweep.children, compared, metrics):
        leaks = [value for name, value in measured.items() if name.startswith("leak.")]
        numbers = [measured.get("swap_accuracy"), *(measured.get(f"swap_accuracy.{name}") for name in names)]
        if leaky:
            numbers.append(sum(leaks) / len(leaks) if leaks else None)
        label = "* " * (child == best) + " ".join(child.settings.values())
        images = "–" if run is None or run.images_seen is None else f"{run.images_seen:,}"
        rows.append([label, images, _shown(measured.get("mse"), 5), *(_shown(number, 3) for number in numbers)])
    note = f"*: the highest balanced swap accuracy at an MSE of at most {why}." if best else f"None is chosen: {why}."
    keys = " ".join(_short(key) for key in sweep.axes)
    header = [keys, "images", "MSE", "swap accuracy", *names, *(["leak, mean"] if leaky else [])]
    return Table(f"{sweep.name}, {split} split", header, rows, note)


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
