"""What every method promises: only the named networks move, it learns, in any precision, unknown labels left out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fader.methods  # noqa: F401  fills METHODS
from fader.attributes import Attribute, Attributes
from fader.losses.attributes import attribute_losses
from fader.method import METHODS, Batch, Edits
from tests.fader.tiny import MIXED, changed, context, loss_of, phases, planted, stand, tiny, tiny_fader, weights

FULL = {"patch": {"weight": 0.1}, "classifier": {"weight": 0.1}}
CASES = [(name, {}) for name in sorted(METHODS)] + [("fader", FULL), ("fader", {"head": "sigmoid", "num_skips": 1})]
CASES.append(("fader", {"solved": {"weight": 0.1, "steps": 1}}))
IMAGE = {"weight": 1.0, "changed": 2.0, "others": "uniform"}  # another's labels would depend on the share of the batch
CASES.append(("fader", {"latent": {"steps": 0}, "image": IMAGE}))
CASES.append(("fader", {"image": IMAGE | {"game": "relativistic"}, "num_skips": 1, "skip": "selective", "head": "sigmoid"}))
CASES += [("icgan", {"variant": variant}) for variant in ("ind_cond", "sng")]
CASES += [("cgan", {"latent_step": 0.9}), ("vacgan", {"game": "multi_hinge"})]
CASES.append(("vacgan", {"game": "relativistic", "spectral_norm": False, "others": "train", "deconv": "convtranspose"}))


def cases(wanted=lambda name, changes, phase: True) -> list:
    """(method, settings, phase), one test each, of the phases that train something."""
    return [
        pytest.param(name, changes, phase, id=f"{name}-{'-'.join(changes) or 'default'}-{phase}")
        for name, changes in CASES
        for phase, about in phases(tiny(name, **changes)).items()
        if about.trains and wanted(name, changes, phase)
    ]


@pytest.mark.parametrize("name, changes, phase", cases())
def test_each_phase_moves_only_its_networks(name, changes, phase):
    method, batch = tiny(name, **changes), planted()
    before = weights(method)
    loss = loss_of(method, phase, batch, 100)
    loss.value.backward()
    trains = phases(method)[phase].trains
    for network, module in method.networks.items():
        held = [p.grad is not None for p in module.parameters()]
        assert all(held) if network in trains else not any(held), network
    parameters = [p for n in trains for p in method.networks[n].parameters()]
    torch.optim.SGD(parameters, 0.1).step()
    if phases(method)[phase].others == "train":  # what is not trained may move its statistics
        trained = {f"{n}/{key}" for n, network in method.networks.items() for key, _ in network.named_parameters()}
        before = {key: value for key, value in before.items() if key in trained}
    assert changed(before, method) == {*trains, *phases(method)[phase].observers}


@pytest.mark.parametrize("name, changes, phase", cases())
def test_every_trained_parameter_gets_a_gradient_that_is_not_zero(name, changes, phase):
    method = tiny(name, **changes)
    loss_of(method, phase, planted(), 100).value.backward()
    for network in phases(method)[phase].trains:
        for key, parameter in method.networks[network].named_parameters():
            shifts_both = (name, network, key) == ("vacgan", "discriminator", "head.bias")  # a hinge's two sides cancel
            assert parameter.grad.abs().max() > 0 or shifts_both, f"{network}/{key}"


@pytest.mark.parametrize("name, changes, phase", cases())
def test_reports_are_detached_scalars(name, changes, phase):
    report = loss_of(tiny(name, **changes), phase, planted(), 100).report
    assert report
    for key, value in report.items():
        assert "/" in key and math.isfinite(float(value))
        assert not isinstance(value, torch.Tensor) or (value.ndim == 0 and not value.requires_grad), key


LEARNT = {
    "aligner": "regressor/error", "cgan": None, "cvae": "autoencoder/mse", "fader": "autoencoder/mse", "icgan": "encoder_y/error",
    "judge": "classifier/loss", "vacgan": "classifier/loss", "vaegan": "autoencoder/mse",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("name", sorted(name for name in METHODS if LEARNT[name]))
def test_forty_steps_on_one_batch_lower_the_loss(name, kind):
    """What a method reads or reconstructs comes to half its error at least."""
    method, batch = tiny(name), planted()
    groups = method.optimizers()
    optimizers = {
        trains: torch.optim.SGD(p, 0.2, momentum=0.9) if kind == "sgd" else torch.optim.Adam(p, 5e-3, group.betas)
        for trains, group in groups.items()
        for p in [[q for n in trains for q in method.networks[n].parameters()]]
    }
    watched, history = LEARNT[name], []
    for step in range(40):
        images = 12 * step
        for phase in (phase for phase in phases(method).values() if phase.trains):
            stand(method, phase)
            loss = phase.loss(method.networks, batch, context(method, images))
            optimizers[phase.trains].zero_grad()
            loss.value.backward()
            optimizers[phase.trains].step()
            if watched in loss.report:
                history.append(float(loss.report[watched]))
    assert history[-1] < 0.5 * history[0], history


@pytest.mark.parametrize("name, changes, phase", cases())
def test_float64_stays_float64(name, changes, phase):
    method, batch = tiny(name, **changes), planted()
    for network in method.networks.values():
        network.double()
    batch = dataclasses.replace(batch, images=batch.images.double())
    loss = loss_of(method, phase, batch, 100)
    assert loss.value.dtype == torch.float64
    if isinstance(method, Edits):
        with torch.no_grad():
            latent = method.encode(batch.images, batch.attributes)
            decoded = method.decode(latent, MIXED.code(batch.attributes))
        assert decoded.dtype == torch.float64


@pytest.mark.parametrize("name, changes, phase", cases())
def test_bf16_autocast_gives_a_float32_loss_near_the_float32_one(name, changes, phase):
    method, batch = tiny(name, **changes), planted()
    want = loss_of(method, phase, batch, 100).value
    method = tiny(name, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_of(method, phase, batch, 100).value
    assert got.dtype == torch.float32
    alike = name == "icgan" and phase in ("encoder_z", "encoder")  # images of an untrained generator, made different by norms
    assert got.item() == pytest.approx(want.item(), rel=0.15 if alike else 0.03)
    got.backward()
    for network in phases(method)[phase].trains:
        for parameter in method.networks[network].parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32


def has_no_gradient_in_it(name: str, changes: dict, phase: str) -> bool:
    """Latent optimisation has one, and the third derivative of torch's batch norm is not exact. See test_gan.py."""
    return "latent_step" not in changes


