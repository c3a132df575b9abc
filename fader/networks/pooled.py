"""The networks of VAC+GAN: a generator with dense layers, and what reads images by a mean over pixels.

Sizes as in the document "Generate Faces with Specific Attributes" (Said, Colagrande): at 64×64 with 40 attributes 34,955,078,
1,078,817 and 715,176 numbers, batch norm's statistics and spectral norm's vectors among them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.networks.generator import Condition
from fader.networks.layers import Deconv, channels_last, deconvolution, wide
from fader.networks.normalization import Norm, drop_bias, norm

_SIDE = 8


class DenseGenerator(nn.Module):
    """Noise [N, noise_width] and a code [N, code_width] to images [N, C, S, S] in [-1, 1].
    Two dense layers make maps of 8×8; each further layer doubles the sides and convolves 5×5.
    widths: channels from the maps of 8×8 on, one for each doubling but the last, which makes the image.
    deconv: "upsampling" repeats each pixel and convolves 5×5; the others are as in `Up`. dropout: after the dense layers."""

    def __init__(
        self, attributes: Attributes, noise_width: int, widths: Sequence[int], channels: int, hidden_channels: int,
        deconv: Deconv, norm_kind: Norm, dropout: float,
    ) -> None:
        super().__init__()
        self.condition = Condition(attributes)
        values = widths[0] * _SIDE**2
        self.dense = nn.Sequential(
            nn.Linear(noise_width + self.condition.width, hidden_channels),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden_channels, values),
            nn.Unflatten(1, (values, 1, 1)),
            norm(norm_kind, values),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
        )
        drop_bias(self.dense, "3", "5")
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [_doubled(deconv, before, after), norm(norm_kind, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _doubled(deconv, widths[-1], channels))
        for number in range(0, len(layers), 3) if deconv == "upsampling" else ():
            drop_bias(self.layers, f"{number}.1", str(number + 1))

    def forward(self, noise: Tensor, code: Tensor) -> Tensor:
        known = torch.cat([part.to(self.dense[0].weight.dtype) for part in (noise, self.condition(code))], 1)
        maps = self.dense(known).view(len(known), -1, _SIDE, _SIDE)
        return torch.tanh(wide(self.layers(channels_last(maps))))


def _doubled(deconv: Deconv, before: int, after: int) -> nn.Module:
    if deconv == "upsampling":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 5, 1, 2))
    return deconvolution(deconv, before, after)


class PooledClassifier(nn.Module):
    """Images [N, C, S, S] to logits [N, num_logits]: convolutions of stride 2, the mean over pixels, a linear layer.
    widths: channels after each convolution. kernel: side of the convolutions' kernels.
    norm_kind: after each convolution; None leaves it out."""

    def __init__(self, channels: int, widths: Sequence[int], kernel: int, norm_kind: Norm | None, num_logits: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths):
            norms = [] if norm_kind is None else [norm(norm_kind, after)]
            layers += [nn.Conv2d(before, after, kernel, 2, (kernel - 1) // 2), *norms, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        for number in range(0, len(layers), 3) if norm_kind is not None else ():
            drop_bias(self.layers, str(number), str(number + 1))
        self.head = nn.Linear(widths[-1], num_logits)

    def features(self, images: Tensor) -> Tensor:
        """[N, F]: what the last layer reads."""
        return self.layers(channels_last(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
