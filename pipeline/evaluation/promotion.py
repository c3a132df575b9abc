"""Decide whether a model may become the champion: bounds on its numbers, and those of the champion under the same judge."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import metrics
from pipeline.evaluation.report import Report

USUAL = ("swap_accuracy", "judge_accuracy")  # what "better" means unless told otherwise


@dataclass(frozen=True)
class Bound:
    """A bound on one number of a report, which must be at least the value if `lower`, else at most."""

    quantity: str
    value: float
    lower: bool

    def broken(self, report: Report) -> str:
        """Say how a report breaks the bound; empty when it holds."""
        number = report.quantities().get(self.quantity, math.nan)
        holds = number >= self.value if self.lower else number <= self.value
        side = "at least" if self.lower else "at most"
        return "" if holds else f"{self.quantity} is {number:.4g}; it must be {side} {self.value:g}"


def parse_bound(word: str, option: str, known: Sequence[str]) -> Bound:
    """Read `--min smiling.swap=0.9` or `--max mse=0.03`."""
    name, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", value):
        raise ValueError(f"{option} {word}: write NAME=VALUE, as {option} smiling.swap=0.9")
    return Bound(quantity(name, known), float(value), option == "--min")


def quantity(name: str, known: Sequence[str]) -> str:
    """Return which of the known numbers a person means by `swap_accuracy.Smiling`, in short `smiling.swap`; or `swap`.
    Raises ValueError: there is none; the message offers the nearest."""
    by_lower = {full.lower(): full for full in known}
    attribute, dot, kind = name.lower().rpartition(".")
    end = f".{attribute}" if dot else ""
    for candidate in (name.lower(), f"{kind}{end}", f"{kind}_accuracy{end}"):
        if candidate in by_lower:
            return by_lower[candidate]
    near = difflib.get_close_matches(f"{kind}_accuracy{end}", by_lower, 1, 0.3)
    there = f"did you mean {by_lower[near[0]]}?" if near else f"there are: {', '.join(known)}"
    raise ValueError(f"the evaluation has no number {name!r}; {there}")


def reasons_against(
    candidate: Report, champion: Report | None, bounds: Sequence[Bound], better_by: str | None = None
) -> list[str]:
    """Say why a candidate may not become the champion; nothing when it may. champion: of the same evaluation, where it
    must be beaten, in `better_by`, by default the first of USUAL that there is. bounds: on the candidate's numbers."""
    reasons = [broken for bound in bounds if (broken := bound.broken(candidate))]
    reasons += [f"{f.attribute} is flattered: {f.pleased} reads swaps that {f.other} does not" for f in candidate.flattered or ()]
    if not candidate.tells_flattery:
        reasons.append(
            f"whether its swaps are flattered is not known, because only judges of one build read them ({candidate.judge}): name "
            "two of different builds (--judge JUDGE,OTHER; the build is a judge's method.preset, residual or official)"
        )
    if champion is None:
        return reasons
    by = better_by or next(name for name in USUAL if name in candidate.quantities())
    ours, theirs = (report.quantities().get(by, math.nan) for report in (candidate, champion))
    better = ours < theirs if metrics.lower_is_better(by) else ours > theirs
    if not better:
        reasons.append(f"{by} is {ours:.4g}, which is not better than {theirs:.4g} of {champion.model}")
    return reasons


def tags(report: Report, bounds: Sequence[Bound]) -> dict[str, str]:
    """Return what a promoted version is tagged with: its figures, and what they rest on."""
    names = dict.fromkeys([*(name for name in (*USUAL, "mse") if name in report.quantities()), *(b.quantity for b in bounds)])
    intervals = report.intervals()
    figures = {}
    for name in names:
        value = f"{report.quantities()[name]:.4g}"
        figures[f"promotion.{name}"] = value + (" ({:.4g} to {:.4g})".format(*intervals[name]) if name in intervals else "")
    return figures | {f"promotion.{name}": word for name, word in report.tags().items()} | {
        "promotion.judge": str(report.judge),
        "promotion.records": f"{report.records} of {report.split}",
        "promotion.split_digest": report.split_digest,
    }
