"""Encoder and decoder of a Fader network: the attributes enter the decoder at every layer.
Source: Lample et al. 2017, arXiv:1706.00409, section 4.1; sizes as in the authors' code (facebookresearch/FaderNetworks)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fader.networks.layers import Deconv, Down, Up, channels_last, doubling, halvings, with_code
from fader.networks.normalization import Norm

Preset = Literal["paper", "official", "small"]
Skip = Literal["plain", "selective"]

PRESETS: dict[str, dict[str, int]] = {
    "paper": {"init_channels": 16, "max_channels": 512, "num_layers": 7},  # 256×256: latent 512×2×2, the paper's
    "official": {"init_channels": 32, "max_channels": 512, "num_layers": 6},  # 256×256: 512×4×4, the code's default
    "small": {"init_channels": 32, "max_channels": 512, "num_layers": 5},  # 64×64: 512×2×2
}


class Latent(NamedTuple):
    """What an encoder wrote: the deepest map [N, C, H, W], and the maps that skip, deepest first."""

    latent: Tensor
    skips: tuple[Tensor, ...] = ()

    @property
    def shallowest(self) -> Tensor:
        """The map of which all others are functions: the only one a latent discriminator has to read."""
        return self.skips[-1] if self.skips else self.latent


@dataclass(frozen=True)
class Layout:
    """Sizes of an encoder and of everything that fits it.

    image_size: pixels a side, a power of two. channels: of the images.
    init_channels: of the first layer; they double with each, up to `max_channels`. num_layers: each halves the sides.
    num_skips: encoder maps handed to the decoder beside the latent.
    Raises ValueError: the image is too small for the layers, or there are not enough layers to skip.
    """

    image_size: int
    channels: int = 3
    init_channels: int = 32
    max_channels: int = 512
    num_layers: int = 6
    num_skips: int = 0

    def __post_init__(self) -> None:
        most = halvings(self.image_size)
        if not 1 <= self.num_layers <= most:
            raise ValueError(f"num_layers is {self.num_layers}; an image of {self.image_size} pixels halves at most {most} times")
        if not 0 <= self.num_skips < self.num_layers:
            most = self.num_layers - 1
            raise ValueError(f"num_skips is {self.num_skips}; {self.num_layers} layers allow 0 to {most}")
        doubling(self.init_channels, self.max_channels, self.num_layers)

    @property
    def widths(self) -> list[int]:
        """Channels after each layer of a stack that halves the image to one pixel; the encoder is its beginning."""
        return doubling(self.init_channels, self.max_channels, halvings(self.image_size))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape_after(self.num_layers)

    @property
    def shallowest_shape(self) -> tuple[int, int, int]:
        return self._shape_after(self.num_layers - self.num_skips)

    def _shape_after(self, layers: int) -> tuple[int, int, int]:
        side = self.image_size >> layers
        return self.widths[layers - 1], side, side


class Encoder(nn.Module):
    """Images [N, C, S, S] to a `Latent`."""

    def __init__(self, layout: Layout, norm: Norm = "global", dropout: float = 0.0) -> None:
        super().__init__()
        if norm == "instance" and layout.latent_shape[1] == 1:
            raise ValueError(f"norm 'instance' needs more than one pixel, and {layout.num_layers} layers leave one; take fewer")
        widths = [layout.channels, *layout.widths[: layout.num_layers]]
        self.num_skips = layout.num_skips
        self.layers = nn.ModuleList(
            Down(a, b, norm if i > 0 else None, dropout) for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )

    def forward(self, images: Tensor) -> Latent:
        maps = []
        features = channels_last(images)
        for layer in self.layers:
            features = layer(features)
            maps.append(features)
        return Latent(features, tuple(maps[-1 - i] for i in range(1, self.num_skips + 1)))


class Decoder(nn.Module):
    """A `Latent` and a code [N, K] to images [N, C, S, S] in [-1, 1].

    Every layer reads [features, code planes, skip]. Layers 1 to num_skips have a skip: layer i the encoder's map that is i above
    the latent.
    deconv, last: how the layers double the sides, and how the last of them does (None: as the others).
    dropout: in the first three layers, except the last of all.
    skip: "plain" takes encoder maps as they are; "selective" scales each of their numbers by a gate in (0, 1) that is computed
        from features, code and the map, so that a swap need not keep what it should change. Source of the idea: Liu et al. 2019,
        "STGAN", arXiv:1904.09709 (there a recurrent unit).
    """

    def __init__(
        self, layout: Layout, code_width: int, norm: Norm = "global", deconv: Deconv = "convtranspose", dropout: float = 0.0,
        skip: Skip = "plain", last: Deconv | None = None,
    ) -> None:
        super().__init__()
        widths = [layout.channels, *layout.widths[: layout.num_layers]][::-1]
        kinds = [deconv] * (layout.num_layers - 1) + [last or deconv]
        self.code_width = code_width
        self.channel_multiple = 1
        self.num_skips = layout.num_skips
        self.layers = nn.ModuleList(
            Up(
                a + code_width + (a if 0 < i <= layout.num_skips else 0), b, kind, norm if i < len(kinds) - 1 else None,
                dropout if i < 3 else 0.0,
            )
            for i, (a, b, kind) in enumerate(zip(widths, widths[1:], kinds))
        )
        gated = widths[1 : layout.num_skips + 1] if skip == "selective" else []
        self.gates = nn.ModuleList(nn.Conv2d(2 * width + code_width, width, 1) for width in gated)

    def forward(self, latent: Latent, code: Tensor) -> Tensor:
        """
        Raises:
            ValueError: the code's width or the number of skips is not this decoder's.
        """
        if code.ndim != 2 or code.shape[1] != self.code_width or len(code) != len(latent.latent):
            raise ValueError(f"code is {tuple(code.shape)}; this decoder takes {(len(latent.latent), self.code_width)}")
        if len(latent.skips) != self.num_skips:
            raise ValueError(f"the latent has {len(latent.skips)} skips; this decoder takes {self.num_skips}")
        features = latent.latent
        for i, layer in enumerate(self.layers):
            skip = latent.skips[i - 1] if 0 < i <= self.num_skips else None
            if skip is not None and self.gates:
                skip = skip * torch.sigmoid(self.gates[i - 1](with_code(features, code, skip, self.channel_multiple)))
            features = layer(with_code(features, code, skip, self.channel_multiple))
        return features
