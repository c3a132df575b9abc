"""Faults that a run on two ranks could have, planted: each must move the weights far beyond the tolerance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fader.method import Batch, SumsOverRanks, identity
from pipeline.engine import Engine


def local_batch_norm(engine: Engine) -> None:
    """Every rank normalises with its own share."""
    for module in engine.networks.modules():
        if isinstance(module, SumsOverRanks):
            module.reduce_sum = identity


def gradients_not_reduced(engine: Engine) -> None:
    """A trained network is called around its wrapper."""
    for group in engine.groups.values():
        group.wrapped = getattr(group.wrapped, "module", group.wrapped)


def discriminator_not_frozen(engine: Engine) -> None:
    """The autoencoder's loss trains the discriminator too: its gradients stay for the discriminator's next update."""
    engine._require_gradients = lambda trains: engine.networks.requires_grad_(True)
    discriminator = engine.groups[("latent_discriminator",)].optimizer
    discriminator.zero_grad = lambda set_to_none=True: None


def another_clip_norm(engine: Engine) -> None:
    """A fifth of the clip norm that was asked for, as 1.0 for 5 when a back end falls to its own default."""
    for group in engine.groups.values():
        group.settings = dataclasses.replace(group.settings, clip_norm=group.settings.clip_norm / 5)


def anothers_records(engine: Engine) -> Callable[[str, int], Batch]:
    """Every rank reads the first rank's share."""
    from tests.ranks import Case, one_share

    wide = next(engine.networks.parameters()).element_size() == 8
    return lambda stream, draw: one_share(Case("fader", wide=wide), stream, draw, 0, engine.world_size)


def deepspeeds_clip_norm(engine: Engine) -> None:
    """DeepSpeed clips at a fifth of what was asked for."""
    for group in engine.groups.values():
        group.wrapped.optimizer.clip_grad /= 5


def deepspeed_does_not_reduce(engine: Engine) -> None:
    """Each rank moves its part of the weights by its own gradients."""
    for group in engine.groups.values():
        group.wrapped.optimizer.average_tensor = lambda tensor, kind: None


FAULTS = {
    fault.__name__: fault
    for fault in (
        local_batch_norm,
        gradients_not_reduced,
        discriminator_not_frozen,
        another_clip_norm,
        anothers_records,
    )
}
DEEPSPEED_FAULTS = {
    fault.__name__: fault
    for fault in (local_batch_norm, deepspeeds_clip_norm, deepspeed_does_not_reduce, anothers_records)
}
