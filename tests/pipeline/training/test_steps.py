"""Stages and phases unrolled: the clock, the streams' counters, and going on from anywhere."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fader.method import Clock, Loss, Phase, Stage
from fader.schedules import ramp
from pipeline.training.steps import Position, ResumePoint, steps


def phase(name: str, **settings) -> Phase:
    return Phase((name,), lambda *_: Loss(None), **settings)


STAGES = (
    Stage("gan", (phase("critic", repeat=2), phase("generator")), 80),
    Stage("invert", (phase("encoder"),), 50),
)


def test_every_step_counts_one_global_batch_and_every_phase_its_repeats():
    unrolled = list(steps(STAGES, 20, Position()))
    assert [step.turns[0].stream.partition("/")[0] for step in unrolled] == ["gan"] * 4 + ["invert"] * 3
    first = unrolled[0]
    assert [(turn.stream, turn.draw) for turn in first.turns] == [("gan/critic", 0), ("gan/critic", 1), ("gan/generator", 0)]
    assert unrolled[3].after.counters == {"gan/critic": 8, "gan/generator": 4}
    assert unrolled[4].clock == Clock(images=80, stage_images=0, updates=4, stage=1)
    assert unrolled[-1].after.clock == Clock(images=140, stage_images=60, updates=7, stage=1)


def test_each_stream_is_read_once_in_order():
    turns = [turn for step in steps(STAGES, 20, Position()) for turn in step.turns]
    for stream, group in itertools.groupby(sorted(turns, key=lambda t: (t.stream, t.draw)), key=lambda t: t.stream):
        draws = [turn.draw for turn in group]
        assert draws == list(range(len(draws))), stream


def test_phases_that_name_one_stream_share_its_batches():
    shared = (Stage("all", (phase("d", stream="x", repeat=2), phase("g", stream="x")), 40),)
    one, two = steps(shared, 20, Position())
    assert [turn.draw for turn in one.turns] == [0, 1, 0]
    assert [turn.draw for turn in two.turns] == [2, 3, 2]


def test_a_phase_that_comes_every_few_steps_comes_first_in_the_first_and_reads_its_stream_in_order():
    lazy = (Stage("all", (phase("d"), phase("r1", every=3, repeat=2)), 140),)
    turns = [[(turn.stream, turn.draw) for turn in step.turns[1:]] for step in steps(lazy, 20, Position())]
    first, second, third = ([("all/r1", 2 * k), ("all/r1", 2 * k + 1)] for k in range(3))
    assert turns == [first, [], [], second, [], [], third]
    resumed = list(steps(lazy, 20, Position()))[3].after
    assert [len(step.turns) for step in steps(lazy, 20, resumed)] == [1, 1, 3], "by the clock, not by a counter of its own"
    with pytest.raises(ValueError, match="repeat 1 and every 0 must be at least 1"):
        phase("r1", every=0)


@pytest.mark.parametrize("done", range(8))
def test_going_on_from_anywhere_makes_the_steps_that_are_left(done):
    whole = list(steps(STAGES, 20, Position()))
    position = Position() if done == 0 else ResumePoint.from_dict(ResumePoint(whole[done - 1].after).to_dict()).position
    assert list(steps(STAGES, 20, position)) == whole[done:]


def test_a_clock_that_starts_anew_on_a_resume_would_be_seen():
    """The published reproductions restarted λ on a resume, or froze it; the same check finds that here."""

    def weights(position: Position) -> list[float]:
        return [ramp(1.0, step.clock.images, over=100) for step in steps(STAGES, 20, position)]

    whole = list(steps(STAGES, 20, Position()))
    resumed = whole[2].after
    assert weights(resumed) == weights(Position())[3:]
    restarted = dataclasses.replace(resumed, clock=dataclasses.replace(resumed.clock, images=0))
    assert weights(restarted) != weights(Position())[3:]
    assert ramp(1.0, 10**9, over=100) == 1.0
