"""Augmentation of training pictures: small rotation and translation, blur, rescaling, colour jitter, noise.

It works on the float pictures that every decoder and every cache ends in, on their device, so it is the same whether a
picture was decoded for this batch or long ago. Its numbers are the batch's draws, keyed by record and draw: a resumed
run repeats them, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fader.draws import Draws
from fader.filters import blur_matrices, filtered, rescaling_matrices
from pipeline.config import AugmentConfig

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_YIQ = torch.tensor([_GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], dtype=torch.float64)


def augmented(images: Tensor, draws: Draws, settings: AugmentConfig) -> Tensor:
    """Pictures moved and coloured, each by numbers of its own.

    Args:
        images: [N, C, S, S] float32 in [-1, 1].
        draws: of the same N records.
        settings: the largest deviations; what is 0 is left alone.

    Returns:
        [N, C, S, S] in [-1, 1], on the same device.
    """
    if settings and _one_by_one(images):  # plane by plane both parts take half the time, the copy included
        images = torch.from_numpy(np.ascontiguousarray(images.numpy()))
    if settings.rotation_degrees or settings.translation:
        angle = _around_zero(draws, "rotation") * math.radians(settings.rotation_degrees)
        shift = _around_zero(draws, "translation", (2,)) * settings.translation
        images = moved(images, angle, shift)
    if settings.blur or settings.rescaling:
        shrunk = _half_or_none(draws, "rescaling") * settings.rescaling
        images = softened(images, _half_or_none(draws, "blur") * settings.blur, shrunk)
    if settings.brightness or settings.contrast or settings.saturation or settings.hue:
        images = coloured(
            images,
            brightness=1 + _around_zero(draws, "brightness") * settings.brightness,
            contrast=1 + _around_zero(draws, "contrast") * settings.contrast,
            saturation=1 + _around_zero(draws, "saturation") * settings.saturation,
            hue=_around_zero(draws, "hue") * settings.hue,
        )
    return grained(images, draws, _half_or_none(draws, "noise") * settings.noise) if settings.noise else images


def _around_zero(draws: Draws, name: str, shape: tuple[int, ...] = ()) -> Tensor:
    """[N, *shape] uniform on [-1, 1)."""
    return draws.uniform(name, shape) * 2 - 1


def _half_or_none(draws: Draws, name: str) -> Tensor:
    """[N] 0 for half of the records, uniform on [0, 1) for the others."""
    return _around_zero(draws, name).clamp(min=0)


def _one_by_one(images: Tensor) -> bool:
    """Whether pictures are moved one by one: on the CPU, where a picture stays in the core's cache, and in the calling
    thread alone, because torch's threads would wait for the cores that decoding has."""
    return images.device.type == "cpu"


