"""What an evaluation measured, as data; the one place where its numbers get their names."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fader.attributes import Attribute, Attributes

IMAGES = ("real", "reconstruction", "sample", "swap")
SLIDER_POSITIONS = tuple(-2 + i / 2 for i in range(9))


def slider_values(attributes: Attributes) -> Iterator[tuple[int, Attribute, int, int | None]]:
    """Every slider in the order of the tables: column, attribute, the value it raises, which is `category`, too, when k-way."""
    for j, attribute in enumerate(attributes):
        for value in attribute.values if attribute.kind == "k-way" else (1,):
            yield j, attribute, value, value if attribute.kind == "k-way" else None


@dataclass(frozen=True)
class Score:
    """An accuracy by a reader with its 95% bootstrap interval.

    images: of IMAGES. attribute: its name, or "*" for the mean over attributes. start, to: value names. A swap has both
    for one ordered pair, only `to` for the mean over all pairs that end there, and neither when balanced; for other
    images `to` is the label they carry. records: how many it rests on; 0 leaves the value not a number.
    """

    images: str
    attribute: str
    start: str | None
    to: str | None
    records: int
    value: float
    low: float
    high: float
    reader: str = ""


@dataclass(frozen=True)
class Flattery:
    """An attribute whose swaps please the reader `pleased` and not the reader `other`. excess: by how much they differ on
    swaps beyond their difference on real pictures and the margin, with its 95% bootstrap interval."""

    attribute: str
    pleased: str
    other: str
    excess: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """A mean over records with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Truth:
    """How near the swaps of one attribute, from one value to another, come to the twins: drawn faces with it changed.
    inside: in the region that should change, squared error against the twin over that of doing nothing: 0 = the twin, 1 =
    nothing done. outside: mean squared error against the photo elsewhere. records: how many have twins."""

    attribute: str
    start: str
    to: str
    records: int
    inside: Measure
    outside: Measure
    reconstruction_outside: Measure


@dataclass(frozen=True)
class Slider:
    """What the judge says of one value of one attribute as its slider moves: its mean probability at each position, the
    share of records that rise and never turn back, and where the middle 80% of the rise takes place."""

    attribute: str
    value: str
    positions: tuple[float, ...]
    response: tuple[float, ...]
    monotonic: float
    effective_from: float
    effective_to: float
    records: int

    @property
    def name(self) -> str:
        return self.attribute if self.value == "1" else f"{self.attribute}.{self.value}"


@dataclass(frozen=True)
class Preservation:
    """How far the attributes that one did not touch move when it is swapped, against the reconstruction: the share whose
    judged value stays, the mean total variation distance of the judge's probabilities, and the attribute with the largest."""

    attribute: str
    kept: float
    shift: float
    most_moved: str
    most_moved_shift: float


@dataclass(frozen=True)
class Leak:
    """What a fresh probe, the one of "linear", "mlp" and "kernel" that did best on held-out training records, reads of
    one attribute from frozen latents: balanced accuracy on other records. chance is 1/k."""

    attribute: str
    value: float
    low: float
    high: float
    chance: float
    probe: str
    probe_records: int
    records: int


@dataclass(frozen=True)
class Distance:
    """How far the features of some decoded images lie from those of real images, as Fréchet and kernel distance. A swap,
    which attribute and to name, is held against the real images of that value, a reconstruction or a sample against all."""

    images: str
    attribute: str | None
    to: str | None
    records: int
    real_records: int
    fid: float
    kid: float
    kid_std: float


@dataclass(frozen=True)
class Conditional:
    """Scores of images by class: the joint values of `classes`; a swap is of the class it was asked for, every other image
    of the class it is labelled. num_classes: with at least two images on both sides. inception, between, within: IS, BCIS
    and WCIS of the judge's probabilities. bcfid, wcfid: Fréchet distance to real images, between and within classes."""

    images: str
    classes: tuple[str, ...]
    num_classes: int
    records: int
    inception: float
    between: float
    within: float
    bcfid: float
    wcfid: float


