"""The attribute classifier: a judge of swaps, and optionally an adversary of a Fader network.
Source: the classifier of facebookresearch/FaderNetworks (32 to 512 channels, hidden layer 512)."""

from torch import Tensor, nn

from fader.networks.layers import Down, channels_last, doubling, halvings
from fader.networks.normalization import Norm


class Classifier(nn.Module):
    """Images [N, C, S, S] to attribute logits [N, num_logits].
    Convolutions that halve the image down to one pixel, Linear, LeakyReLU(0.2), Linear."""

    def __init__(
        self, image_size: int, num_logits: int, channels: int = 3, init_channels: int = 32, max_channels: int = 512,
        hidden_channels: int = 512, dropout: float = 0.0, norm: Norm = "global",
    ) -> None:
        super().__init__()
        widths = [channels, *doubling(init_channels, max_channels, halvings(image_size))]
        self.layers = nn.Sequential(
            *(Down(a, b, norm if i > 0 else None, dropout) for i, (a, b) in enumerate(zip(widths, widths[1:])))
        )
        self.hidden = nn.Sequential(nn.Linear(widths[-1], hidden_channels), nn.LeakyReLU(0.2, inplace=True))
        self.head = nn.Linear(hidden_channels, num_logits)

    def features(self, images: Tensor) -> Tensor:
        """[N, hidden_channels]: what the last layer reads."""
        return self.hidden(self.layers(channels_last(images)).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
