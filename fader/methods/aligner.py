"""The aligner: a network that sees a face framed nearly as in training, and says by which similarity it is off.

It needs no landmarks. Any set whose pictures are aligned teaches it, because a similarity is drawn, applied to the picture, and
asked back. Applied again to the window that it has corrected, it comes nearer each time.
Source: iterated regression of a residual warp, Lin, Lucey 2017, arXiv:1612.03897 (here trained on planted warps).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fader.draws import Draws
from fader.method import Batch, Context, Loss, Method, Networks, Optimizer, Phase, Stage, register
from fader.networks.classifier import Classifier
from fader.networks.layers import wide
from fader.settings import Settings, setting
from fader.similarity import Similarity, positions, sample

_LEVER = 0.4
_PARAMETERS = 4


@dataclass(frozen=True)
class AlignerSettings(Settings):
    images: int = setting(300_000, "length of training", least=1)
    window: float = setting(0.75, "side of the window that the network sees, as a share of the picture's", least=0.01, most=1)
    window_below: float = setting(0.1, "how far the window's centre lies below the picture's, in half sides of the picture")
    max_rotation: float = setting(30.0, "largest planted turn, in degrees either way", least=0)
    max_zoom: float = setting(1.4, "largest planted scale; the smallest is one over it", least=1)
    max_shift: float = setting(0.35, "largest planted shift along each axis, in half sides of the window", least=0)
    init_channels: int = setting(16, "of the first convolution; they double with each", least=1)
    max_channels: int = setting(128, "up to so many", least=1)
    hidden_channels: int = setting(128, "of the last hidden layer", least=1)
    norm: Literal["global", "local"] = setting("global", "an instance of one pixel, to which images halve, has no variance")
    learning_rate: float = setting(1e-3, "of Adam", least=0)
    betas: tuple[float, float] = setting((0.9, 0.99), "of Adam")
    weight_decay: float = setting(0.0, "share of each weight that a step takes off, times the learning rate", least=0)
    clip_norm: float = setting(5.0, "largest L2 norm of all gradients; 0 = no clipping", least=0)
    ema_half_life: int = setting(0, "of the moving average of the weights, in images; 0 = none", least=0)


class Regressor(nn.Module):
    """Windows [N, C, S, S] to [N, 4]: log scale, turn in radians, shift right and down in half sides of the window.
    Every channel of a window is first brought to mean 0 and variance 1, because light and tint must not matter."""

    def __init__(self, size: int, channels: int, settings: AlignerSettings) -> None:
        super().__init__()
        self.layers = Classifier(
            size, _PARAMETERS, channels, settings.init_channels, settings.max_channels, settings.hidden_channels,
            norm=settings.norm,
        )

    def forward(self, windows: Tensor) -> Tensor:
        windows = wide(windows)
        mean = windows.mean((2, 3), keepdim=True)
        deviation = windows.std((2, 3), keepdim=True)
        return self.layers((windows - mean) / (deviation + 0.02))


@register
class Aligner(Method):
    """Networks: regressor. Its window has half the pixels of the training pictures, image_size / 2 a side."""

    name = "aligner"
    Settings = AlignerSettings
    learns_geometry = True

    @property
    def window_size(self) -> int:
        return self.image_size // 2

    def build(self) -> dict[str, nn.Module]:
        return {"regressor": Regressor(self.window_size, self.channels, self.settings)}

    @property
    def window(self) -> Similarity:
        """From window coordinates to the picture's; in both, -1 and 1 are the edges."""
        return Similarity(complex(self.settings.window), complex(0, self.settings.window_below))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("aligner", (Phase(("regressor",), self.regressor_loss),), self.settings.images),)

    def optimizers(self) -> dict[tuple[str, ...], Optimizer]:
        return {("regressor",): Optimizer.of(self.settings)}

    def regressor_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        """The mean distance of four points of the window from where the planted similarity put them, rounded at 0.
        The report's error is the mean distance in pixels of the training pictures."""
        planted = self.planted(batch.draws)
        predicted = similarity(networks["regressor"](self.windows(batch.images, planted, batch.draws)))
        off = torch.stack([(predicted(corner) - planted(corner)).abs() for corner in _CORNERS], 1)
        pixels = off.detach().mean(1) * (self.settings.window * self.image_size / 2)
        return Loss(batch.mean(_rounded(off).mean(1)), {"regressor/error": batch.mean(pixels)})

    def planted(self, draws: Draws) -> Similarity:
        """Draw one similarity a record, in window coordinates: where a well-framed face's points are to appear.
        All its parts shrink by one factor uniform on [0, 1), because the small errors that the first correction leaves must be as
        familiar as the large ones before it."""
        s = self.settings
        parts = (draws.uniform("similarity", (_PARAMETERS,)) * 2 - 1) * draws.uniform("strength", (1,))
        limits = (math.log(s.max_zoom), math.radians(s.max_rotation), s.max_shift, s.max_shift)
        return similarity(torch.stack([part * limit for part, limit in zip(parts.unbind(1), limits)], 1))

    def windows(self, images: Tensor, planted: Similarity, draws: Draws) -> Tensor:
        """Cut pictures [N, C, S, S] to windows [N, C, S/2, S/2] in which the face is off by the planted similarity.
        Photos go on beyond the edge of a training picture. Half of the records see the picture's mirror image there, and half see
        one flat colour."""
        seen = positions(self.window_size, images.device)[None]
        source = self.window @ planted.inverse()
        points = source.factor[:, None, None] * seen + source.shift[:, None, None]
        pixels = sample(images, points)
        colour = draws.uniform("colour", (self.channels,)).to(images.dtype)[:, :, None, None] * 2 - 1
        beyond = torch.maximum(points.real.abs(), points.imag.abs()) > 1
        flat = beyond & (draws.uniform("beyond") < 0.5)[:, None, None]
        return torch.where(flat[:, None], colour, pixels)

    def align(self, windows: Tensor) -> Similarity:
        """Windows [N, C, S/2, S/2] in [-1, 1] to N similarities: where a well-framed face's points appear in each."""
        return similarity(wide(self.networks["regressor"](windows)))


_CORNERS = tuple(complex(x, y) for x in (-_LEVER, _LEVER) for y in (-_LEVER, _LEVER))


def similarity(parameters: Tensor) -> Similarity:
    """[N, 4] log scale, turn in radians, shift right and down, to N similarities."""
    log_scale, turn, right, down = wide(parameters).unbind(1)
    return Similarity(torch.polar(log_scale.exp(), turn), torch.complex(right, down))


def _rounded(distance: Tensor, width: float = 0.02) -> Tensor:
    """Return a distance that is quadratic below `width`, so that its gradient does not jump at 0."""
    return F.smooth_l1_loss(distance, torch.zeros_like(distance), beta=width, reduction="none")
