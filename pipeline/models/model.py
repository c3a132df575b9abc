"""A model for use: a method with its weights, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fader.attributes import Attributes
from fader.method import Method
from pipeline.images import Preprocessing
from pipeline.models.capabilities import Aligning, Capability, Editing, Judging, Sampling, aligner, editor, judge, sampler


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

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can do; a service offers the first."""
        known = ((editor, "editing"), (sampler, "sampling"), (judge, "judging"), (aligner, "aligning"))
        return tuple(getattr(self, name) for asked, name in known if asked(self.method) is not None)

    @property
    def editing(self) -> Editing:
        """Raises ValueError when the model cannot edit, as its siblings do."""
        return Editing(self.method, self.source, self.judge.judging if self.judge else None)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.method, self.source)

    @property
    def judging(self) -> Judging:
        return Judging(self.method, self.source)

    @property
    def aligning(self) -> Aligning:
        return Aligning(self.method, self.source)
