"""Sampling weights out of labels: each attribute's target shares, several attributes at once.

Raking (iterative proportional fitting; Deming and Stephan 1940, "On a least squares adjustment of a sampled frequency
table when the expected marginal totals are known"): the weights that meet every target and are, in relative entropy,
nearest to even ones. Records with the same labels weigh the same.
"""

import logging
import math
from collections.abc import Mapping

import numpy as np

from fader.attributes import Attribute, Attributes
from pipeline.data.shards import Split

logger = logging.getLogger(__name__)

Shares = Mapping[str, float | Mapping[str, float]]
"""Of each attribute: the share of the present value, or of the values named, by category or by number."""

_ROUNDS = 2_000
_TOLERANCE = 1e-6  # of a share
_RARE = 20.0  # weight above which a record is repeated so often that the log says so


def balanced_weights(split: Split, shares: Shares) -> tuple[np.ndarray, np.ndarray]:
    """How often each record of a split is to be drawn: weights [n] float64 with mean 1, the same to the bit on every
    machine, and groups [n] int64, equal for records whose labels of these attributes are equal.

    A target is a share of the records whose label is known. Values of a k-way attribute that are not named keep their
    ratio. What is unknown keeps its weight under that attribute's target. Raises ValueError where none can.
    """
    chosen = split.attributes.select(tuple(shares))
    targets = [_targets(attribute, shares[attribute.name]) for attribute in chosen]
    patterns, groups, counts = np.unique(
        split.columns(chosen).astype(np.int64), axis=0, return_inverse=True, return_counts=True
    )
    groups = groups.reshape(-1)
    mass = counts.astype(np.float64)
    before = _shares_now(chosen, patterns, mass)
    for attribute, target, share in zip(chosen, targets, before):
        for value in np.flatnonzero((target > 0) & (share == 0)):
            raise ValueError(
                f"data.balance: no record of {split.name} is known to have {_named(attribute, value)}, "
                f"so its share cannot be {target[value]:g}; take it out"
            )
    mass = _raked(chosen, patterns, mass, targets, split.name)
    weights = (mass / counts * (len(split) / math.fsum(mass)))[groups]
    _tell(split.name, chosen, targets, before, weights)
    return weights, groups


def _targets(attribute: Attribute, wanted: float | Mapping[str, float]) -> np.ndarray:
    """The [k] shares that are asked for; 0 where none is."""
    if attribute.kind == "continuous":
        raise ValueError(f"data.balance: {attribute.name} is continuous; only binary and k-way attributes have shares")
    for part in wanted.values() if isinstance(wanted, Mapping) else [wanted]:
        if not 0 < part < 1:
            raise ValueError(f"data.balance: {attribute.name} asks for {part:g}; a share lies between 0 and 1")
    if not isinstance(wanted, Mapping):
        if attribute.kind != "binary":
            raise ValueError(
                f"data.balance: {attribute.name} has {attribute.k} values; say whose share {wanted:g} is, as "
                f"{attribute.name}: {{{attribute.categories[0]}: {wanted:g}}}"
            )
        return np.array([1 - wanted, wanted])
    target = np.zeros(attribute.k)
    for name, part in wanted.items():
        names = [attribute.value_name(value) for value in attribute.values]
        if name not in names and not (name.isdigit() and int(name) < attribute.k):
            raise ValueError(f"data.balance: {attribute.name} has no value {name!r}; it has {', '.join(names)}")
        value = names.index(name) if name in names else int(name)
        if target[value]:
            raise ValueError(f"data.balance: {_named(attribute, value)} is given two shares")
        target[value] = part
    total = math.fsum(target)
    if target.all() and abs(total - 1) > _TOLERANCE:
        raise ValueError(f"data.balance: the shares of every value of {attribute.name} sum to {total:g}, not to 1")
    if not target.all() and total > 1 - _TOLERANCE:
        raise ValueError(f"data.balance: {attribute.name}'s shares sum to 1 and leave nothing to its other values")
    return target


def _named(attribute: Attribute, value: int) -> str:
    return f"{attribute.name} = {attribute.value_name(int(value))}"


def _shares_now(chosen: Attributes, patterns: np.ndarray, mass: np.ndarray) -> list[np.ndarray]:
    """The [k] shares of each attribute's values among the known; alike on all machines, because bincount adds in order."""
    shares = []
    for j, attribute in enumerate(chosen):
        known = patterns[:, j] >= 0
        share = np.bincount(patterns[known, j], mass[known], minlength=attribute.k)
        shares.append(share / max(math.fsum(share), 1e-300))
    return shares


def _raked(chosen: Attributes, patterns: np.ndarray, mass: np.ndarray, targets: list[np.ndarray], split: str) -> np.ndarray:
    """The mass [patterns] that meets every target, which are met by turns."""
    for _ in range(_ROUNDS):
        for j, target in enumerate(targets):
            now = _shares_now(chosen, patterns, mass)[j]
            rest = target == 0
            factor = np.divide(target, now, out=np.ones_like(target), where=now > 0)
            if now[rest].any():
                factor[rest] = (1 - math.fsum(target)) / math.fsum(now[rest])
            known = patterns[:, j] >= 0
            mass = np.where(known, mass * factor[patterns[:, j]], mass)
        shares = _shares_now(chosen, patterns, mass)
        off = [float(np.abs(share - target)[target > 0].max()) for share, target in zip(shares, targets)]
        if max(off) < _TOLERANCE:
            return mass
    j = int(np.argmax(off))
    value = int(np.argmax(np.abs(shares[j] - targets[j]) * (targets[j] > 0)))
    raise ValueError(
        f"data.balance: no weights of {split} meet all targets at once: {_named(chosen[j], value)} is to be "
        f"{targets[j][value]:.1%} and comes to {shares[j][value]:.1%} beside the others; "
        "the labels hang together too closely: take one out or move its share"
    )


def _tell(split: str, chosen: Attributes, targets: list[np.ndarray], before: list[np.ndarray], weights: np.ndarray) -> None:
    parts = [
        f"{_named(attribute, value)} {share[value]:.1%} -> {target[value]:.1%}"
        for attribute, target, share in zip(chosen, targets, before)
        for value in ((1,) if attribute.kind == "binary" else np.flatnonzero(target))
    ]
    logger.info(
        "%s: balanced: %s; a record stands %.2f to %.2f times in an epoch, as telling as %s records drawn evenly",
        split, ", ".join(parts), weights.min(), weights.max(), f"{len(weights) / float(np.mean(weights**2)):,.0f}",
    )
    if weights.max() > _RARE:
        logger.warning(
            "%s: balanced: the rarest records are read %.0f times an epoch; they will be learnt by heart: "
            "ask for a smaller share, or augment", split, weights.max(),
        )