def moved(images: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Pictures turned about their centre, then shifted; sampled bilinearly, mirrored at the border.

    Args:
        images: [N, C, S, S].
        angle: [N] radians, counter-clockwise as a person sees it.
        shift: [N, 2] right and down, as a share of the side.
    """
    cosine, sine = angle.cos(), angle.sin()
    size = images.shape[-1]
    if _one_by_one(images):
        place = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
        out, grid = torch.empty_like(images), np.empty((1, size, size, 2), np.float32)
        for n, (c, s, (right, down)) in enumerate(zip(cosine.tolist(), sine.tolist(), shift.tolist())):
            x, y = place[None, :] - np.float32(2 * right), place[:, None] - np.float32(2 * down)
            np.add(np.float32(c) * x, np.float32(-s) * y, out=grid[0, ..., 0])
            np.add(np.float32(s) * x, np.float32(c) * y, out=grid[0, ..., 1])
            out[n : n + 1] = _sampled(images[n : n + 1], torch.from_numpy(grid))
        return out
    place = (torch.arange(size, device=images.device, dtype=torch.float32) * 2 + 1) / size - 1
    x, y = place[None, None, :] - 2 * shift[:, 0, None, None], place[None, :, None] - 2 * shift[:, 1, None, None]
    c, s = cosine[:, None, None], sine[:, None, None]
    return _sampled(images, torch.stack([c * x - s * y, s * x + c * y], -1))


def _sampled(images: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def softened(images: Tensor, sigma: Tensor, shrunk: Tensor) -> Tensor:
    """Pictures blurred by sigma [N] (see `blur_matrices`), then shrunk by the share [N] of their side and grown again."""
    size = images.shape[-1]
    sides = (size * (1 - shrunk)).round().clamp(min=1).long()
    return filtered(images, rescaling_matrices(size, images.device)[sides] @ blur_matrices(sigma, size))


def grained(images: Tensor, draws: Draws, sigma: Tensor) -> Tensor:
    """Pictures with Gaussian noise of sigma [N] on each value, cut to [-1, 1]."""
    if not _one_by_one(images):
        return (images + sigma[:, None, None, None] * draws.normal("grain", images.shape[1:])).clamp(-1, 1)
    rows = sigma.nonzero()[:, 0]  # drawing numbers costs more than all the rest
    noise = dataclasses.replace(draws, index=draws.index[rows]).normal("grain", images.shape[1:])
    return images.index_put((rows,), (images[rows] + sigma[rows, None, None, None] * noise).clamp(-1, 1))


def coloured(images: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Pictures in other colours. All four are linear in the colour, so together they are one 3×3 matrix a picture, an
    offset, and one cut to [-1, 1] at the end.

    Brightness scales towards black; contrast blends with the picture's mean grey and saturation with each pixel's grey,
    as Pillow's ImageEnhance does; hue turns the colours about the grey axis (in YIQ), so a grey pixel stays as it is.

    Args:
        images: [N, 3 or 1, S, S] in [-1, 1].
        brightness, contrast, saturation: [N] factors, 1 changes nothing.
        hue: [N] turns, 0 changes nothing.
    """
    gain = brightness * contrast
    channels = images.shape[1]
    if channels == 1:
        matrix = gain[:, None, None]
    else:
        matrix = gain[:, None, None] * _colours(saturation, hue)
    grey = torch.tensor(_GREY if channels == 3 else (1.0,), device=images.device)
    if _one_by_one(images):
        out = np.empty(images.shape, np.float32)
        for image, source, m, g, b, c in zip(
            out, images.numpy(), matrix.numpy(), gain.tolist(), brightness.tolist(), contrast.tolist()
        ):
            means = source.mean((1, 2)) @ grey.numpy()
            offset = np.float32(g - 1 + (1 - c) * b * (float(means) + 1))
            for channel, row in zip(image, m):
                np.multiply(source[0], row[0], out=channel)
                for other, factor in zip(source[1:], row[1:]):
                    channel += other * factor
                channel += offset
            np.clip(image, -1, 1, out=image)
        return torch.from_numpy(out)
    mean = (images.mean((2, 3)) * grey).sum(1)
    offset = gain - 1 + (1 - contrast) * brightness * (mean + 1)
    planes = [
        sum(matrix[:, i, j, None, None] * images[:, j] for j in range(channels)) + offset[:, None, None]
        for i in range(channels)
    ]
    return torch.stack(planes, 1).clamp(-1, 1)


def _colours(saturation: Tensor, hue: Tensor) -> Tensor:
    """[N, 3, 3] float32: saturation [N] and hue [N] on (red, green, blue); each row sums to 1, so grey stays grey."""
    to_yiq = _YIQ.to(hue.device)
    turn = hue.double() * 2 * math.pi
    chroma = saturation.double()
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    c, s = turn.cos() * chroma, turn.sin() * chroma
    inner = torch.stack([one, zero, zero, zero, c, -s, zero, s, c], -1).view(-1, 3, 3)
    return (torch.linalg.inv(to_yiq) @ inner @ to_yiq).float()
