"""The conditional generator and discriminator of the GAN family, in the sizes of DCGAN.
Source: Radford et al. 2016, arXiv:1511.06434; Perarnau et al. 2016, arXiv:1611.06355, table 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.networks.layers import Deconv, Down, Up, channels_last, doubling, halvings, with_code
from fader.networks.normalization import BatchNorm, LocalBatchNorm, Norm, norm

_SIDE = 4  # pixels of the smallest maps


class Condition(nn.Module):
    """A code [N, code_width] to what these networks read, [N, width] in [-1, 1].
    One column a binary or continuous attribute, k a k-way one: 1 where a value is present, -1 where it is absent."""

    def __init__(self, attributes: Attributes) -> None:
        super().__init__()
        blocks = zip(attributes, attributes.code_slices())
        columns = [c for a, s in blocks for c in (range(s.start, s.stop) if a.kind == "k-way" else [s.stop - 1])]
        self.width = len(columns)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, code: Tensor) -> Tensor:
        return 2 * code.index_select(1, self.columns) - 1


class Generator(nn.Module):
    """Noise [N, noise_width] and a code [N, code_width] to images [N, C, S, S] in [-1, 1].
    A full convolution makes maps of 4×4 of them; each further layer doubles the sides and halves the channels.
    init_channels: of the last maps before the image; going back they double, up to `max_channels`.
    dropout: probability of zeroing an element, in every layer between the first and the last."""

    def __init__(
        self, attributes: Attributes, noise_width: int, image_size: int, channels: int = 3, init_channels: int = 64,
        max_channels: int = 512, deconv: Deconv = "convtranspose", norm_kind: Norm = "global", dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = widths_of(image_size, init_channels, max_channels)[::-1]
        self.condition = Condition(attributes)
        self.first = nn.Linear(noise_width + self.condition.width, widths[0] * _SIDE**2, bias=False)
        self.norm = norm(norm_kind, widths[0])
        layers = [Up(a, b, deconv, norm_kind, dropout) for a, b in zip(widths, widths[1:])]
        self.layers = nn.Sequential(*layers, Up(widths[-1], channels, deconv, None))

    def forward(self, noise: Tensor, code: Tensor) -> Tensor:
        known = torch.cat([part.to(self.first.weight.dtype) for part in (noise, self.condition(code))], 1)
        maps = self.first(known).unflatten(1, (-1, _SIDE, _SIDE))
        return self.layers(channels_last(F.relu(self.norm(maps))))


class ConditionalDiscriminator(nn.Module):
    """Images [N, C, S, S] and a code [N, code_width] to logits [N], above 0 where an image is real and shows the code.
    The code is spread over planes beside the first layer's maps.
    norm_kind: of all layers but the first; None leaves it out."""

    def __init__(
        self, attributes: Attributes, image_size: int, channels: int = 3, init_channels: int = 64, max_channels: int = 512,
        norm_kind: Norm | None = "global",
    ) -> None:
        super().__init__()
        widths = widths_of(image_size, init_channels, max_channels)
        self.condition, self.channel_multiple = Condition(attributes), 1
        self.first = Down(channels, widths[0], None)
        inputs = [widths[0] + self.condition.width, *widths[1:-1]]
        self.layers = nn.Sequential(*(Down(a, b, norm_kind) for a, b in zip(inputs, widths[1:])))
        self.head = nn.Linear(widths[-1] * _SIDE**2, 1)

    def features(self, images: Tensor, code: Tensor) -> Tensor:
        """[N, F]: what the last layer reads."""
        maps = with_code(self.first(channels_last(images)), self.condition(code), multiple=self.channel_multiple)
        return self.layers(maps).flatten(1)

    def forward(self, images: Tensor, code: Tensor) -> Tensor:
        return self.head(self.features(images, code))[:, 0]


def widths_of(image_size: int, init_channels: int, max_channels: int, least: int = 16) -> list[int]:
    """Channels of the layers between an image and maps of 4×4.
    Raises ValueError: the image is smaller than `least` pixels, or its side is no power of two."""
    count = halvings(image_size) - halvings(_SIDE)
    if image_size < least:
        raise ValueError(f"image_size is {image_size}; a generator needs at least {least}")
    return doubling(init_channels, max_channels, count)


def begin_as_dcgan(network: nn.Module) -> nn.Module:
    """The network itself with weights drawn from N(0, 0.02²), scales of batch norm from N(1, 0.02²), and biases of 0.
    Source: Radford et al. 2016, arXiv:1511.06434, section 4."""
    for module in network.modules():
        normalises = isinstance(module, (BatchNorm, LocalBatchNorm))
        if normalises or isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 1.0 if normalises else 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if normalises:
            nn.init.zeros_(module.running_mean)
    return network
