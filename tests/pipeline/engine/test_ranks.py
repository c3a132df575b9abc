"""One process, two ranks by DDP and by DeepSpeed: the same weights, each other's checkpoints; planted faults show.

Everything that two ranks are tried with happens in one launch (tests/ranks.py); these tests read what it wrote.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from tests.commands import launch
from tests.faults_of_ranks import DEEPSPEED_FAULTS, FAULTS
from tests.ranks import BACKENDS, GOES_ON, KINDS, METHOD_NAMES, SAVED_AT, SIBLINGS, WITHOUT_BATCH_NORM
from tests.shams import registered

TOLERANCE = {"ddp": 1e-9, "flat": 1e-9, "zero0": 5e-6, "zero1": 5e-6, "zero2": 5e-6}  # measured: 2e-16 in float64, 4e-7 in float32
BF16_TOLERANCE = 3e-4  # measured: 1e-4; between bf16 and fp32 1.5e-4; with one of five batches left out 8e-4
PAST_TOLERANCE = 6e-6  # three steps of Adam in float32 after a load; measured: 6e-8

State = dict[str, torch.Tensor]

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, State]:
    """one: one process's cases. first, second: what two ranks wrote. single: one process that loaded others' states."""
    folder = tmp_path_factory.mktemp("ranks")
    with registered():
        one = {f"{name}|{k}": v for name, case in ranks.references().items() for k, v in ranks.run(case).items()}
        ranks.write_states("single", folder)
        launch("tests.ranks", folder, launcher=["--config_file", "launch/accelerate/one_node.yaml"])
        single = {f"{name}|{k}": v for name, s in ranks.load_states("single", KINDS, folder) for k, v in s.items()}
    saved = {path.stem: load_file(path) for path in folder.glob("*-*.safetensors")}
    return {
        "one": one,
        "single": single,
        "first": load_file(folder / "rank0.safetensors"),
        "second": load_file(folder / "rank1.safetensors"),
        "saved": {f"{name}|{key}": value for name, state in saved.items() for key, value in state.items()},
    }


def of(state: State, name: str) -> State:
    found = {key.partition("|")[2]: value for key, value in state.items() if key.startswith(f"{name}|")}
    assert found, f"no tensors of {name}"
    return found


def distance(a: State, b: State, parts: tuple[str, ...] = ("networks", "ema")) -> float:
    """Largest difference of weights, buffers and averages."""
    a, b = ({k: v for k, v in state.items() if k.partition(":")[0] in parts} for state in (a, b))
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_there_really_were_two_ranks(states):
    assert [int(states[k]["world_size"]) for k in ("first", "second")] == [2, 2]


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_end_with_the_weights_of_one_process(states, backend, name):
    assert distance(of(states["one"], name), of(states["first"], f"{backend}/{name}")) < TOLERANCE[backend]


def test_a_solved_critic_knows_the_latents_of_all_ranks(states):
    assert distance(of(states["one"], "fader critic"), of(states["first"], "ddp/fader critic")) < TOLERANCE["ddp"]
    heard, not_heard = (
        {key: value for key, value in of(states["one"], name).items() if "encoder" in key}
        for name in ("fader critic", "fader critic unheard")
    )
    assert distance(heard, not_heard) > 1e-4, "it changes the weights"


@pytest.mark.parametrize("name", WITHOUT_BATCH_NORM)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_in_two_parts_is_the_batch(states, backend, name):
    assert distance(of(states["one"], f"{name} few"), of(states["first"], f"{backend}/{name} in parts")) < TOLERANCE[backend]


@pytest.mark.parametrize("name", SIBLINGS)
def test_deepspeed_on_two_ranks_ends_with_the_siblings_weights_of_one_process(states, name):
    few = f"{name} few"
    assert distance(of(states["one"], few), of(states["first"], f"zero1/{few}")) < TOLERANCE["zero1"]


@pytest.mark.parametrize("name", [*(f"ddp/{name}" for name in (*METHOD_NAMES, *SIBLINGS)), "zero1/fader"])
def test_uneven_shares_end_with_the_weights_of_one_process(states, name):
    backend, name = name.split("/")
    ours = of(states["first"], f"{backend}/{name} uneven")
    assert distance(of(states["one"], f"{name} uneven"), ours) < TOLERANCE[backend]


@pytest.mark.parametrize("case", [case for case in ranks.cases_of_ranks() if "fault/" not in case])
def test_both_ranks_hold_the_same_bits(states, case):
    assert same(of(states["first"], case), of(states["second"], case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_update_that_is_not_finite_on_one_rank_changes_nothing_on_any(states, backend):
    """A run whose third batch was not finite ends as one that never read it."""
    assert distance(of(states["one"], "poisoned"), of(states["first"], f"{backend}/poisoned")) < TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compressed_gradients_lead_nearly_there(states, backend):
    """Off by bf16's rounding: more than the tolerance, so they were compressed; much less than a fault."""
    off = distance(of(states["one"], "fader few"), of(states["first"], f"{backend}/fader compressed"))
    assert TOLERANCE["zero1"] < off < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_on_two_ranks_ends_near_bf16_on_one(states, backend):
    """As near as bf16 itself is to fp32, from which it really differs."""
    one, ours = of(states["one"], "fader bf16"), of(states["first"], f"{backend}/fader bf16")
    assert distance(one, of(states["one"], "fader fp32")) > 10 * TOLERANCE["zero1"]
    assert distance(one, ours) < BF16_TOLERANCE


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_exceeds_the_tolerance_a_hundred_times(states, fault):
    assert distance(of(states["one"], "fader few"), of(states["first"], f"fault/{fault}")) > 100 * TOLERANCE["ddp"]


