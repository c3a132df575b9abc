"""Blur, rescaling and reduction of pictures, held against scipy and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fader.filters import blurred, filtered, reduced, rescaling_matrices


def pictures(size: int = 64) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("size", "pixels"), [(64, 1.0), (128, 2.0)])
def test_blur_is_scipys_away_from_the_border_and_grows_with_the_side(size, pixels):
    from scipy import ndimage

    images = pictures(size)
    expected = ndimage.gaussian_filter(images.double().numpy(), (0, 0, pixels, pixels), truncate=8)
    inner = slice(10, -10)
    found = blurred(images, 1.0).numpy()[..., inner, inner]
    assert np.abs(found - expected[..., inner, inner]).max() < 1e-5


def test_a_flat_picture_stays_flat_and_no_blur_changes_nothing():
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert torch.allclose(blurred(flat, 1.6), flat, atol=1e-6) and torch.equal(blurred(pictures(), 0.0), pictures())


def test_rescaling_is_pillows_down_and_up_again():
    images = (pictures(32) * 127.5 + 127.5).round()
    found = filtered(images, rescaling_matrices(32, torch.device("cpu"))[20][None])
    for image, one in zip(images, found):
        for plane, result in zip(image, one):
            small = Image.fromarray(plane.numpy(), "F").resize((20, 20), Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR)) - result.numpy()).max() < 0.1
    matrices = rescaling_matrices(32, torch.device("cpu"))
    assert torch.allclose(filtered(pictures(32), matrices[32][None]), pictures(32), atol=1e-5)


def test_reduction_is_pillows_and_leaves_what_has_the_size():
    images = pictures(256)
    small = reduced(images, 128)
    plane = Image.fromarray(images[0, 0].numpy(), "F").resize((128, 128), Image.Resampling.BILINEAR)
    assert small.shape == (3, 3, 128, 128) and np.abs(np.asarray(plane) - small[0, 0].numpy()).max() < 1e-4
    assert reduced(images, 256) is images