@pytest.mark.parametrize("name, changes, phase", cases(has_no_gradient_in_it))
def test_every_phase_is_twice_differentiable(name, changes, phase):
    """A penalty on the gradient has a gradient itself, and finite differences agree with it."""
    if name == "vaegan" and phase == "encoder+decoder":  # a term stops its gradient to the encoder; a difference does not
        changes = {**changes, "discriminator_weight": 0.0}
    method, batch = tiny(name, **changes), planted(count=6)
    for network in method.networks.values():
        network.double()
    batch = dataclasses.replace(batch, images=batch.images.double())
    stand(method, phases(method)[phase])
    parameters = [p for n in phases(method)[phase].trains for p in method.networks[n].parameters()]
    buffers = [(buffer, buffer.clone()) for network in method.networks.values() for buffer in network.buffers()]

    def penalty() -> torch.Tensor:
        for buffer, start in buffers:
            buffer.copy_(start)  # a loss is a function of weights and state, and this is about the weights
        value = phases(method)[phase].loss(method.networks, batch, context(method, 100)).value
        return sum(g.square().sum() for g in torch.autograd.grad(value, parameters, create_graph=True))

    gradients = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions) if g is not None).item()
    step, values = 1e-8, []  # small, because a step across the kink of a ReLU would show as a slope
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=sign * step)
        values.append(penalty().item())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.sub_(direction, alpha=sign * step)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name, changes, phase", cases())
def test_a_loss_repeats_itself_on_the_same_batch_and_draws(name, changes, phase):
    one, other = (loss_of(tiny(name, **changes), phase, planted(), 100) for _ in range(2))
    assert torch.equal(one.value, other.value)


def reads_labels_only(name: str, changes: dict, phase: str) -> bool:
    """In verdicts on images, in reconstructions that a setting cannot leave out, and in the aligner every record counts."""
    if name in ("aligner", "cgan", "cvae", "icgan", "vacgan", "vaegan"):
        return phase in ("classifier", "encoder_y")
    blind = ("patch_discriminator", "image_discriminator", "image_discriminator_r1")
    return phase not in blind and not (phase == "encoder+decoder" and {"patch", "image"} & set(changes))


