"""Layouts as published: parameter counts, channels of every layer, what each option changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fader.adversaries.latent import LatentSettings
from fader.adversaries.patch import PatchSettings
from fader.attributes import Attribute, Attributes
from fader.losses.adversarial import patch_probabilities
from fader.methods import Fader, FaderSettings, Judge, JudgeSettings
from fader.networks.autoencoder import Decoder, Encoder, Latent, Layout
from fader.networks.classifier import Classifier
from fader.networks.discriminators import LatentDiscriminator, PatchDiscriminator
from fader.networks.layers import Down, Up, deconvolution, doubled_to_four, doubling, halvings
from fader.networks.normalization import norm, num_parameters
from fader.networks.pooled import DenseGenerator, PooledClassifier
from fader.networks.residual import ResidualClassifier
from tests.fader.tiny import MIXED, planted, tiny_fader

MALE = Attributes([Attribute("Male")])
FORTY = Attributes([Attribute(f"attribute_{i}") for i in range(40)])


@pytest.mark.parametrize(
    "settings, image_size, latent_shape, counts",
    [
        ({"preset": "official"}, 256, (512, 4, 4), (6_985_568, 7_014_944, 14_000_512, 8_655_362)),
        ({"preset": "paper"}, 256, (512, 2, 2), (6_993_072, 7_022_912, 14_015_984, 4_459_522)),
        ({"preset": "official"}, 128, (512, 2, 2), (6_985_568, 7_014_944, 14_000_512, 4_459_522)),
        ({"preset": "small", "num_layers": 4}, 64, (256, 4, 4), (691_040, 697_376, 1_388_416, 6_558_210)),
        ({"preset": "small"}, 64, (512, 2, 2), (2_789_728, 2_803_232, 5_592_960, 4_459_522)),
    ],
)
def test_parameter_counts_are_the_published_ones(settings, image_size, latent_shape, counts):
    method = Fader(FaderSettings(**settings), MALE, image_size)
    encoder, decoder, discriminator = (num_parameters(network) for network in method.networks.values())
    assert (encoder, decoder, encoder + decoder, discriminator) == counts
    assert method.settings.layout(image_size, 3).latent_shape == latent_shape


@pytest.mark.parametrize("image_size, parameters", [(256, 15_680_944), (128, 11_485_104), (64, 7_289_264)])
def test_the_judge_with_40_attributes_has_the_published_count(image_size, parameters):
    assert num_parameters(Judge(JudgeSettings(), FORTY, image_size).networks["classifier"]) == parameters


def test_the_patch_discriminator_has_the_published_count():
    assert num_parameters(PatchDiscriminator(256)) == 695_137


def test_the_paper_presets_encoder_channels():
    layers = Fader(FaderSettings(preset="paper"), MALE, 256).networks["encoder"].layers
    assert [layer.conv.out_channels for layer in layers] == [16, 32, 64, 128, 256, 512, 512]


def test_the_official_decoder_reads_code_planes_at_every_layer():
    layers = Fader(FaderSettings(), MALE, 256).networks["decoder"].layers
    sizes = [(layer.deconv.in_channels, layer.deconv.out_channels) for layer in layers]
    assert sizes == [(514, 512), (514, 256), (258, 128), (130, 64), (66, 32), (34, 3)]
    assert all(layer.deconv.bias is None for layer in layers)


def test_the_first_convolution_of_the_encoder_has_a_bias_and_all_others_a_norm_in_its_place():
    layers = tiny_fader().networks["encoder"].layers
    assert [layer.conv.bias is not None for layer in layers] == [True, False, False]
    assert [isinstance(layer.norm, nn.Identity) for layer in layers] == [True, False, False]
    assert tiny_fader().networks["encoder"].state_dict()["layers.1.conv.bias"].abs().sum() == 0, "checkpoints keep it"


@pytest.mark.parametrize("kind", ["global", "local", "instance"])
def test_a_bias_that_a_norm_takes_out_is_not_computed_and_one_that_was_learnt_is_read_as_before(kind):
    """Old networks computed it: outputs in train and eval mode and gradients of the weights are theirs, in float64."""
    torch.manual_seed(4)
    old = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 4, 2, 1), "norm": norm(kind, 5)}).double()
    new = Down(3, 5, kind).double()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    for _ in range(3):
        old["norm"](old["conv"](x))
    state = {key: value.clone() for key, value in old.state_dict().items()}
    for _ in range(2):  # what it was given is not changed, and what it writes is read again
        new.load_state_dict(state)
    new.load_state_dict(copy.deepcopy(new).state_dict())
    assert new.state_dict().keys() == state.keys() and torch.equal(state["conv.bias"], old["conv"].bias)
    for training in (False, True):
        whole, found = (F.leaky_relu(old.train(training)["norm"](old["conv"](x)), 0.2), new.train(training)(x))
        torch.testing.assert_close(found, whole)
        wanted, got = (torch.autograd.grad(y.sin().sum(), m.conv.weight) for y, m in ((whole, old), (found, new)))
        torch.testing.assert_close(got, wanted)
    if kind != "instance":
        torch.testing.assert_close(new.norm.running_mean, old["norm"].running_mean - old["conv"].bias)


@pytest.mark.parametrize("deconv", ["convtranspose", "upsampling"])
def test_dense_and_pooled_networks_compute_no_bias_before_a_norm(deconv):
    generator = DenseGenerator(MALE, 4, [8, 6, 4], 3, 16, deconv, "global", 0.0)
    classifier = PooledClassifier(3, [4, 8], 5, "global", 2)
    for network, first in ((generator, "dense.0"), (classifier, "head")):
        before = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        biases = {name for name, m in network.named_modules() if isinstance(m, before) and m.bias is not None}
        assert biases == {first} | ({"layers.6.1"} if network is generator and deconv == "upsampling" else set())
        network.load_state_dict(network.state_dict())


def test_the_last_layer_may_double_the_sides_in_a_way_of_its_own():
    def kinds(**settings):
        return [type(layer.deconv) for layer in tiny_fader(**settings).networks["decoder"].layers]

    assert kinds(last_deconv="upsampling") == [nn.ConvTranspose2d, nn.ConvTranspose2d, nn.Sequential]
    assert kinds(deconv="upsampling") == [nn.Sequential] * 3
    assert kinds(deconv="upsampling", last_deconv="convtranspose") == [nn.Sequential, nn.Sequential, nn.ConvTranspose2d]


def test_explicit_sizes_override_the_preset():
    layout = FaderSettings(preset="paper", init_channels=8, num_layers=5).layout(64, 1)
    assert (layout.init_channels, layout.max_channels, layout.num_layers, layout.channels) == (8, 512, 5, 1)


@pytest.mark.parametrize("deconv", ["convtranspose", "upsampling", "pixelshuffle"])
@pytest.mark.parametrize("num_skips", [0, 1, 2])
@pytest.mark.parametrize("norm", ["global", "local", "instance"])
def test_every_option_keeps_shapes_and_trains(deconv, num_skips, norm):
    method = tiny_fader(deconv=deconv, num_skips=num_skips, norm=norm, encoder_dropout=0.1, decoder_dropout=0.1)
    batch = planted()
    latent = method.encode(batch.images, batch.attributes)
    assert latent.latent.shape == (12, 8, 4, 4)
    assert [tuple(skip.shape[1:]) for skip in latent.skips] == [(8, 8, 8), (4, 16, 16)][:num_skips]
    assert latent.shallowest is (latent.skips[-1] if num_skips else latent.latent)
    decoded = method.decode(latent, method.attributes.code(batch.attributes))
    assert decoded.shape == batch.images.shape and decoded.dtype == torch.float32
    method.networks["latent_discriminator"](latent).sum().backward(retain_graph=True)
    if num_skips:
        deeper = method.networks["encoder"].layers[-1].conv.weight.grad
        assert deeper is None, "with skips the discriminator reads the shallowest map only"
    decoded.sum().backward()
    assert all(p.grad is not None for n in ("encoder", "decoder") for p in method.networks[n].parameters())


def test_skips_are_read_after_the_code_by_the_layers_that_have_them():
    layout = Layout(16, 3, 4, 8, 3, num_skips=2)
    decoder = Decoder(layout, 2)
    seen = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    latent = Encoder(layout)(torch.randn(2, 3, 16, 16))
    decoder(latent, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert [x.shape[1] for x in seen] == [8 + 2, 8 + 2 + 8, 4 + 2 + 4]
    assert torch.equal(seen[1][:, 10:], latent.skips[0]) and torch.equal(seen[2][:, 6:], latent.skips[1])


def test_a_selective_skip_is_scaled_by_a_gate_that_knows_the_attributes():
    layout = Layout(32, 3, 4, 16, 4, num_skips=1)
    latent = Encoder(layout)(torch.randn(2, 3, 32, 32))
    decoder = Decoder(layout, 2, skip="selective")
    assert len(decoder.gates) == 1 and not Decoder(layout, 2).gates
    seen = []
    decoder.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 18:]))
    codes = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for code in (codes, codes.flip(0)):
        decoder(latent, code)
    gates = [(skip / latent.skips[0])[latent.skips[0].abs() > 1e-3] for skip in seen]
    assert all(0 < gate.min() and gate.max() < 1 for gate in gates)
    assert (gates[0] - gates[1]).abs().max() > 1e-3, "another code, another gate"
    with torch.no_grad():
        decoder.gates[0].weight.zero_(), decoder.gates[0].bias.fill_(-100)
    decoder(latent, codes)
    assert not seen[-1].any(), "a closed gate"


def test_decoder_dropout_stands_in_the_first_three_layers_and_never_in_the_last():
    def layers_with(num_layers: int) -> list[bool]:
        decoder = Decoder(Layout(64, 3, 4, 8, num_layers), 2, dropout=0.5)
        return [isinstance(layer.dropout, nn.Dropout) for layer in decoder.layers]

    assert layers_with(5) == [True, True, True, False, False]
    assert layers_with(2) == [True, False]


def test_deconvolutions_double_the_sides():
    """pixelshuffle and upsampling by hand: a 1×1 kernel's worth of weight at the centre only copies."""
    x = torch.arange(4.0).view(1, 1, 2, 2)
    upsampling = deconvolution("upsampling", 1, 1)
    nn.init.dirac_(upsampling[1].weight)
    assert torch.equal(upsampling(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    shuffle = deconvolution("pixelshuffle", 1, 1)
    with torch.no_grad():
        shuffle[0].weight.zero_()[:, 0, 1, 1] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert shuffle(x)[0, 0, :2, 2:].tolist() == [[1, 10], [100, 1000]]
    with pytest.raises(ValueError, match="none of convtranspose"):
        deconvolution("bilinear", 1, 1)


def test_the_latent_discriminator_goes_on_to_one_pixel():
    for image_size, num_layers, num_skips, convolutions in ((64, 4, 0, 2), (64, 5, 0, 1), (64, 6, 0, 0), (64, 4, 2, 4)):
        layout = Layout(64, 3, 4, 16, num_layers, num_skips)
        network = LatentDiscriminator(layout, 2, hidden_channels=8)
        assert len(network.layers) == convolutions
        assert network(Encoder(layout)(torch.randn(3, 3, 64, 64))).shape == (3, 2)


def test_an_instance_normed_fader_still_has_batch_norm_in_its_discriminators():
    method = tiny_fader(norm="instance", patch={"weight": 1.0}, classifier={"weight": 1.0})
    for name in ("latent_discriminator", "patch_discriminator", "classifier"):
        assert not [m for m in method.networks[name].modules() if isinstance(m, nn.InstanceNorm2d)]
    assert [m for m in method.networks["encoder"].modules() if isinstance(m, nn.InstanceNorm2d)]


def test_heads_have_the_attributes_width():
    for head, width in (("softmax", 2 + 3 + 2), ("sigmoid", 1 + 3 + 1)):
        networks = tiny_fader(head=head, classifier={"weight": 1.0}).networks
        assert networks["latent_discriminator"].head.out_features == width
        assert networks["classifier"].head.out_features == width


def test_a_patch_discriminator_gives_a_map_of_logits_and_one_probability_an_image():
    network = PatchDiscriminator(32, init_channels=2, max_channels=8)
    logits = network(torch.randn(5, 3, 32, 32))
    assert logits.shape == (5, 1, 2, 2)
    assert torch.equal(patch_probabilities(logits), logits.sigmoid().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="at least 32"):
        PatchDiscriminator(16)


def test_classifier_features_are_what_its_last_layer_reads():
    network = Classifier(16, 4, init_channels=4, max_channels=8, hidden_channels=6).eval()
    images = torch.randn(3, 3, 16, 16)
    assert network.features(images).shape == (3, 6)
    assert torch.equal(network.head(network.features(images)), network(images))


def test_maps_stay_channels_last_through_the_autoencoder():
    """One layer that falls back to the other format slows every one after it; the code planes once did."""
    method = tiny_fader(num_skips=1)
    formats = {}
    for name in ("encoder", "decoder"):
        for key, module in method.networks[name].named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_pre_hook(
                    lambda m, x, key=f"{name}.{key}": formats.__setitem__(
                        key, x[0].is_contiguous(memory_format=torch.channels_last)
                    )
                )
    batch = planted()
    method.decode(method.encode(batch.images, batch.attributes), MIXED.code(batch.attributes))
    assert len(formats) == 6 and all(formats.values()), formats


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: halvings(48), "power of two"),
        (lambda: Layout(64, num_layers=7), "at most 6"),
        (lambda: Layout(64, num_layers=3, num_skips=3), "0 to 2"),
        (lambda: doubling(64, 32, 3), "do not exist"),
        (lambda: Encoder(Layout(16, 3, 4, 8, 4), "instance"), "more than one pixel"),
        (lambda: FaderSettings(preset="big"), "none of paper, official, small"),
        (lambda: LatentSettings(weight=-1.0), "weight is -1.0; it must be at least 0"),
        (lambda: PatchSettings(smooth_label=0.6), "smooth_label is 0.6; it must be at most 0.5"),
        (lambda: JudgeSettings(norm="instance"), "none of global, local"),
            (lambda: JudgeSettings(preset="residual", hidden_channels=8), "has no hidden layer"),
        (lambda: JudgeSettings(preset="paper"), "none of official, small, residual, small_residual"),
        (lambda: Fader(FaderSettings(), Attributes([]), 64), "at least one attribute"),
        (lambda: Judge(JudgeSettings(), Attributes([]), 64), "at least one attribute"),
        (lambda: Fader(FaderSettings(preset="paper"), MALE, 64), "halves at most 6 times"),
    ],
)
def test_impossible_sizes_are_refused_in_words(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_decoder_refuses_what_is_not_its_own():
    decoder = Decoder(Layout(16, 3, 4, 8, 2, num_skips=1), 2)
    latent, skip = torch.zeros(2, 8, 4, 4), torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"takes \(2, 2\)"):
        decoder(Latent(latent, (skip,)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="takes 1"):
        decoder(Latent(latent), torch.zeros(2, 2))


@pytest.mark.parametrize("side", [2, 4])
def test_convolutions_of_few_pixels_give_what_the_whole_one_gives(side):
    """Forward and every gradient, in float64; to one pixel the kernel's rim has none."""
    torch.manual_seed(3)
    layer = Down(6, 8, None).double()
    x = torch.randn(5, 6, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, layer.conv.weight, layer.conv.bias)
    whole, got = F.conv2d(*inputs, 2, 1), layer._convolved(x)
    torch.testing.assert_close(got, whole)
    wanted, found = (torch.autograd.grad(out.sin().sum(), inputs) for out in (whole, got))
    torch.testing.assert_close(found, wanted)
    assert found[1].count_nonzero() == 6 * 8 * (4 if side == 2 else 16)


def test_a_transposed_convolution_of_few_pixels_gives_what_the_whole_one_gives():
    torch.manual_seed(3)
    up = Up(6, 8, "convtranspose", "instance").double()
    x = torch.randn(5, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    whole, got = up.deconv(x), doubled_to_four(x, up.deconv.weight)
    torch.testing.assert_close(got, whole)
    inputs = (x, up.deconv.weight)
    wanted, found = (torch.autograd.grad(out.sin().sum(), inputs) for out in (whole, got))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(up(x), F.relu(up.norm(whole)))


@pytest.mark.parametrize(("image_size", "blocks", "parameters"), [(64, 4, 1_236_456 - 32 * 257), (128, 5, None), (16, 2, None), (8, 1, None)])
def test_the_residual_judge_halves_to_four_pixels(image_size, blocks, parameters):
    network = ResidualClassifier(image_size, 8).eval()
    assert len(network.blocks) == blocks and network(torch.zeros(2, 3, image_size, image_size)).shape == (2, 8)
    if parameters:  # worked by hand for 40 logits, of which 8 are left
        assert num_parameters(network) == parameters
