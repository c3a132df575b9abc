"""One process, two ranks: the same weights, for every method; and every planted fault stands out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import launch
from tests.faults_of_ranks import FAULTS
from tests.ranks import METHOD_NAMES

TOLERANCE = 1e-9  # float64, SGD; measured: 2e-16


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch("tests.ranks", folder / "one", processes=1)
    launch("tests.ranks", folder / "two", processes=2)
    return {
        "one": load_file(folder / "one/rank0.safetensors"),
        "first": load_file(folder / "two/rank0.safetensors"),
        "second": load_file(folder / "two/rank1.safetensors"),
    }


def of(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    found = {key.partition(":")[2]: value for key, value in state.items() if key.startswith(f"{name}:")}
    assert found, f"no tensors of {name}"
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def test_there_really_were_two_ranks(states):
    assert [int(states[k]["world_size"]) for k in ("one", "first", "second")] == [1, 2, 2]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_two_ranks_end_with_the_weights_of_one_process(states, name):
    assert distance(of(states["one"], name), of(states["first"], name)) < TOLERANCE


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_both_ranks_hold_the_same_bits(states, name):
    first, second = of(states["first"], name), of(states["second"], name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_exceeds_the_tolerance_a_hundred_times(states, fault):
    assert distance(of(states["one"], "fader"), of(states["first"], fault)) > 100 * TOLERANCE
