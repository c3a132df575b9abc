"""A residual attribute classifier: a judge of another build than the official one, which no loss uses."""

import torch.nn.functional as F
from torch import Tensor, nn

from fader.networks.layers import channels_last, doubling, halvings
from fader.networks.normalization import Norm
from fader.networks.normalization import norm as norm_of

_LAST_SIDE = 2  # log2 of the side of the last maps, over which features are averaged


class ResidualBlock(nn.Module):
    """Norm, ReLU, convolution 3×3, twice, beside a shortcut: [N, C, H, W] to [N, O, H/stride, W/stride].
    Source: He et al. 2016, arXiv:1603.05027, pre-activation; the shortcut's mean over 2×2 as in He et al. 2019, arXiv:1812.01187,
    ResNet-D."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_kind: Norm) -> None:
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = norm_of(norm_kind, in_channels), norm_of(norm_kind, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        changes = in_channels != out_channels or stride > 1
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(hidden, 2) if self.stride > 1 else hidden)
        return x + self.conv2(F.relu(self.norm2(self.conv1(hidden))))


class ResidualClassifier(nn.Module):
    """Images [N, C, S, S] to attribute logits [N, num_logits].
    A convolution 4×4 that halves, one block that keeps the sides, blocks that halve them to 4 pixels, the mean over pixels,
    dropout, Linear."""

    def __init__(
        self, image_size: int, num_logits: int, channels: int = 3, init_channels: int = 32, max_channels: int = 256,
        dropout: float = 0.0, norm: Norm = "global",
    ) -> None:
        super().__init__()
        count = max(halvings(image_size) - 1 - _LAST_SIDE, 0)  # halvings that are left to the blocks after the first
        widths = [init_channels, *doubling(init_channels, max_channels, count + 1)]
        self.stem = nn.Conv2d(channels, init_channels, 4, 2, 1, bias=False)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, 2 if i else 1, norm) for i, (a, b) in enumerate(zip(widths, widths[1:])))
        )
        self.norm = norm_of(norm, widths[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_logits)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.blocks(self.stem(channels_last(images)))))
        return self.head(self.dropout(maps.mean((2, 3))))
