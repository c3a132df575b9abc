"""What a discriminator may see of an image: the same kinds of change for real and decoded ones, drawn for each record.

A discriminator that sees every pixel as it is teaches its decoder what only this discriminator reads, and learns its
training images by heart. Source: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training",
arXiv:2006.10738; Karras et al. 2020, arXiv:2006.06676.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fader.draws import Draws
from fader.networks.layers import wide
from fader.settings import Settings, setting

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_SHARP = 1e-2  # σ in pixels of a blur that changes nothing


@dataclass(frozen=True)
class SightSettings(Settings):
    shift: float = setting(1 / 16, "largest shift in whole pixels along each axis, as a share of the side", least=0, most=0.5)
    flip: bool = setting(True, "half of the images are mirrored")
    blur: float = setting(1.2, "largest σ of the blur that half of the images get, in pixels at 64×64", least=0)
    brightness: float = setting(0.2, "largest offset of all colours, images being in [-1, 1]", least=0)
    tint: float = setting(0.1, "largest offset of each colour", least=0)
    contrast: float = setting(0.2, "0.2: colours times 0.8 to 1.2", least=0, most=1)
    saturation: float = setting(0.5, "0.5: distances from grey times 0.5 to 1.5", least=0, most=1)
    grey: float = setting(0.0, "share of the images that lose their colours", least=0, most=1)
    noise: float = setting(0.06, "σ of the noise that a third of the images get", least=0)


def seen(images: Tensor, draws: Draws, name: str, settings: SightSettings) -> Tensor:
    """Return images [N, C, S, S] moved, blurred and in other colours, at least as float32. It is differentiable.
    name: which random numbers of a record to use; images under different names are changed differently."""
    s, size, images = settings, images.shape[-1], wide(images)

    def around(what: str, most: float, shape: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        return (draws.uniform(f"{name}.{what}", shape) * 2 - 1).to(images.dtype) * most

    def some(what: str, share: float, shape: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        return draws.uniform(f"{name}.{what}", shape) < share

    sigma = draws.uniform(f"{name}.blur", (1, 1)).to(images.dtype) * s.blur * size / 64
    sigma = torch.where(some("blurred", 0.5, (1, 1)), sigma, 0.0).clamp(min=_SHARP)
    down, right = (around(f"shift.{axis}", s.shift * size, (1,)).round() for axis in ("down", "right"))
    mirrored = some("flip", 0.5 if s.flip else 0.0, (1, 1))
    with torch.autocast(images.device.type, enabled=False):
        columns = _weights(size, right, sigma)
        columns = torch.where(mirrored, columns.flip(1), columns)
        images = _weights(size, down, sigma)[:, None] @ images @ columns[:, None].transpose(2, 3)
    if images.shape[1] == 3:
        grey = sum(weight * images[:, i : i + 1] for i, weight in enumerate(_GREY))
        kept = torch.where(some("grey", s.grey), 0.0, 1 + around("saturation", s.saturation))
        images = images * kept + grey * (1 - kept)
    images = images * (1 + around("contrast", s.contrast)) + around("brightness", s.brightness)
    images = images + around("tint", s.tint, (images.shape[1], 1, 1))
    noise = draws.normal(f"{name}.noise", tuple(images.shape[1:])).to(images.dtype) * s.noise
    return images + torch.where(some("noisy", 1 / 3), noise, 0.0)


def _weights(size: int, shift: Tensor, sigma: Tensor) -> Tensor:
    """Return [N, size, size]: the weights by which shifted and blurred lines are made of the old ones. Edges are repeated.
    shift: [N, 1], in pixels. sigma: [N, 1, 1], of the blur, in pixels."""
    place = torch.arange(size, device=shift.device, dtype=shift.dtype)
    source = (place - shift).clamp(0, size - 1)
    far = ((source[:, :, None] - place) / sigma).square() / 2
    weights = torch.where(far < 16, torch.exp(-far), 0.0)  # numbers that are almost 0 would slow a CPU down a hundred times
    return weights / weights.sum(2, keepdim=True)