@pytest.mark.parametrize("name, changes, phase", cases(reads_labels_only))
def test_unknown_labels_count_for_nothing(name, changes, phase):
    """With eval-mode networks, records of unknown labels leave every attribute loss as it is without them."""
    changes = {**changes, **({"reconstruction": {"weight": 0.0}, "latent": {"weight": 1.0}} if name == "fader" else {})}
    method, batch = tiny(name, **changes), planted()
    labels = batch.attributes.clone()
    labels[6:] = -1
    masked = Batch.alone(batch.images, labels)
    known = Batch.alone(batch.images[:6], labels[:6])
    results = []
    for part in (masked, known):
        for network in method.networks.values():
            network.eval()
        results.append(phases(method)[phase].loss(method.networks, part, context(method, 100)).value)
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-5)
    nobody = Batch.alone(batch.images, torch.full_like(labels, -1))
    assert loss_of(method, phase, nobody, 100).value.isfinite()


@pytest.mark.parametrize("name, changes, phase", cases())
def test_a_batch_in_uneven_shares_averages_to_the_whole(name, changes, phase):
    """Each rank's value is its part of the mean; batch statistics apart, so all networks stand in eval mode."""
    batch = planted()
    labels = batch.attributes.clone()
    labels[:4, 0] = -1
    whole = Batch.alone(batch.images, labels)

    def value(part: Batch):
        method = tiny(name, **changes)
        for network in method.networks.values():
            network.eval()
        loss = phases(method)[phase].loss(method.networks, part, context(method, 100))
        return {key: float(part) for key, part in {"value": loss.value.detach(), **loss.report}.items()}

    want = value(whole)
    parts = [
        value(
            dataclasses.replace(
                whole,
                images=whole.images[s],
                attributes=whole.attributes[s],
                index=whole.index[s],
                draws=dataclasses.replace(whole.draws, index=whole.index[s]),
                size=whole.size / 2,
                known=whole.known / 2,
            )
        )
        for s in (slice(0, 5), slice(5, 12))
    ]
    for key, total in want.items():
        assert (parts[0][key] + parts[1][key]) / 2 == pytest.approx(total, rel=1e-4, abs=1e-7), key


# --- Fader ----------------------------------------------------------------------------------------------------------


def test_the_phases_are_the_official_ones_in_their_order():
    (stage,) = tiny_fader(**FULL, latent={"steps": 2}).stages()
    names = ["latent_discriminator", "patch_discriminator", "classifier", "encoder+decoder"]
    assert [phase.name for phase in stage.phases] == names
    assert [phase.repeat for phase in stage.phases] == [2, 1, 1, 1]
    assert [phase.stream for phase in stage.phases] == names, "each phase draws its own batches"
    assert all(phase.others == "eval" and phase.source == "images" for phase in stage.phases)
    assert stage.images == 1000


def test_batches_may_be_shared_and_modes_chosen():
    (stage,) = tiny_fader(shared_batch=True, discriminator_others="train", autoencoder_others="train").stages()
    assert {phase.stream for phase in stage.phases} == {"fader"}
    assert {phase.others for phase in stage.phases} == {"train"}


def test_a_discriminator_phase_in_train_mode_refreshes_the_encoders_statistics():
    for mode, moved in (("eval", {"latent_discriminator"}), ("train", {"latent_discriminator", "encoder"})):
        method = tiny_fader(discriminator_others=mode)
        before = weights(method)
        loss_of(method, "latent_discriminator", planted())
        assert changed(before, method) == moved


def test_optional_networks_exist_only_with_their_weight():
    assert list(tiny_fader().networks) == ["encoder", "decoder", "latent_discriminator"]
    method = tiny_fader(patch=FULL["patch"], classifier={"weight": 0.1, "learning_rate": 1e-3})
    assert set(method.optimizers()) == {
        ("latent_discriminator",),
        ("patch_discriminator",),
        ("classifier",),
        ("encoder", "decoder"),
    }
    assert method.optimizers()[("classifier",)].learning_rate == 1e-3
    assert method.optimizers()[("patch_discriminator",)].learning_rate == 2e-4


def test_only_the_autoencoder_keeps_a_moving_average():
    groups = tiny_fader(ema_half_life=500).optimizers()
    assert {trains: group.ema_half_life for trains, group in groups.items()} == {
        ("latent_discriminator",): 0,
        ("encoder", "decoder"): 500,
    }


