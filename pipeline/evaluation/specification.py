"""What an evaluation is asked for: of which models and records, by which judge, which tables, on what."""

from dataclasses import dataclass
from pathlib import Path

from pipeline import models
from pipeline.data.shards import ShardSet
from pipeline.models import Model

TABLES = ("swap", "error", "fidelity", "leak", "distribution", "cost")
USUAL_TABLES = ("swap", "fidelity", "leak", "cost")


@dataclass(frozen=True, kw_only=True)
class Specification:
    """An evaluation as a user asks for it; whoever takes part in it reads what it needs from here.

    models: runs, exports or registry addresses; checkpoint: which of a run's; averaged: the moving averages of its
    weights. judges: addresses, too; none takes the models' own, or a panel that is trained (on judge_images) and kept.
    data: the shard set; None takes the one that the first model was trained on. split, limit: the first so many of its
    records; None: all. tables: any of TABLES; "error" is the squared error alone, out of "fidelity". inception:
    TorchScript file of the network whose features the distribution table compares, instead of what the judge's last layer
    reads; classes: for that table, names of attributes whose joint values are the classes; empty takes each alone.
    resamples: of the bootstrap; with 0 no number has an interval. seed: of the bootstrap and of the probe. Raises
    ValueError: an unknown table, or a limit below 1.
    """

    models: tuple[str, ...] = ()
    checkpoint: str = "latest"
    averaged: bool = True
    judges: tuple[str, ...] = ()
    judge_images: int | None = None
    data: Path | None = None
    split: str = "test"
    limit: int | None = None
    tables: tuple[str, ...] = USUAL_TABLES
    inception: Path | None = None
    classes: tuple[tuple[str, ...], ...] = ()
    resamples: int = 1000
    seed: int = 0
    batch_size: int = 64
    device: str = "cpu"
    threads: int = 2

    def __post_init__(self) -> None:
        wrong = [table for table in self.tables if table not in TABLES]
        if wrong:
            raise ValueError(f"unknown table {wrong[0]!r}; there are: {', '.join(TABLES)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")

    def load(self) -> list[Model]:
        """Load the models onto the device, without their judges where one is named."""
        keywords = {"checkpoint": self.checkpoint, "ema": self.averaged, "own_judge": not self.judges}
        return [self.place(models.load(source, **keywords)) for source in self.models]

    def place(self, model: Model) -> Model:
        for network in model.method.networks.values():
            network.to(self.device)
        return model

    def open(self, model: Model) -> ShardSet:
        """Open the shard set, by default the one that a model names in its config."""
        named = self.data or ((model.card.get("config") or {}).get("data") or {}).get("path")
        if not named:
            raise ValueError(f"{model.source} does not say which data it was trained on; name a shard set with --data")
        if self.data is None and not Path(named).exists():
            raise ValueError(f"{model.source} was trained on {named}, which is not here; name a shard set with --data")
        return ShardSet.open(named)

    def records(self, split_records: int) -> int:
        return min(self.limit or split_records, split_records)
