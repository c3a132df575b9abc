"""Similarities turn, scale and shift points; pictures are read where they say; the aligner finds them again."""

from __future__ import annotations

import cmath
import dataclasses
import math

import pytest
import torch

from fader.attributes import Attribute, Attributes
from fader.draws import Draws
from fader.method import Aligns, Batch, Clock, Context
from fader.methods.aligner import Aligner, AlignerSettings
from fader.similarity import Similarity, positions, sample
from pipeline.engine import Engine
from tests.fader.tiny import tiny

ONE = Attributes([Attribute("a")])


def test_two_points_say_all():
    turned = Similarity.between((0j, 2 + 0j), (1 + 1j, 1 + 5j))
    assert turned(1 + 0j) == 1 + 3j and abs(turned.factor) == 2
    assert math.degrees(cmath.phase(turned.factor)) == 90  # clockwise on a screen: right becomes down
    with pytest.raises(ValueError, match="coincide"):
        Similarity.between((1j, 1j), (0j, 1j))


def test_products_apply_the_right_one_first_and_inverses_undo():
    a, b = Similarity(2j, 3 + 0j), Similarity(1 - 1j, 5j)
    for point in (0j, 1 + 2j):
        assert (a @ b)(point) == a(b(point)) != b(a(point))
        assert a.inverse()(a(point)) == pytest.approx(point)
    many = Similarity(torch.tensor([2j, 1 + 0j]), torch.tensor([3 + 0j, 1j]))
    assert torch.equal((many @ b)(1j), torch.stack([(a @ b)(torch.tensor(1j)), b(torch.tensor(1j)) + 1j]))


def test_sampling_at_its_own_positions_is_the_picture_and_a_pixel_off_is_its_neighbour():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    points = positions(4)[None]
    assert torch.allclose(sample(image, points), image, atol=1e-5)
    right = sample(image, points + 0.5)
    assert torch.allclose(right[..., :3], image[..., 1:], atol=1e-5)
    assert torch.allclose(right[..., 3], image[..., 3], atol=1e-5)  # mirrored at the edge


def spot(place: complex, size: int = 64, width: float = 0.12) -> torch.Tensor:
    """[1, 3, size, size]: a bright spot."""
    return 2 * torch.exp(-((positions(size) - place).abs() / width) ** 2).expand(1, 3, size, size) - 1


def brightest(window: torch.Tensor) -> complex:
    weight = (window[0].mean(0) + 1).clamp(min=0)
    return complex((positions(window.shape[-1]) * weight).sum() / weight.sum())


def test_a_planted_similarity_shows_a_point_where_it_says():
    method = tiny("aligner", ONE, 64, max_shift=0.2, window=0.5)  # nothing beyond the edge is seen
    at = 0.1 - 0.15j  # in the window of a well-framed face
    picture = spot(method.window(at))
    moved = []
    for draw in range(6):
        draws = Draws.of(3, "x", draw, torch.tensor([5]))
        planted = method.planted(draws)
        want = complex(planted(torch.tensor(at))[0])
        assert brightest(method.windows(picture, planted, draws)) == pytest.approx(want, abs=0.02)
        moved.append(abs(want - at))
    assert max(moved) > 0.1, "nothing was planted"


def test_planted_similarities_stay_in_their_limits_fill_them_and_belong_to_the_record():
    method = tiny("aligner", ONE, 64, max_rotation=30.0, max_zoom=1.4, max_shift=0.3)
    draws = Draws.of(0, "x", 0, torch.arange(4000))
    planted = method.planted(draws)
    parts = {
        "turn": (planted.factor.angle().rad2deg(), 30.0),
        "scale": (planted.factor.abs().log(), math.log(1.4)),
        "right": (planted.shift.real, 0.3),
        "down": (planted.shift.imag, 0.3),
    }
    for name, (values, limit) in parts.items():
        assert values.abs().max() <= limit * 1.0001 and values.max() > 0.9 * limit and values.min() < -0.9 * limit, name
        assert abs(values.mean()) < 0.05 * limit, name
    again = method.planted(dataclasses.replace(draws, index=torch.tensor([17, 3])))
    assert torch.equal(again.factor, planted.factor[[17, 3]])
    later = method.planted(Draws.of(0, "x", 1, draws.index))
    assert not torch.isclose(later.factor, planted.factor).any()


def test_light_and_tint_do_not_matter():
    method = tiny("aligner", ONE, 64)
    method.networks["regressor"].eval()
    windows = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tinted = windows * torch.tensor([0.5, 0.7, 0.6])[:, None, None] + torch.tensor([0.3, -0.2, 0.1])[:, None, None]
    one, other = method.align(windows), method.align(tinted)
    assert isinstance(method, Aligns)
    assert (one.factor - other.factor).abs().max() < 0.02 and (one.shift - other.shift).abs().max() < 0.02


def test_it_learns_to_undo_what_was_planted():
    """Spots at fixed places, other similarities at each step; those of the test were never planted in training."""
    torch.manual_seed(0)
    small = {"init_channels": 8, "max_channels": 16, "hidden_channels": 16}
    settings = AlignerSettings(**small, learning_rate=4e-3, window_below=0.0)
    method = Aligner(settings, ONE, 32)
    engine, (phase,) = Engine(method), method.stages()[0].phases
    face = (spot(-0.3 - 0.2j, 32) + spot(0.3 - 0.2j, 32) + spot(0.35j, 32, 0.2) + 2).clamp(-1, 1).expand(64, -1, -1, -1)
    errors = []
    for draw in range(200):
        report = engine.update(phase, Batch.alone(face, torch.zeros(64, 1), draw=draw), Clock())
        errors.append(float(report["regressor/error"]))
    assert sum(errors[-20:]) < 0.35 * sum(errors[:20]), errors[::20]


def test_another_device_plants_shows_and_loses_what_the_cpu_does(other_device):
    """In float32 the gradients, up to 1.0, are 3e-6 apart by rounding alone; TF32, which is off here, makes that 3e-3."""
    values = []
    for device in ("cpu", other_device):
        method = tiny("aligner", ONE, 64)
        network = method.networks["regressor"].to(device)
        batch = Batch.alone(spot(0.1j).expand(8, -1, -1, -1).to(device), torch.zeros(8, 1, device=device))
        loss = method.regressor_loss(method.networks, batch, Context())
        loss.value.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()]).cpu()
        values.append((method.windows(batch.images, method.planted(batch.draws), batch.draws).cpu(), gradient))
    for one, other in zip(*values):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"window": 0.0}, {"max_zoom": 0.9}, {"max_shift": -1.0}, {"norm": "instance"}])
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError):
        AlignerSettings(**changes)
