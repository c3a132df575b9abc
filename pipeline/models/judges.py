"""Which judges may speak about a model's pictures, and how they read them.

A panel is judges of different builds, each of which looks at a picture as it is and slightly blurred: what a decoder has
drawn for the eye of one of them is seldom read by all.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fader.attributes import Attributes
from fader.filters import blurred, reduced
from fader.method import Method
from pipeline.data.shards.reading import kind_of
from pipeline.images import Preprocessing
from pipeline.models import capabilities
from pipeline.models.model import Model

PANEL_SIZE = 128  # pixels a side, at most: pictures of a larger model are reduced to it
LEAST_SIZE = 64  # pixels a side: a judge of fewer does not see of a larger picture what a person sees
BLUR = 1.0  # sigma of the second reading, in pixels of a picture of 64


class Reader:
    """One way in which a judge reads pictures, as they are or slightly blurred, for a model whose attributes it knows.

    judged: all the attributes it knows, perhaps more than the model's. answers: names of those that it was asked for in training.
    """

    def __init__(self, judge: Model, attributes: Attributes, name: str, sigma: float = 0.0) -> None:
        self.name, self.judged = name, judge.attributes
        self.answers = judge.method.asked or judge.attributes.names
        self._judging, self._sigma, self._size = judge.judging, sigma, judge.preprocessing.image_size
        self._columns = [judge.attributes.index(name) for name in attributes.names]

    def probabilities(self, images: Tensor) -> list[Tensor]:
        images = reduced(images, self._size)
        return self._judging.probabilities(blurred(images, self._sigma) if self._sigma else images)

    def own(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Of such blocks, return those of the model's attributes, in the model's order."""
        return [blocks[column] for column in self._columns]


def readers_of(judges: Sequence[Model], attributes: Attributes) -> tuple[Reader, ...]:
    """Return a panel's readers: each judge looks at a picture as it is, and slightly blurred."""
    names = [judge.source.rstrip("/").rsplit("/", 1)[-1] for judge in judges]
    if len(set(names)) < len(names):
        names = [judge.source for judge in judges]
    looks = (("", 0.0), (", blurred", BLUR))
    return tuple(Reader(judge, attributes, name + how, sigma) for judge, name in zip(judges, names) for how, sigma in looks)


def check_independent(judge: Model, seed: int | None, source: str, method: Method | None = None) -> None:
    """Refuse (ValueError) a judge whose networks started where those of a run did, or that gave the run its weights.

    Weights are told by being equal to the last bit: a judge's weights that the run trained on are not found out.
    seed: the run's, where it is known. source: what errors call the run. method: the run's, where it is made."""
    theirs, ours = (_weights(one) if one else [] for one in (judge.method, method))
    if any(a.shape == b.shape and torch.equal(a, b) for a in theirs for b in ours):
        raise ValueError(f"{source} has weights of the judge {judge.source}, which then judges itself; name another judge")
    if seed is not None and (judge.card.get("config") or {}).get("seed") == seed:
        raise ValueError(
            f"the judge {judge.source} was trained with seed {seed}, as {source} is: their networks start alike, and what is "
            "drawn for one is read by the other; train the judge anew with another seed (seed=7001)"
        )


def _weights(method: Method) -> list[Tensor]:
    """Return a method's matrices and kernels; what is not larger than a bias may be alike by chance."""
    return [p for network in method.networks.values() for p in network.parameters() if p.ndim > 1 and p.numel() >= 64]


def check_judge(judge: Model, attributes: Attributes, preprocessing: Preprocessing, source: str, partly: bool = False) -> None:
    """Refuse (ValueError) a judge that cannot speak about the pictures of a model, which errors call `source`. Pictures that
    are larger than a judge's are reduced to it.

    partly: it only reads the labels of photos that are edited, so it may lack attributes, whose values are then
    estimated, and see pictures of any smaller size.
    """
    if capabilities.judge(judge.method) is None:
        raise ValueError(f"{judge.source}: {judge.method.name} is not a judge; name a run or model of method 'judge'")
    known = {attribute.name: attribute for attribute in judge.attributes}
    for attribute in attributes:
        if attribute.name not in known and not partly:
            raise ValueError(
                f"the judge {judge.source} does not know {attribute.name}, which {source} changes "
                f"(it knows {', '.join(known)}); train a judge on the same attributes"
            )
        if known.get(attribute.name, attribute) != attribute:
            raise ValueError(
                f"the judge {judge.source} knows {attribute.name} as {kind_of(known[attribute.name])}, "
                f"{source} as {kind_of(attribute)}; train a judge on the same attributes"
            )
    largest = preprocessing.image_size if partly else min(preprocessing.image_size, PANEL_SIZE)
    least = 1 if partly else min(LEAST_SIZE, largest)
    seen = dataclasses.replace(preprocessing, image_size=min(largest, max(least, judge.preprocessing.image_size)))
    if judge.preprocessing != seen:
        raise ValueError(
            f"the judge {judge.source} sees images as {_describe(judge.preprocessing)}, {source} makes them as "
            f"{_describe(preprocessing)}; train a judge with the same preprocessing, of {least} to {largest} pixels"
        )


def _describe(preprocessing: Preprocessing) -> str:
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(preprocessing).items())
