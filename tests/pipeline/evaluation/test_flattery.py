"""What *flattered* means, by planted answers of readers: which differences count, and which are only chance."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fader.attributes import Attribute, Attributes
from pipeline import models
from pipeline.evaluation import Specification, keeping, tables
from pipeline.evaluation.report import Flattery
from tests.pipeline.evaluation.test_evaluation import Model, Seer, Winked, Winker, run
from tests.runs import FADER, make_run

SMILING = Attributes([Attribute("Smiling")])


def flatteries(real: tuple[float, ...], swaps: tuple[float, ...], records: int) -> list[Flattery]:
    """Of readers with these accuracies; each errs on the first records of each value, so that their errors go together."""
    labels = torch.arange(records) % 2
    place = torch.arange(records) // 2
    rows = {}
    for images, accuracies in (("real", real), ("swap", swaps)):
        for reader, accuracy in enumerate(accuracies):
            wrong = place < torch.tensor(round(records * (1 - accuracy))).add(1 - labels).div(2, rounding_mode="floor")
            asked = labels if images == "real" else 1 - labels
            rows[f"{images}/{reader}"] = torch.where(wrong, 1 - asked, asked)[:, None]
    readers = range(len(real))
    readings = [tables.read(SMILING, labels[:, None].float(), rows, reader, Specification()) for reader in readers]
    return tables.flatteries(SMILING, readings, [f"reader {reader}" for reader in readers])


@pytest.mark.parametrize(
    ("real", "swaps", "records", "excess"),
    [
        ((0.95, 0.95), (0.95, 0.80), 2000, 0.12),
        ((0.95, 0.90), (0.95, 0.80), 2000, 0.07),
        ((0.95, 0.95), (0.85, 0.805), 4000, 0.015),
        ((0.95, 0.95), (0.85, 0.821), 4000, None),  # less than the margin
        ((0.95, 0.85), (0.92, 0.80), 4000, None),  # real pictures are read as differently
        ((0.85, 0.95), (0.92, 0.80), 4000, None),  # no matter which reader reads them better
        ((0.95, 0.85), (0.94, 0.80), 400, None),  # the interval is one of the excess, not of the swaps alone
        ((0.95, 0.95), (0.95, 0.80), 20, None),  # three records are chance
    ],
)
def test_readers_that_differ_on_swaps_by_more_than_on_real_pictures_and_the_margin_are_told_apart(real, swaps, records, excess):
    for first, second in ((0, 1), (1, 0)):
        found = flatteries((real[first], real[second]), (swaps[first], swaps[second]), records)
        if excess is None:
            assert found == []
            continue
        [flattery] = found
        assert (flattery.attribute, flattery.pleased, flattery.other) == ("Smiling", f"reader {first}", f"reader {second}")
        assert flattery.excess == pytest.approx(excess, abs=1e-6) and 0 < flattery.low < flattery.excess < flattery.high


def test_readers_that_err_on_the_same_records_have_a_narrow_interval():
    """Each alone is uncertain by 8 points, 95% of the time; resampled apart, the two would differ by 5 ± 5.7 points."""
    [flattery] = flatteries((0.9, 0.9), (0.5, 0.42), 600)
    assert flattery.high - flattery.low < 0.06 and flattery.low > 0.02


def test_of_several_readers_the_two_that_differ_most_are_named():
    [flattery] = flatteries((0.9, 0.9, 0.9), (0.7, 0.9, 0.5), 1000)
    assert (flattery.pleased, flattery.other, flattery.excess) == ("reader 1", "reader 2", pytest.approx(0.37))


@pytest.mark.parametrize(("judges", "says"), [((Seer, Winked), "Smiling is FLATTERED"), ((Seer,), "flattered is NOT KNOWN")])
def test_the_verdict_stands_among_the_limits_on_the_card(judges, says, tmp_path):
    report = run(Winker(), [Model(judge(), source=judge.__name__) for judge in judges])
    folder = make_run(tmp_path / "run", FADER)
    keeping.keep(dataclasses.replace(Model(Winker()), run=folder), report, Specification())
    assert [limit for limit in models.load(folder).card["limits"] if says in limit]
