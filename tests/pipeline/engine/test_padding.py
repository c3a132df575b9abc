"""Channels padded to a multiple of 8 change nothing but rounding: every phase of every method, first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fader.networks.layers import Down, Up
from fader.networks.padding import pad_channels
from pipeline.config import EngineConfig
from pipeline.engine import Engine
from tests.pipeline.engine.test_step import CASES, build, capturing, shams, update_all  # noqa: F401
from tests.shams import SGD

MORE = {"everything", "an image adversary", "upsampling", "pixel shuffle", "spectral norm", "latent optimisation"}
OURS = [(name, case) for name, case in CASES if not name.startswith("sham") and case in MORE | {"by default"}]


def engines(name: str, case: str) -> list[Engine]:
    """Engines of the same method with and without padding, which step by SGD, so that a rounding stays one."""
    found = []
    for multiple in (1, 8):
        method = build(name, case)
        groups = dict.fromkeys(method.optimizers(), SGD)
        method.optimizers = lambda groups=groups: groups
        found.append(Engine(method, settings=EngineConfig(channel_multiple=multiple)))
    return found


@pytest.mark.parametrize(("name", "case"), OURS)
def test_padded_channels_train_as_the_others_do_and_can_be_captured(name, case, monkeypatch):
    plain, padded = engines(name, case)
    before = torch.cat([p.detach().flatten().clone() for p in plain.networks.parameters()])
    reports = [update_all(engine, 0) for engine in (plain, padded)]
    after = [torch.cat([p.detach().flatten() for p in engine.networks.parameters()]) for engine in (plain, padded)]
    assert [*plain.networks.state_dict()] == [*padded.networks.state_dict()]
    for key, value in reports[0].items():
        torch.testing.assert_close(reports[1][key], value, rtol=1e-3, atol=1e-4)
    moved, apart = (after[0] - before).norm(), (after[0] - after[1]).norm()
    assert moved > 0 and apart < 1e-3 * moved, (apart, moved)
    with capturing(monkeypatch):
        update_all(padded, 1)


@pytest.mark.parametrize("layer", [Down(3, 5, "global"), Up(13, 3, "convtranspose", None), Up(13, 3, "pixelshuffle", None)])
def test_every_convolution_sees_channels_by_the_multiple(layer, monkeypatch):
    seen = []
    for name in ("conv2d", "conv_transpose2d"):
        original = getattr(nn.functional, name)

        def counted(maps, weight, *rest, original=original):
            seen.append((maps.shape[1] % 8, weight.shape[0] % 8, weight.shape[1] % 8))
            return original(maps, weight, *rest)

        monkeypatch.setattr(nn.functional, name, counted)
    pad_channels(layer, 8)
    inputs = next(module.in_channels for module in layer.modules() if hasattr(module, "in_channels"))
    layer(torch.rand(2, inputs, 8, 8))
    assert seen and set(seen) == {(0, 0, 0)}


def test_a_decoder_joins_its_planes_and_the_zeros_in_one_copy():
    """No convolution but the first and the last layer's has to pad what it reads."""
    _, padded = engines("fader", "upsampling")
    decoder = padded.networks["decoder"]
    assert decoder.channel_multiple == 8
    widths = [layer.deconv[1].in_channels for layer in decoder.layers]
    read = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    encoder = padded.networks["encoder"]
    decoder(encoder(torch.rand(2, 3, 32, 32)), torch.rand(2, decoder.code_width))
    assert read == [-(-width // 8) * 8 for width in widths] and read != widths


def test_wrong_channels_are_refused_as_without_padding_and_other_convolutions_are_left_alone():
    layer = nn.Conv2d(3, 5, 3)
    pad_channels(layer, 8)
    for channels in (1, 4, 20):
        with pytest.raises(RuntimeError, match="channels"):
            layer(torch.rand(1, channels, 8, 8))
    for settings in ({"groups": 3, "out_channels": 6}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}):
        other = nn.Conv2d(**{"in_channels": 3, "out_channels": 5, "kernel_size": 3, **settings})
        before = other(torch.ones(1, 3, 8, 8))
        pad_channels(other, 8)
        assert torch.equal(other(torch.ones(1, 3, 8, 8)), before)
