"""The discriminators of a Fader network: of latents (which attributes?), of patches and of images (real or decoded?).
Source: Lample et al. 2017, arXiv:1706.00409; sizes as in the authors' code (facebookresearch/FaderNetworks)."""

from typing import NamedTuple

from torch import Tensor, nn

from fader.attributes import Attributes, Head
from fader.counts import LabelCounts
from fader.networks.autoencoder import Latent, Layout
from fader.networks.layers import Down, channels_last, doubling, halvings
from fader.networks.normalization import Norm


class LatentDiscriminator(nn.Module):
    """A `Latent` to attribute logits [N, num_logits].
    It goes on where the encoder stopped: convolutions like the encoder's down to one pixel, always with batch norm and dropout,
    then Linear, LeakyReLU(0.2), Linear. With skips it reads the shallowest map that the decoder receives."""

    def __init__(
        self, layout: Layout, num_logits: int, hidden_channels: int = 512, dropout: float = 0.3, norm: Norm = "global"
    ) -> None:
        super().__init__()
        widths = layout.widths[layout.num_layers - layout.num_skips - 1 :]
        self.layers = nn.Sequential(*(Down(a, b, norm, dropout) for a, b in zip(widths, widths[1:])))
        self.hidden = nn.Sequential(nn.Linear(widths[-1], hidden_channels), nn.LeakyReLU(0.2, inplace=True))
        self.head = nn.Linear(hidden_channels, num_logits)

    def forward(self, latent: Latent) -> Tensor:
        return self.head(self.hidden(self.layers(latent.shallowest).flatten(1)))


class Verdict(NamedTuple):
    """What an `ImageDiscriminator` says. real: [N] logits, above 0 for real. attributes: [N, logits_width(head)] logits."""

    real: Tensor
    attributes: Tensor


class ImageDiscriminator(nn.Module):
    """Images [N, C, S, S] to a `Verdict`: one trunk with two heads, and without norm, so that no record sees another.

    Convolutions halve the image down to 4×4, then Linear, LeakyReLU(0.2) and a linear head each.

    counts: how often training saw each value, to be filled and read by whoever trains it.
    """

    def __init__(
        self, image_size: int, attributes: Attributes, head: Head, channels: int = 3, init_channels: int = 24,
        max_channels: int = 144, hidden_channels: int = 256,
    ) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; an image discriminator needs at least 8")
        widths = [channels, *doubling(init_channels, max_channels, halvings(image_size) - 2)]
        self.layers = nn.Sequential(*(Down(a, b, None) for a, b in zip(widths, widths[1:])))
        self.hidden = nn.Sequential(nn.Linear(16 * widths[-1], hidden_channels), nn.LeakyReLU(0.2))
        self.real = nn.Linear(hidden_channels, 1)
        self.attributes = nn.Linear(hidden_channels, attributes.logits_width(head))
        self.counts = LabelCounts(attributes)

    def forward(self, images: Tensor) -> Verdict:
        hidden = self.hidden(self.layers(channels_last(images)).flatten(1))
        return Verdict(self.real(hidden)[:, 0], self.attributes(hidden))

class PatchDiscriminator(nn.Module):
    """Images [N, C, S, S] to a map [N, 1, H, W] of logits, above 0 where a patch looks real.
    Raises ValueError: images are smaller than 32 pixels, too small for one patch."""

    def __init__(
        self, image_size: int, channels: int = 3, init_channels: int = 32, max_channels: int = 512, norm: Norm = "global"
    ) -> None:
        super().__init__()
        if image_size < 32:
            raise ValueError(f"image_size is {image_size}; a patch discriminator needs at least 32")
        first, *more = doubling(init_channels, max_channels, 4)
        blocks = [Down(channels, first, None)]
        for before, after, stride in zip([first, *more], more, (2, 2, 1)):
            blocks.append(Down(before, after, norm, stride=stride))
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Conv2d(more[-1], 1, 4, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(channels_last(images)))