def test_the_autoencoders_loss_is_its_formula():
    """mse + λ fool, and with the options on, λ_patch and λ_classifier of their own terms, all on the one ramp."""
    method = tiny_fader(**FULL, reconstruction={"weight": 2.0}, latent={"weight": 0.3, "ramp_images": 1000})
    for images, share in ((0, 0.0), (250, 0.25), (1000, 1.0), (9000, 1.0)):
        loss = loss_of(method, "encoder+decoder", planted(), images)
        part = {key.split("/")[1]: float(value) for key, value in loss.report.items()}
        assert part["lambda"] == pytest.approx(0.3 * share)
        extra = 0.1 * part["patch"] + 0.1 * part["classifier"] + 0.3 * part["fool"]
        assert loss.value.item() == pytest.approx(2 * part["mse"] + share * extra, rel=1e-5)


def test_lambda_rises_in_the_shape_that_is_asked_for_after_a_warmup():
    for shape, share in (("linear", 0.25), ("cosine", (1 - math.cos(math.pi / 4)) / 2), ("step", 0.0), ("constant", 1.0)):
        method = tiny_fader(**FULL, latent={"weight": 0.3, "rise": shape, "ramp_images": 400, "warmup_images": 100})
        for images, part in ((99, 0.0), (200, share), (500, 1.0)):
            loss = loss_of(method, "encoder+decoder", planted(), images)
            r = {key.split("/")[1]: float(value) for key, value in loss.report.items()}
            assert r["lambda"] == pytest.approx(0.3 * part)
            assert loss.value.item() == pytest.approx(
                r["mse"] + part * (0.3 * r["fool"] + 0.1 * r["patch"] + 0.1 * r["classifier"]), rel=1e-5
            )


def test_the_autoencoders_rate_falls_to_nothing_at_the_end_and_the_discriminators_stays():
    method = tiny_fader(images=1000, decay_share=0.4, learning_rate=2e-3, latent={"learning_rate": 5e-3})
    rates = {trains[0]: [o.rate(images) for images in (0, 600, 800, 1000)] for trains, o in method.optimizers().items()}
    assert rates["encoder"] == pytest.approx([2e-3, 2e-3, 1e-3, 0.0])
    assert rates["latent_discriminator"] == [5e-3] * 4
    with pytest.raises(ValueError, match="decay_share is 1.5; it must be at most 1"):
        tiny_fader(decay_share=1.5)


def test_a_shape_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="rise 'wild' is none of linear"):
        tiny_fader(latent={"rise": "wild"})


def test_reports_carry_the_names_the_tracker_shows():
    method = tiny_fader()
    names = [f"latent_discriminator/{key}" for key in ("loss", *(f"accuracy.{name}" for name in MIXED.names))]
    assert list(loss_of(method, "latent_discriminator", planted()).report) == names
    report = loss_of(method, "encoder+decoder", planted()).report
    assert list(report) == ["autoencoder/mse", "autoencoder/fool", "autoencoder/lambda"]


def test_lambda_zero_still_trains_the_discriminator_and_leaves_the_encoder_to_reconstruction():
    method = tiny_fader(latent={"weight": 0.0})
    assert "latent_discriminator" in {n for phase in phases(method).values() for n in phase.trains}
    loss = loss_of(method, "encoder+decoder", planted())
    assert torch.equal(loss.value, loss.report["autoencoder/mse"])
    assert math.isfinite(float(loss.report["autoencoder/fool"]))


def test_a_latent_discriminator_learns_planted_attributes_from_frozen_latents():
    """The labels are visible in the images, so an untrained encoder's latents tell them."""
    method, batch = tiny_fader(), planted()
    phase = phases(method)["latent_discriminator"]
    stand(method, phase)
    optimizer = torch.optim.Adam(method.networks["latent_discriminator"].parameters(), 5e-3)
    for _ in range(150):
        loss = phase.loss(method.networks, batch, context(method))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert all(float(loss.report[f"latent_discriminator/accuracy.{name}"]) == 1.0 for name in MIXED.names), loss.report


