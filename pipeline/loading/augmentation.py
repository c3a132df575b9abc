"""Augmentation of training pictures: small rotation and translation, blur, rescaling, colour jitter, noise.

It works on the float pictures that every decoder and every cache ends in, on their device, so it is the same whether a
picture was decoded for this batch or long ago. Its numbers are the batch's draws, keyed by record and draw: a resumed
run repeats them, on any number of ranks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fader.draws import Draws
from fader.filters import blur_matrices, filtered, rescaling_matrices
from pipeline.config import AugmentConfig

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_YIQ = torch.tensor([_GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], dtype=torch.float64)


def augmented(images: Tensor, draws: Draws, settings: AugmentConfig) -> Tensor:
    """Pictures [N, C, S, S] float32 in [-1, 1], moved and coloured, each by numbers of its own. settings: the largest
    deviations; what is 0 is left alone."""
    if settings.rotation_degrees or settings.translation:
        angle = _around_zero(draws, "rotation") * math.radians(settings.rotation_degrees)
        shift = _around_zero(draws, "translation", (2,)) * settings.translation
        images = moved(images, angle, shift)
    if settings.blur or settings.rescaling:
        shrunk = _half_or_none(draws, "rescaling") * settings.rescaling
        images = softened(images, _half_or_none(draws, "blur") * settings.blur, shrunk)
    if settings.brightness or settings.contrast or settings.saturation or settings.hue:
        images = coloured(
            images, brightness=1 + _around_zero(draws, "brightness") * settings.brightness,
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


def moved(images: Tensor, angle: Tensor, shift: Tensor) -> Tensor:
    """Pictures [N, C, S, S] turned about their centre, by angle [N] in radians, counter-clockwise as a person sees it, then
    shifted by shift [N, 2] to the right and down, as a share of the side; sampled bilinearly, mirrored at the border."""
    size = images.shape[-1]
    place = (torch.arange(size, device=images.device, dtype=torch.float32) * 2 + 1) / size - 1
    x, y = place[None, None, :] - 2 * shift[:, 0, None, None], place[None, :, None] - 2 * shift[:, 1, None, None]
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([c * x - s * y, s * x + c * y], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def softened(images: Tensor, sigma: Tensor, shrunk: Tensor) -> Tensor:
    """Pictures blurred by sigma [N] (see `blur_matrices`), then shrunk by the share [N] of their side and grown again."""
    size = images.shape[-1]
    sides = (size * (1 - shrunk)).round().clamp(min=1).long()
    return filtered(images, rescaling_matrices(size, images.device)[sides] @ blur_matrices(sigma, size))


def grained(images: Tensor, draws: Draws, sigma: Tensor) -> Tensor:
    """Pictures with Gaussian noise of sigma [N] on each value, cut to [-1, 1]."""
    return (images + sigma[:, None, None, None] * draws.normal("grain", images.shape[1:])).clamp(-1, 1)


def coloured(images: Tensor, *, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Pictures [N, 3 or 1, S, S] in [-1, 1] in other colours; brightness, contrast and saturation [N] are factors, hue [N]
    is in turns. All four are linear in the colour, so together they are a 3×3 matrix a picture, an offset and one cut.

    Brightness scales towards black; contrast blends with the picture's mean grey and saturation with each pixel's grey, as
    Pillow's ImageEnhance does; hue turns the colours about the grey axis (in YIQ), so a grey pixel stays as it is.
    """
    gain = brightness * contrast
    channels = images.shape[1]
    if channels == 1:
        matrix = gain[:, None, None]
    else:
        matrix = gain[:, None, None] * _colours(saturation, hue)
    grey = torch.tensor(_GREY if channels == 3 else (1.0,), device=images.device)
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