@dataclass
class Report:
    """Everything that `evaluate` measured of one model. Parts that were not asked for are empty. scores: for each number
    the lowest of the readers'; readings: every reader's own. builds: of the judges' networks; whether swaps are flattered is not
    known where they are not two. flattered: None where numbers have no intervals. look_at_grid: attributes whose lowest
    reader reads swaps better than real pictures, whose labels may be noisy. judge_digests: of the weights of each judge."""

    model: str
    method: str
    judge: str | None
    split: str
    split_digest: str
    records: int
    split_records: int
    image_size: int
    images_seen: int | None
    seed: int
    warnings: list[str] = field(default_factory=list)
    judge_digests: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    builds: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    readings: list[Score] = field(default_factory=list)
    flattered: list[Flattery] | None = None
    look_at_grid: list[str] = field(default_factory=list)
    plain: dict[str, float] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, Measure] = field(default_factory=dict)
    truth: list[Truth] = field(default_factory=list)
    preservation: list[Preservation] = field(default_factory=list)
    sliders: list[Slider] = field(default_factory=list)
    leak: list[Leak] = field(default_factory=list)
    features: str | None = None
    distances: list[Distance] = field(default_factory=list)
    conditional: list[Conditional] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)

    def score(self, images: str, attribute: str = "*", to: str | None = None, start: str | None = None) -> Score:
        """One accuracy: balanced when no value is named, of one direction with `to`, of one pair with `start` as well."""
        if score := self.find(images, attribute, to, start):
            return score
        direction = f" {start or ''}→{to}" if to is not None else ""
        raise ValueError(f"the report on {self.model} has no {images} accuracy of {attribute}{direction}")

    def find(self, images: str, attribute: str = "*", to: str | None = None, start: str | None = None) -> Score | None:
        key = (images, attribute, to, start)
        return next((s for s in self.scores if (s.images, s.attribute, s.to, s.start) == key), None)

    def attributes(self) -> list[str]:
        return list(dict.fromkeys(score.attribute for score in self.scores if score.attribute != "*"))

    def _bootstrapped(self) -> dict[str, Score | Measure | Leak]:
        kinds = {"real": "judge_accuracy"} | {images: f"{images}_accuracy" for images in IMAGES[1:]}
        named: dict[str, Score | Measure | Leak] = {}
        for s in self.scores:
            if s.images != "swap" and s.to is not None:
                direction = f"_{s.to}"
            else:
                direction = "".join(f"_{part}" for part in (s.start, s.to and f"to_{s.to}") if part)
            named[kinds[s.images] + ("" if s.attribute == "*" else f".{s.attribute}{direction}")] = s
        for truth in self.truth:
            swap = f"{truth.attribute}_{truth.start}_to_{truth.to}"
            named |= {f"twin_inside.{swap}": truth.inside, f"twin_outside.{swap}": truth.outside}
        return named | self.fidelity | {f"leak.{leak.attribute}": leak for leak in self.leak}

    def quantities(self) -> dict[str, float]:
        """Return all numbers flat, by the names that tracking, cards and `run.best` know, without the split's name."""
        flat = {name: number.value for name, number in self._bootstrapped().items()}
        flat |= {f"judge_plain_accuracy.{name}": value for name, value in self.plain.items()}
        flat |= {f"judge_auc.{name}": value for name, value in self.auc.items()}
        flat |= {f"judge_ece.{name}": value for name, value in self.calibration.items()}
        for p in self.preservation:
            flat |= {f"kept.{p.attribute}": p.kept, f"shift.{p.attribute}": p.shift}
        for slider in self.sliders:
            name = slider.attribute if slider.value == "1" else f"{slider.attribute}_{slider.value}"
            flat |= {f"monotonic.{name}": slider.monotonic}
        for d in self.distances:
            name = d.images + (f".{d.attribute}_to_{d.to}" if d.attribute else "")
            flat |= {f"fid.{name}": d.fid, f"kid.{name}": d.kid}
        for c in self.conditional:
            name = f"{c.images}.{'_and_'.join(c.classes)}"
            flat |= {f"is.{name}": c.inception, f"bcis.{name}": c.between, f"wcis.{name}": c.within}
            flat |= {f"bcfid.{name}": c.bcfid, f"wcfid.{name}": c.wcfid}
        return flat

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the 95% intervals of those that have one, by the same names."""
        bounds = {name: (number.low, number.high) for name, number in self._bootstrapped().items()}
        return {name: pair for name, pair in bounds.items() if all(map(math.isfinite, pair))}

    def metrics(self) -> dict[str, float]:
        """Return the same named split/quantity, without what is not a number."""
        flat = self.quantities().items()
        return {f"{self.split}/{name}": float(value) for name, value in flat if not math.isnan(value)}

    def reading(self, reader: str, images: str, attribute: str) -> float:
        key = (reader, images, attribute, None)
        return next(s.value for s in self.readings if (s.reader, s.images, s.attribute, s.to) == key)

    def better_than_real(self) -> list[str]:
        """Return the attributes whose swaps the lowest reader reads better than it reads real pictures."""
        lowest = [s for s in self.scores if (s.images, s.to) == ("swap", None) and s.attribute != "*"]
        return [s.attribute for s in lowest if s.value > self.reading(s.reader, "real", s.attribute)]

    @property
    def rests_on(self) -> str:
        split = f"{self.split} split (digest {self.split_digest[:12]})"
        return f"{self.records:,} of {self.split_records:,} records of the {split}"

    @property
    def tells_flattery(self) -> bool:
        """Whether judges of two builds read the swaps, where their numbers have intervals: one build alone is never found out."""
        return self.flattered is None or len(self.builds) > 1

    def verdicts(self) -> list[str]:
        """Say in words which attributes are flattered, or that nobody knows, and which a person should look at."""
        words = []
        if not self.tells_flattery:
            words.append(
                f"whether swaps are flattered is NOT KNOWN: only judges of one build ({self.builds[0]}) read them, and what "
                "pleases one may please all; name one of another build beside it, as residual and official (--judge JUDGE,OTHER)"
            )
        for f in self.flattered or ():
            swaps, reals = (
                " and ".join(f"{self.reading(reader, images, f.attribute):.2f} by {reader}" for reader in (f.pleased, f.other))
                for images in ("swap", "real")
            )
            words.append(f"{f.attribute} is FLATTERED: swaps are read with {swaps}, real pictures with {reals}")
        for name in self.look_at_grid:
            words.append(f"{name}: its lowest reader reads swaps better than real pictures; look at the grid")
        return words

    def tags(self) -> dict[str, str]:
        """Return the verdicts as tags; none where they were not asked."""
        if self.flattered is None:
            return {}
        names = [f.attribute for f in self.flattered]
        unnamed = "none" if self.tells_flattery else "not known"
        return {"flattered": ", ".join(names) or unnamed, "look_at_the_grid": ", ".join(self.look_at_grid) or "none"}

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; None stands for what is not a number."""
        intervals = {f"{self.split}/{name}": list(pair) for name, pair in self.intervals().items()}
        return {**_plain(asdict(self)), "metrics": self.metrics(), "intervals": intervals}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
