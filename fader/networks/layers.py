"""The two building blocks of every network here: one that halves the sides of its input, one that doubles them."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fader.networks.normalization import Norm, drop_bias, norm

Deconv = Literal["convtranspose", "upsampling", "pixelshuffle"]


def wide(tensor: Tensor) -> Tensor:
    """float32 of a half-precision tensor; float32 and float64 as they are. Losses are taken of wide tensors."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def channels_last(maps: Tensor) -> Tensor:
    """The same [N, C, H, W] values, stored pixel by pixel; every layer after it keeps that format.
    Convolutions read it fastest: measured in bf16 on two CPU cores, a training step takes a seventh of the time."""
    return maps.contiguous(memory_format=torch.channels_last)


def halvings(image_size: int) -> int:
    """How often a square image halves until it is one pixel: log2 of its side. Raises ValueError: the side is no power of two."""
    count = image_size.bit_length() - 1
    if image_size < 2 or image_size != 1 << count:
        raise ValueError(f"image_size is {image_size}; it must be a power of two, such as 64, 128 or 256")
    return count


def doubling(first: int, most: int, count: int) -> list[int]:
    """Channels that double from `first` up to `most`: (16, 512, 7) gives 16 32 64 128 256 512 512.
    Raises ValueError: a number is not positive, or `first` is above `most`."""
    if not 1 <= first <= most or count < 1:
        raise ValueError(f"{count} layers of {first} up to {most} channels do not exist")
    return [min(first << i, most) for i in range(count)]


def with_code(features: Tensor, code: Tensor, skip: Tensor | None = None, multiple: int = 1) -> Tensor:
    """[N, C, H, W] features, [N, K] code spread over constant planes, and a skip, joined along the channels.
    Zeros follow up to the next multiple of channels, but not up to 4×4 pixels, where a matrix product may take the maps."""
    planes = code.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
    parts = [features, planes] if skip is None else [features, planes, skip.to(features.dtype)]
    if (more := -sum(part.shape[1] for part in parts) % multiple) and features.shape[-1] > 4:
        parts.append(features.new_zeros(()).expand(len(features), more, *features.shape[2:]))
    return torch.cat([channels_last(part) for part in parts], 1)


# Where weights are many and pixels few, a convolution is fastest as one matrix product: on a CPU core in bf16, 32 records,
# forward and back, 512 channels: to one pixel 8 ms for 45, from 4×4 to 2×2 and back up 9 and 9 for 28 and 26. From 8×8
# on the convolution wins.


def halved_to_one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 4×4 convolution of stride 2 and padding 1 of [N, C, 2, 2], [N, O, 1, 1]: only the kernel's middle meets pixels."""
    return F.linear(x.flatten(1), weight[:, :, 1:3, 1:3].flatten(1), bias)[:, :, None, None]


def halved_to_two(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 4×4 convolution of stride 2 and padding 1 of [N, C, 4, 4], [N, O, 2, 2]."""
    patches = F.unfold(x, 4, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    return F.linear(patches, weight.flatten(1), bias).unflatten(0, (x.shape[0], 2, 2)).permute(0, 3, 1, 2)


def doubled_to_four(x: Tensor, weight: Tensor) -> Tensor:
    """The 4×4 transposed convolution of stride 2 and padding 1 of [N, C, 2, 2], [N, O, 4, 4]."""
    patches = x.flatten(2).transpose(1, 2).flatten(0, 1) @ weight.flatten(1)
    return channels_last(F.fold(patches.unflatten(0, (x.shape[0], 4)).transpose(1, 2), 4, 4, padding=1, stride=2))


class Down(nn.Module):
    """Convolution 4×4 (stride 2, padding 1), norm, LeakyReLU(0.2), dropout: [N, C, H, W] to [N, O, H/2, W/2].

    The convolution has a bias where no norm follows.
    norm_kind: None leaves the norm out, as the first layer of a network does.
    dropout: probability of zeroing an element (not a whole channel).
    stride: 1 keeps the sides (less one) instead of halving them.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm_kind: Norm | None, dropout: float = 0.0, stride: int = 2
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride, 1)
        self.norm = nn.Identity() if norm_kind is None else norm(norm_kind, out_channels)
        if norm_kind is not None:
            drop_bias(self, "conv", "norm")
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.leaky_relu(self.norm(self._convolved(x)), 0.2, inplace=True))

    def _convolved(self, x: Tensor) -> Tensor:
        if self.conv.stride == (2, 2) and x.shape[-2:] == (2, 2):
            return halved_to_one(x, self.conv.weight, self.conv.bias)
        if self.conv.stride == (2, 2) and x.shape[-2:] == (4, 4) and x.device.type == "cpu":
            return halved_to_two(x, self.conv.weight, self.conv.bias)
        return self.conv(x)


class Up(nn.Module):
    """Doubles the sides, then norm, dropout, ReLU; or, as the last layer, tanh alone: [N, C, H, W] to [N, O, 2H, 2W].
    deconv: "convtranspose" is a transposed convolution 4×4 (stride 2, padding 1); "upsampling" repeats each pixel and convolves
        3×3; "pixelshuffle" convolves 3×3 to 4·O channels and rearranges them. None has a bias.
    norm_kind: None makes this the last layer. dropout: probability of zeroing an element, before the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, deconv: Deconv, norm_kind: Norm | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.last = norm_kind is None
        self.deconv = deconvolution(deconv, in_channels, out_channels)
        self.norm = nn.Identity() if norm_kind is None else norm(norm_kind, out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 0 and not self.last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        few = isinstance(self.deconv, nn.ConvTranspose2d) and x.shape[-2:] == (2, 2) and x.device.type == "cpu"
        x = doubled_to_four(x, self.deconv.weight) if few else self.deconv(x)
        # tanh in float32 also under autocast: half precision would leave 256 grey levels only half of themselves.
        return torch.tanh(wide(x)) if self.last else F.relu(self.dropout(self.norm(x)), inplace=True)


def deconvolution(kind: Deconv, in_channels: int, out_channels: int) -> nn.Module:
    """The layer that doubles the sides; see `Up`. Raises ValueError: there is no such kind."""
    if kind == "convtranspose":
        return nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1, bias=False)
    if kind == "upsampling":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False))
    if kind == "pixelshuffle":
        return nn.Sequential(nn.Conv2d(in_channels, 4 * out_channels, 3, 1, 1, bias=False), nn.PixelShuffle(2))
    raise ValueError(f"deconv {kind!r} is none of {', '.join(get_args(Deconv))}")
