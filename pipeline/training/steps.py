"""Say where a run stands, and unroll its stages and phases into every update that is left, as a pure function."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fader.method import Clock, Phase, Stage


@dataclass(frozen=True)
class Position:
    """Where a run stands: its clock, and how many batches of each stream it has read."""

    clock: Clock = Clock()
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One update: a phase and the batch it reads."""

    phase: Phase
    stream: str
    draw: int


@dataclass(frozen=True)
class Step:
    """One global batch's worth of every phase of a stage. clock: as the losses see it. after: where the run then stands."""

    turns: tuple[Turn, ...]
    clock: Clock
    after: Position


def steps(stages: tuple[Stage, ...], batch_size: int, position: Position) -> Iterator[Step]:
    """Give every step that is left, as a pure function of where the run stands: the loop and its loader each walk their own."""
    while position.clock.stage < len(stages):
        stage = stages[position.clock.stage]
        if position.clock.stage_images >= stage.images:
            position = Position(position.clock.next_stage(), position.counters)
            continue
        turns, read = [], {}
        for phase in (phase for phase in stage.phases if position.clock.updates % phase.every == 0):
            stream = f"{stage.name}/{phase.stream}"
            first = position.counters.get(stream, 0)
            turns += [Turn(phase, stream, first + k) for k in range(phase.repeat)]
            read[stream] = max(read.get(stream, 0), first + phase.repeat)
        after = Position(position.clock.after(batch_size), {**position.counters, **read})
        yield Step(tuple(turns), position.clock, after)
        position = after


def total_images(stages: tuple[Stage, ...], batch_size: int) -> int:
    """Return how many images a run has seen at its end: whole steps, so a little more than its stages say."""
    return sum(-(-stage.images // batch_size) * batch_size for stage in stages)


@dataclass
class ResumePoint:
    """What a run needs to go on, beside the state of its engine; it stands in every checkpoint's state.json.
    salt: how often the run went back, because it sees other batches after each return.
    quarantine: keys of the records that any rank left out because they do not decode.
    validation: the best validation so far, as plain data; None where the run does not measure."""

    position: Position = Position()
    salt: int = 0
    quarantine: list[str] = field(default_factory=list)
    validation: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "ResumePoint":
        known = {entry.name: tree[entry.name] for entry in dataclasses.fields(ResumePoint) if entry.name in tree}
        position = Position(Clock(**tree["position"]["clock"]), tree["position"]["counters"])
        return ResumePoint(**{**known, "position": position})
