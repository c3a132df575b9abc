"""A study: people say of blinded pictures whether they look natural and which value they show; a CSV holds the answers.
Source: Lample et al. 2017, arXiv:1706.00409, section 5.2: naturalness and accuracy as people see them."""

import csv
import random
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fader.attributes import Attribute
from pipeline.app.messages import Message, Next, Rated, packed
from pipeline.data.shards import Split
from pipeline.faces.photos import pixels_of
from pipeline.images import decode, png_bytes, preprocess, to_float
from pipeline.metrics import wilson
from pipeline.models import Editing, Model

KINDS = ("real", "reconstruction", "swap")
TRIALS = 60  # of one person
COLUMNS = ("time", "rater", "model", "key", "kind", "attribute", "value", "natural", "answer")


class Study:
    """Makes pictures of records to be rated, and keeps the answers.
    Raises ValueError: no attribute has values to choose from, the split is empty, or the file holds something else."""

    def __init__(self, model: Model, editing: Editing, split: Split, answers: Path) -> None:
        self.model, self.editing, self.split, self.answers = model, editing, split, answers
        self.labels, self._lock = split.columns(model.attributes), threading.Lock()
        self.columns = [j for j, attribute in enumerate(model.attributes) if attribute.kind != "continuous"]
        if not len(split) or not (self.labels[:, self.columns] >= 0).any():
            raise ValueError(f"{split.name} holds no record with a known value of {', '.join(model.attributes.names)}")
        if answers.exists():
            read_answers(answers)

    def trial(self, kind: str, chance: random.Random) -> tuple[dict[str, Any], bytes]:
        """Draw a record and an attribute; return what is known of the picture, and the picture as PNG."""
        while True:
            row, column = chance.randrange(len(self.split)), chance.choice(self.columns)
            if self.labels[row, column] >= 0:
                break
        attribute = self.model.attributes[column]
        given = {a.name: float(v) for a, v in zip(self.model.attributes, self.labels[row]) if v >= 0}
        value = int(self.labels[row, column])
        picture = decode(self.split.bytes(row).tobytes())
        pixels = preprocess(picture, self.model.preprocessing.fitting(*picture.size))
        if kind != "real":
            images = to_float(torch.from_numpy(pixels[None].copy()))
            labels, _ = self.editing.labels(images, given)
            latent = self.editing.encode(images, labels)
            if kind == "swap":
                value = chance.choice([other for other in range(attribute.k) if other != value])
                labels = self.model.attributes.swapped(labels, attribute.name, float(value))
            pixels = pixels_of(self.editing.decode(latent, labels)[0])
        known = {"model": self.model.source, "key": str(self.split.keys[row]), "kind": kind}
        return known | {"attribute": attribute.name, "value": attribute.value_name(value)}, png_bytes(np.squeeze(pixels))

    def attribute(self, name: str) -> Attribute:
        return self.model.attributes[self.model.attributes.index(name)]

    def keep(self, answer: dict[str, Any]) -> None:
        """Append an answer to the file, whole and at once."""
        with self._lock, self.answers.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(answer)


class Rater:
    """One person, who sees pictures in random order, as many of each kind, and is not told which is which."""

    def __init__(self, study: Study) -> None:
        self.study, self.name, self.chance = study, secrets.token_hex(4), random.Random()
        self.kinds = [KINDS[number % len(KINDS)] for number in range(TRIALS)]
        self.chance.shuffle(self.kinds)
        self.shown: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        return {"kind": "study", "trials": TRIALS}

    def answer(self, message: Message, data: bytes) -> dict[str, Any] | bytes:
        """Keep what a person said of the picture, and show the next.
        Raises ValueError: a message that is none of a study's, or a value that the attribute does not have."""
        match message:
            case Next():
                return self.next()
            case Rated() if self.shown is not None:
                attribute = self.study.attribute(self.shown["attribute"])
                if message.value >= attribute.k:
                    raise ValueError(f"{attribute.name} has {attribute.k} values; there is no number {message.value + 1}")
                said = {"natural": int(message.natural), "answer": attribute.value_name(message.value)}
                self.study.keep({"time": int(time.time()), "rater": self.name, **self.shown, **said})
                self.shown = None
                return self.next()
        raise ValueError("this page shows pictures to rate, one after another; it takes nothing else")

    def next(self) -> dict[str, Any] | bytes:
        """Return the next picture, of which the page learns only what is asked; the same again while it is not rated."""
        if self.shown is None:
            if not self.kinds:
                return {"kind": "done"}
            self.shown, self.picture = self.study.trial(self.kinds.pop(), self.chance)
        attribute = self.study.attribute(self.shown["attribute"])
        values = list(attribute.categories) or ["absent", "present"]
        head = {"kind": "trial", "attribute": attribute.name, "values": values, "left": len(self.kinds)}
        return packed(head, self.picture)


def read_answers(path: Path) -> list[dict[str, str]]:
    """Return a study's answers; raise ValueError where the file holds something else."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
        raise ValueError(f"{path} does not hold a study's answers: its first line must be {','.join(COLUMNS)}")
    return rows


def results(rows: Iterable[dict[str, str]]) -> list[tuple[str, str, int, str, str]]:
    """Return kind, attribute, count, and the shares that look natural and show the value, each with its 95% interval."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        for attribute in ("all", row["attribute"]):
            groups.setdefault((row["kind"], attribute), []).append(row)
    table = []
    for (kind, attribute), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != "all", item[0][1])):
        natural, right = (sum(hits) for hits in zip(*((r["natural"] == "1", r["answer"] == r["value"]) for r in members)))
        table.append((kind, attribute, len(members), _share(natural, len(members)), _share(right, len(members))))
    return table


def _share(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits / count:.1%} ({low:.1%} to {high:.1%})"
