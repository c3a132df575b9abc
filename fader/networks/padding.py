"""Convolutions that compute with channels padded to a multiple, because tensor cores take eight at a time."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn


def pad_channels(network: nn.Module, multiple: int) -> None:
    """Let every convolution of a network compute with as many channels as the next multiple, those that are added being zeros.
    Weights, gradients and results stay what they are, but for rounding; and so does what a checkpoint holds."""
    for module in network.modules():
        convolves = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        if convolves and (module.in_channels % multiple or module.out_channels % multiple):
            module.forward = functools.partial(_padded, module, multiple)
        if hasattr(module, "channel_multiple"):  # it joins maps, and can add zeros to them in the same copy
            module.channel_multiple = multiple


def _padded(layer: nn.Conv2d | nn.ConvTranspose2d, multiple: int, maps: Tensor) -> Tensor:
    inputs, outputs = -layer.in_channels % multiple, -layer.out_channels % multiple
    if more := layer.in_channels + inputs - maps.shape[1]:
        maps = F.pad(maps, (0, 0, 0, 0, 0, more))
    bias = layer.bias if layer.bias is None else F.pad(layer.bias, (0, outputs))
    if isinstance(layer, nn.ConvTranspose2d):
        weight = F.pad(layer.weight, (0, 0, 0, 0, 0, outputs, 0, inputs))
        maps = F.conv_transpose2d(maps, weight, bias, layer.stride, layer.padding)
    else:
        weight = F.pad(layer.weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
        maps = F.conv2d(maps, weight, bias, layer.stride, layer.padding)
    return maps[:, : layer.out_channels]

