"""Convolutions that compute with channels padded to a multiple, because tensor cores take eight at a time."""

import functools

import torch.nn.functional as F
from torch import Tensor, nn


def pad_channels(network: nn.Module, multiple: int) -> None:
    """Pad the channels of every plain convolution of a network with zeros, up to the next multiple. Gradients and results differ
    by rounding only; weights, and so checkpoints, stay as they are. Groups, dilation and padding by reflection are left alone."""
    for module in network.modules():
        convolves = type(module).forward in (nn.Conv2d.forward, nn.ConvTranspose2d.forward) and _is_plain(module)
        if convolves and (module.in_channels % multiple or module.out_channels % multiple):
            module.forward = functools.partial(_padded, module, multiple)
        if hasattr(module, "channel_multiple"):  # it joins maps, and can add zeros to them in the same copy
            module.channel_multiple = multiple


def _is_plain(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether `_padded` knows all that the layer does."""
    alone = layer.groups == 1 and layer.dilation == (1, 1)
    return alone and layer.padding_mode == "zeros" and not any(layer.output_padding)


def _padded(layer: nn.Conv2d | nn.ConvTranspose2d, multiple: int, maps: Tensor) -> Tensor:
    inputs, outputs = -layer.in_channels % multiple, -layer.out_channels % multiple
    if inputs and maps.shape[1] == layer.in_channels:  # else they are padded already, or wrong, which the convolution says
        maps = F.pad(maps, (0, 0, 0, 0, 0, inputs))
    bias = layer.bias if layer.bias is None else F.pad(layer.bias, (0, outputs))
    if isinstance(layer, nn.ConvTranspose2d):
        weight = F.pad(layer.weight, (0, 0, 0, 0, 0, outputs, 0, inputs))
        maps = F.conv_transpose2d(maps, weight, bias, layer.stride, layer.padding)
    else:
        weight = F.pad(layer.weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
        maps = F.conv2d(maps, weight, bias, layer.stride, layer.padding)
    return maps[:, : layer.out_channels]