@pytest.mark.parametrize("fault", sorted(DEEPSPEED_FAULTS))
def test_a_fault_planted_in_deepspeed_exceeds_the_tolerance_a_hundred_times(states, fault):
    wrong = of(states["first"], f"deepspeed fault/{fault}")
    assert distance(of(states["one"], "fader few"), wrong) > 100 * TOLERANCE["zero1"]


def test_a_loss_under_deepspeed_runs_in_autocast(states):
    assert bool(states["first"]["autocast"]) and bool(states["second"]["autocast"])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("writer", "reader"), itertools.product(KINDS, KINDS))
def test_every_back_end_loads_every_other_ones_state(states, writer, reader):
    """To the last bit, weights and moments and step counts; and three steps later both runs stand at the same place."""
    loaded = states["single" if reader == "single" else "first"]
    for step in SAVED_AT:
        was = of(states["saved"], f"{writer}-{step}")
        assert (step == 0) or any(key.endswith("/step") for key in was)
        assert same(of(loaded, f"{writer} to {reader} at {step}"), was), f"at step {step}"
        later = of(states["saved"], f"{writer}-{step + GOES_ON}")
        there = of(loaded, f"{writer} to {reader} past {step}")
        assert distance(later, there, ("networks", "ema", "optimizers")) < PAST_TOLERANCE, f"past step {step}"
    assert same(of(loaded, f"{writer} to {reader} fader"), of(states["saved"], f"{writer}-fader"))


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_a_lost_moment_or_step_count_exceeds_the_tolerance_a_hundred_times(states, lost):
    with registered():
        engine = ranks.engine_of("single")
        state = of(states["saved"], "zero1-5")
        start = float(lost == "step")  # what a fresh optimizer would hold
        state = {k: torch.full_like(v, start) if k.endswith(f"/{lost}") else v for k, v in state.items()}
        engine.load(ranks.unflat(state))
        ranks.go_on(engine, ranks.position_at(5), 5 + GOES_ON)
        found = ranks.flat(engine.state())
    assert distance(of(states["saved"], f"zero1-{5 + GOES_ON}"), found) > 100 * PAST_TOLERANCE
