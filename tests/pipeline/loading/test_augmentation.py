"""Pictures are moved and coloured by known numbers, alike in every loader, every resume and any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from fader.draws import Draws
from pipeline import config
from pipeline.config import AugmentConfig
from pipeline.images import to_float, to_uint8
from pipeline.loading.augmentation import augmented, coloured, moved
from pipeline.loading.loader import finish
from pipeline.loading.plan import Request

ALL = AugmentConfig(
    rotation_degrees=8, translation=0.1, brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05, blur=1.6, rescaling=0.5, noise=0.1
)


def pictures(count: int = 6, size: int = 32, channels: int = 3) -> torch.Tensor:
    """uint8 [N, S, S, C]: smooth, so that interpolation is near, without symmetry."""
    from scipy import ndimage  # here, and below: machines with a GPU that run one test of this file may lack it

    rng = np.random.default_rng(3)
    noise = ndimage.gaussian_filter(rng.normal(size=(count, size, size, channels)), (0, 3, 3, 0), mode="reflect")
    return torch.from_numpy(np.clip(128 + noise * 500, 20, 235).astype(np.uint8))


def floats(pixels: torch.Tensor) -> torch.Tensor:
    return to_float(pixels.permute(0, 3, 1, 2)).contiguous()


@pytest.mark.parametrize("size", [32, 31])
def test_moving_is_scipys_affine(size):
    from scipy import ndimage

    images = floats(pictures(size=size))
    angle = torch.tensor([0.0, 0.1, -0.3, 0.7, 0.0, 0.2])
    shift = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.0], [0.0, -0.2], [0.25, 0.125], [-0.4, 0.3]])
    out = moved(images, angle, shift)
    centre = (size - 1) / 2
    for image, found, a, (right, down) in zip(images.numpy(), out.numpy(), angle.tolist(), shift.tolist()):
        # row and column of the source, of each row and column of the result
        turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        offset = centre - turn @ (np.array([centre, centre]) + size * np.array([down, right]))
        for channel, plane in zip(image, found):
            expected = ndimage.affine_transform(channel.astype(np.float64), turn, offset, order=1, mode="reflect")
            assert np.abs(plane - expected).max() < 2e-4
    assert torch.allclose(out[0], images[0], atol=1e-5), "no angle and no shift leave a picture alone"


def test_a_shift_goes_right_and_down_and_a_turn_counter_clockwise():
    dot = torch.full((1, 1, 33, 33), -1.0)
    dot[0, 0, 16, 26] = 1  # right of the centre
    place = lambda image: tuple(int(i) for i in np.unravel_index(int(image.argmax()), (33, 33)))  # noqa: E731
    assert place(moved(dot, torch.zeros(1), torch.tensor([[3 / 33, 0]]))) == (16, 29)
    assert place(moved(dot, torch.zeros(1), torch.tensor([[0, 3 / 33]]))) == (19, 26)
    assert place(moved(dot, torch.tensor([np.pi / 2]), torch.zeros(1, 2))) == (6, 16)


def factor(name: str, value: float, count: int = 6) -> dict[str, torch.Tensor]:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return {key: torch.full((count,), float(at)) for key, at in (neutral | {name: value}).items()}


@pytest.mark.parametrize("value", [0.6, 1.0, 1.3])
@pytest.mark.parametrize(
    "name, reference",
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_colours_are_pillows(name, reference, value):
    pixels = pictures()
    found = to_uint8(coloured(floats(pixels), **factor(name, value))).numpy()
    expected = np.stack([np.asarray(reference(Image.fromarray(p.numpy())).enhance(value)) for p in pixels])
    assert np.abs(found.astype(int) - expected).max() <= 2  # Pillow rounds the grey, and cuts instead of rounding


def test_hue_turns_colours_about_the_grey_axis():
    images = floats(pictures())
    third = coloured(images * 0.3, **factor("hue", 1 / 3))
    back = coloured(coloured(third, **factor("hue", 1 / 3)), **factor("hue", 1 / 3))
    assert torch.allclose(back, images * 0.3, atol=1e-5)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose((third * luma).sum(1), (images * 0.3 * luma).sum(1), atol=1e-5)
    assert (third - images * 0.3).abs().max() > 0.1
    grey = images[:, :1].expand(-1, 3, -1, -1).contiguous()
    assert torch.allclose(coloured(grey, **factor("hue", 0.2)), grey, atol=1e-5)


def test_all_four_at_once_are_one_after_the_other():
    images = floats(pictures()) * 0.4
    numbers = {"brightness": 0.9, "contrast": 1.2, "saturation": 0.8, "hue": 0.03}
    at_once = coloured(images, **{name: torch.full((6,), value) for name, value in numbers.items()})
    in_turn = images
    for name, value in numbers.items():
        in_turn = coloured(in_turn, **factor(name, value))
    assert torch.allclose(at_once, in_turn, atol=1e-5)


def test_grey_pictures_stay_grey_and_results_stay_in_range():
    images = floats(pictures(channels=1))
    out = coloured(images, **factor("saturation", 0.3))
    assert out.shape == images.shape and torch.allclose(out, images, atol=1e-6)
    bright = coloured(floats(pictures()), **factor("brightness", 1.9))
    assert float(bright.max()) == 1 and float(bright.min()) >= -1


def test_what_is_off_touches_nothing():
    images = floats(pictures())
    assert augmented(images, Draws.of(1, "a", 0, torch.arange(6)), AugmentConfig()) is images
    assert not AugmentConfig() and AugmentConfig(hue=0.01)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_record_is_augmented_alike_on_any_rank(world_size):
    pixels = pictures(8)
    request = Request("a", 4, np.array([3, 1, 4, 1, 5, 2, 6, 7]), flip=True, augment=ALL)
    rows, labels = torch.from_numpy(request.rows), torch.zeros(8, 1)

    def made(rank: int, ranks: int):
        part = pixels[rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]]
        return finish(request, part, labels, rows, seed=7, rank=rank, world_size=ranks).images

    whole = made(0, 1)
    assert torch.equal(torch.cat([made(rank, world_size) for rank in range(world_size)]), whole)
    assert torch.equal(whole[1], whole[3]), "the same record twice in a batch is one record"
    alone = {"seed": 7, "rank": 0, "world_size": 1}
    plain = finish(Request("a", 4, request.rows, flip=True), pixels[rows], labels, rows, **alone)
    assert all(float((a - b).abs().mean()) > 0.01 for a, b in zip(whole, plain.images))
    later = Request("a", 5, request.rows, flip=True, augment=ALL)
    other = finish(later, pixels[rows], labels, rows, **alone).images
    assert all(float((a - b).abs().mean()) > 0.01 for a, b in zip(whole, other))


def test_deviations_are_even_up_to_their_bound():
    """Read off the pictures: a flat one's brightness is its grey; a ramp's shift is the grey at its centre."""
    from scipy import stats

    draws = Draws.of(3, "a", 0, torch.arange(4000))
    flat = torch.zeros(4000, 1, 1, 1)  # grey 0.5 of 1
    factors = (augmented(flat, draws, AugmentConfig(brightness=0.2))[:, 0, 0, 0] + 1).numpy()
    ramp = torch.linspace(-0.8, 0.8, 9).expand(4000, 1, 9, 9)
    right = -augmented(ramp, draws, AugmentConfig(translation=0.1))[:, 0, 4, 4].numpy() / 1.8  # 0.2 a pixel
    down = -augmented(ramp.mT, draws, AugmentConfig(translation=0.1))[:, 0, 4, 4].numpy() / 1.8
    assert stats.kstest(factors, stats.uniform(0.8, 0.4).cdf).pvalue > 1e-4
    for shift in (right, down):
        assert stats.kstest(shift, stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-4
    for a, b in ((right, down), (right, factors)):
        assert stats.spearmanr(a, b).pvalue > 1e-4


def test_on_another_device_as_on_the_cpu(other_device):
    rough = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images, index = torch.nn.functional.interpolate(rough, 64, mode="bicubic").clamp(-1, 1), torch.arange(6)
    here = augmented(images, Draws.of(3, "a", 0, index), ALL)
    there = augmented(images.to(other_device), Draws.of(3, "a", 0, index.to(other_device)), ALL)
    assert there.device.type == other_device and torch.allclose(there.cpu(), here, atol=2e-4)


def test_a_config_says_it_strictly():
    tree = {"name": "a", "method": {"name": "judge"}, "data": {"path": "x", "attributes": ["*"]}}
    augment = {"rotation_degrees": 5, "translation": 0.03, "hue": 0.02}
    made = config.build({**tree, "data": {**tree["data"], "augment": augment}}, "test")
    assert made.data.augment == AugmentConfig(rotation_degrees=5.0, translation=0.03, hue=0.02)
    assert config.build(made.to_dict(), "again") == made
    for wrong, message in (({"rotation_degree": 5}, "did you mean data.augment.rotation_degrees"), ({"hue": 0.6}, "data.augment.hue")):
        with pytest.raises(ValueError, match=message):
            config.build({**tree, "data": {**tree["data"], "augment": wrong}}, "test")
    assert not config.build(tree, "test").data.augment


@pytest.mark.parametrize("name", ["blur", "rescaling", "noise"])
def test_what_takes_faint_things_away_leaves_half_of_the_pictures_alone(name):
    """A faint grid is gone or drowned in the other half; what is coarse stays."""
    coarse = torch.where(torch.arange(64) < 32, -0.5, 0.5).expand(400, 3, 64, 64)
    faint = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 0.06 - 0.03
    images = coarse + faint
    settings = AugmentConfig(**{name: {"blur": 1.6, "rescaling": 0.5, "noise": 0.1}[name]})
    out = augmented(images.clone(), Draws.of(1, "a", 0, torch.arange(400)), settings)
    untouched = (out - images).abs().amax((1, 2, 3)) < 1e-4
    assert 0.4 < untouched.float().mean() < 0.62
    changed, pattern = out[~untouched], faint / faint.norm()
    left = ((changed - coarse[: len(changed)]) * pattern).sum((2, 3)).abs().mean(1) / faint.norm()
    if name != "noise":
        assert left.median() < 0.6
    assert (changed[..., 40:].mean((1, 2, 3)) - 0.5).abs().max() < 0.02
