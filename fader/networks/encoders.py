"""Encoders to a vector: a conditional VAE's, which gives a distribution of latents, and IcGAN's, which invert a generator.
Source: the variational encoder follows AntixK/PyTorch-VAE (models/cvae.py); IcGAN's is table 2 of Perarnau et al. 2016,
arXiv:1611.06355."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fader.attributes import Attributes
from fader.networks.generator import Condition, widths_of
from fader.networks.layers import Down, channels_last, doubling, halvings, wide, with_code
from fader.networks.normalization import Norm, norm


class Posterior(NamedTuple):
    """A normal distribution of latents: mean and logarithm of the variance, [N, latent_width] each."""

    mean: Tensor
    log_variance: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The latents that noise from N(0, 1) stands for."""
        return self.mean + (0.5 * self.log_variance).exp() * noise.to(self.mean.dtype)


class VariationalEncoder(nn.Module):
    """Images [N, C, S, S] and a code [N, code_width] to a `Posterior`.
    A linear layer draws the code as one more channel of the image; convolutions halve it down to 2×2; a linear layer follows."""

    def __init__(
        self, attributes: Attributes, latent_width: int, image_size: int, channels: int = 3, init_channels: int = 32,
        max_channels: int = 512, norm_kind: Norm = "global",
    ) -> None:
        super().__init__()
        widths = doubling(init_channels, max_channels, halvings(image_size) - 1)
        self.condition, self.image_size = Condition(attributes), image_size
        self.plane = nn.Linear(self.condition.width, image_size**2)
        inputs = [channels + 1, *widths]
        self.layers = nn.Sequential(*(Down(a, b, norm_kind) for a, b in zip(inputs, widths)))
        self.head = nn.Linear(4 * widths[-1], 2 * latent_width)

    def forward(self, images: Tensor, code: Tensor) -> Posterior:
        drawn = self.plane(self.condition(code).to(self.plane.weight.dtype))
        planes = drawn.view(-1, 1, self.image_size, self.image_size)
        hidden = self.layers(with_code(images, code[:, :0], planes)).flatten(1)
        return Posterior(*wide(self.head(hidden)).chunk(2, 1))


class InvertingEncoder(nn.Module):
    """Images [N, C, S, S], and beside them what is known already [N, K], to one vector for each head.
    Convolutions 5×5 of stride 2 halve the image down to 4×4; each head is a hidden layer and a linear one. All but the last layer
    have batch norm and ReLU.
    heads: the width of the hidden layer and of the vector, by name. known_width: K."""

    def __init__(
        self, heads: Mapping[str, tuple[int, int]], image_size: int, channels: int = 3, init_channels: int = 32,
        max_channels: int = 256, norm_kind: Norm = "global", known_width: int = 0,
    ) -> None:
        super().__init__()
        widths = widths_of(image_size, init_channels, max_channels)
        layers: list[nn.Module] = []
        for before, after in zip([channels + known_width, *widths], widths):
            layers += [nn.Conv2d(before, after, 5, 2, 2, bias=False), norm(norm_kind, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(16 * widths[-1], hidden, bias=False),
                    nn.Unflatten(1, (hidden, 1, 1)),
                    norm(norm_kind, hidden),
                    nn.Flatten(),
                    nn.ReLU(),
                    nn.Linear(hidden, width),
                )
                for name, (hidden, width) in heads.items()
            }
        )

    def forward(self, images: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
        maps = channels_last(images) if known is None else with_code(images, known)
        hidden = self.layers(maps)
        return {name: wide(head(hidden)) for name, head in self.heads.items()}