def test_the_adversary_drives_planted_attributes_out_of_the_latent():
    """Two runs that differ in λ only: with it, a fresh discriminator learns less from the latents than without."""
    attributes = Attributes([Attribute("Smiling")])

    def leak(weight: float) -> float:
        method = tiny_fader(attributes, 16, latent={"weight": weight}, num_layers=2)
        batch = planted(attributes, 16, 16)
        optimizers = {
            trains: torch.optim.Adam([p for n in trains for p in method.networks[n].parameters()], 3e-3, (0.5, 0.999))
            for trains in method.optimizers()
        }
        losses = []
        for step in range(100):
            for phase in phases(method).values():
                stand(method, phase)
                loss = phase.loss(method.networks, batch, context(method))
                optimizers[phase.trains].zero_grad()
                loss.value.backward()
                optimizers[phase.trains].step()
                if step >= 70 and phase.name == "latent_discriminator":
                    losses.append(loss.value.item())
        return sum(losses) / len(losses)

    free, driven = leak(0.0), leak(1.0)
    assert free < 0.05 and driven > 0.3, (free, driven)


def test_images_of_one_channel():
    method = METHODS["fader"](tiny_fader(patch={"weight": 0.1}).settings, MIXED, 32, channels=1)
    images = torch.zeros(2, 1, 32, 32)
    assert method.decode(method.encode(images, torch.zeros(2, 3)), torch.zeros(2, 7)).shape == images.shape


# --- judge ----------------------------------------------------------------------------------------------------------


def test_the_judges_optimizer_is_what_its_settings_say():
    kind = METHODS["judge"]
    settings = kind.Settings(learning_rate=3e-4, betas=(0.4, 0.9), weight_decay=0.01, clip_norm=2.0, ema_half_life=7)
    (group,) = kind(settings, MIXED, 32).optimizers().values()
    given = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    want = {"learning_rate": 3e-4, "betas": (0.4, 0.9), "weight_decay": 0.01, "clip_norm": 2.0, "ema_half_life": 7}
    assert {key: given[key] for key in want} == want


def test_the_judges_preset_and_overrides():
    method = tiny("judge")
    assert [layer.conv.out_channels for layer in method.networks["classifier"].layers] == [4, 8, 8, 8, 8]
    kind = METHODS["judge"]
    assert kind.Settings().sizes() == {"init_channels": 32, "max_channels": 512, "hidden_channels": 512}
    small = kind.Settings(preset="small", max_channels=64).sizes()
    assert small == {"init_channels": 16, "max_channels": 64, "hidden_channels": 128}


def test_what_the_judge_is_asked_counts_as_much_as_all_that_only_helps_it_to_learn():
    losses = attribute_losses(MIXED, *_judged(tiny("judge")))
    plain = loss_of(tiny("judge"), "classifier", planted()).value
    asked = loss_of(tiny("judge", asked=(MIXED.names[0],)), "classifier", planted()).value
    torch.testing.assert_close(plain, losses.sum())
    torch.testing.assert_close(asked, losses[0] + losses[1:].mean())
    with pytest.raises(ValueError, match="asked: Nobody is not among the attributes of the data"):
        tiny("judge", asked=("Nobody",))


def _judged(method) -> tuple:
    """The logits, labels and divisors of the planted batch."""
    batch = planted()
    return method.networks["classifier"](batch.images), batch.attributes, batch.known


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_judge_gives_float32_logits_of_its_attributes_width(head):
    method = tiny("judge", head=head)
    with torch.autocast("cpu", torch.bfloat16):
        logits = method.judge(planted().images)
    assert logits.shape == (12, MIXED.logits_width(head)) and logits.dtype == torch.float32


def test_a_judges_uniform_prior_takes_the_label_frequencies_out_of_its_logits():
    """A classifier that knows nothing but the prior judges at even odds; unknown labels are not counted."""
    method = tiny("judge")
    counts = method.networks["label_counts"]
    labels = torch.zeros(99, len(MIXED))
    labels[:9, 0] = 1
    labels[:50, 1] = -1
    counts.add(MIXED, labels, lambda total: total)
    assert counts.counts[:2].tolist() == [91, 10]
    logits = counts.prior(MIXED, "softmax")[None].repeat(2, 1)
    method.networks["classifier"] = lambda images: logits
    for p in MIXED.probabilities(method.judge(torch.zeros(2, 3, 32, 32)), "softmax"):
        torch.testing.assert_close(p, torch.full_like(p, 1 / p.shape[1]))
    counts.add(MIXED, torch.full((5, len(MIXED)), torch.nan), lambda total: total + torch.nan)
    assert counts.counts[:2].tolist() == [91, 10], "a batch that is not finite is left out"
