"""What the page may open beside its first model: versions in the registry, runs and their checkpoints, runs that train."""

import base64
import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import models, tracking
from pipeline.models import Editing, Model, Sampling, checkpoint
from pipeline.models.onnx import faster
from pipeline.models.store import open_store

MOST_OPEN = 4  # models in memory
MOST_POINTS = 300  # of one curve


class Opened(NamedTuple):
    """A model, what it does with sliders, and in words what decodes."""

    model: Model
    editing: Editing | Sampling
    decoder: str = ""


def opened(source: str, **options: Any) -> Opened:
    """Load a model as `pipeline.models.load` does; raise ValueError where it has no sliders."""
    model = models.load(source, **options)
    editing = next((can for can in model.capabilities if isinstance(can, Editing | Sampling)), None)
    if editing is None:
        raise ValueError(f"{source}: {model.card['method']} neither edits photos nor samples faces; it has no sliders")
    return Opened(model, editing, faster(editing) if isinstance(editing, Editing) else "it makes faces of seeds")


class Shelf:
    """Models to choose from. Only what is listed can be opened, so that no page reaches other folders.
    first: the model that the page begins with. runs: the folder whose runs are listed; None lists neither runs nor the registry.
    """

    def __init__(self, first: Opened, runs: Path | None = None) -> None:
        self.first, self.runs = first, runs
        self._open = {first.model.source: first}

    def listing(self) -> dict[str, Any]:
        """Name the models that can be opened, by groups, and the runs, the one that logged last first."""
        groups = {"now": [self.first.model.source]}
        if self.runs is not None:
            groups |= {"registry": self._registry(), "runs": [a for run in self._runs() for a in _addresses(run)]}
        newest = sorted(self._runs(), key=_logged, reverse=True)
        runs = [{"name": run.name, "report": _report(run) is not None} for run in newest]
        return {"kind": "models", "groups": groups, "runs": runs}

    def open(self, address: str) -> Opened:
        """Open a model that is listed; the one that nobody asked for the longest leaves the memory.
        Raises ValueError: it is not listed, or has no sliders."""
        if address not in (listed := [a for group in self.listing()["groups"].values() for a in group]):
            raise ValueError(f"{address} is none of the models here: {', '.join(listed)}")
        chosen = self._open.pop(address, None) or (self.first if address == self.first.model.source else opened(address))
        self._open[address] = chosen
        while len(self._open) > MOST_OPEN:
            del self._open[next(iter(self._open))]
        return chosen

    def training(self, name: str, size: int) -> dict[str, Any]:
        """Return a run's curves and its newest picture as its spool has them; neither, when that still has `size` bytes."""
        run = self._run(name)
        spool = tracking.spool_of(run)
        now = (spool / "main.jsonl").stat().st_size
        answer: dict[str, Any] = {"kind": "training", "run": name, "size": now}
        if now == size:
            return answer
        curves: dict[str, list[tuple[int, float]]] = {}
        for point in tracking.points(run):
            if math.isfinite(point.value) and not point.superseded:
                curves.setdefault(point.name, []).append((point.step, point.value))
        pictures = sorted((spool / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)
        if pictures:
            data = base64.b64encode(pictures[-1].read_bytes()).decode()
            answer |= {"picture": f"data:image/png;base64,{data}", "caption": pictures[-1].stem.rpartition("-")[0]}
        return answer | {"curves": {name: _thinned(curve) for name, curve in sorted(curves.items())}}

    def report(self, name: str) -> bytes | None:
        """Return the newest page of evaluation of a run that is listed."""
        with contextlib.suppress(ValueError):
            path = _report(self._run(name))
            return path.read_bytes() if path else None

    def _run(self, name: str) -> Path:
        run = next((run for run in self._runs() if run.name == name), None)
        if run is None:
            raise ValueError(f"there is no run {name!r} here")
        return run

    def _runs(self) -> list[Path]:
        return sorted(path.parent for path in self.runs.glob("*/config.yaml")) if self.runs else []

    def _registry(self) -> list[str]:
        """Return the addresses of every alias and version; nothing where there is no store."""
        addresses = []
        with contextlib.suppress(ValueError), open_store(None) as mlflow:
            client = mlflow.MlflowClient()
            for model in client.search_registered_models(max_results=50):
                versions = sorted(int(v.version) for v in client.search_model_versions(f"name='{model.name}'"))
                addresses += [f"models:/{model.name}@{alias}" for alias in sorted(model.aliases)]
                addresses += [f"models:/{model.name}/{version}" for version in reversed(versions)]
        return addresses


def _addresses(run: Path) -> list[str]:
    kept = [f"{run}@images-{checkpoint.images_of(path)}" for path in checkpoint.kept(run)]
    best = [f"{run}@best"] if checkpoint.validated(run) else []
    return [str(run), *best, *kept[1:]] if kept else []


def _logged(run: Path) -> float:
    """Return when the run last logged something; 0 where it never did."""
    path = run / "spool/main.jsonl"
    return path.stat().st_mtime if path.is_file() else 0.0


def _report(run: Path) -> Path | None:
    return max((run / "report").glob("report-*.html"), key=lambda path: path.stat().st_mtime, default=None)


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [*curve[: -1 : len(curve) // MOST_POINTS + 1], curve[-1]]
