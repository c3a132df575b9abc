"""The report page: everything inside one file, and what it shows is what was found."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from fader.method import Batch
from pipeline import evaluation, models, tracking
from pipeline.data.shards import ShardSet
from pipeline.evaluation import page, pictures
from pipeline.evaluation.report import Flattery
from pipeline.images import Preprocessing, to_uint8
from tests.launch.test_evaluate import shards  # noqa: F401  a shard set of planted pictures
from tests.pipeline.evaluation.test_evaluation import SIZE, Identity, Noise, Oracle, Seer
from tests.runs import ATTRIBUTES


class Outside(HTMLParser):
    """Everything in a page that a browser would fetch, and the pictures it carries."""

    FETCHED = ("src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pictures: list[bytes] = []
        self.feed(text)
        self.found += re.findall(r"@import|url\(", text)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            if name in self.FETCHED and (value or "").startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2], validate=True))
            elif name in self.FETCHED:
                self.found.append(f"{name}={value}")
            elif name == "style" and value:
                self.found += re.findall(r"url\(", value)


def model(method, source, run=None):
    card = {"config": {"name": "<planted> & more", "data": {"path": "shards"}}, "commit": "c0ffee", "images_seen": 64}
    return models.Model(method, card, method.attributes, Preprocessing(SIZE, "center"), (), source, run)


def page_of(slider, judge, shards, folder, **asked):  # noqa: F811
    """The page of a model and its report."""
    specification, opened = evaluation.Specification(**asked), ShardSet.open(shards)
    report = evaluation.evaluate(slider, [judge] if judge else [], opened, specification)
    return page.write(report, slider, judge, opened, folder, specification), report


@pytest.fixture(scope="module")
def written(shards, tmp_path_factory):  # noqa: F811
    """The page of an oracle in a tracked run, with its report."""
    run = tmp_path_factory.mktemp("run")
    tracker = tracking.MlflowTracker(run, "experiment", "name", deliver=False)
    tracker.start()
    for images in (32, 64):
        metrics = {"autoencoder/mse": 1 / images, "autoencoder/lambda": 1e-4, "valid/swap_accuracy.Beard": 1.0}
        tracker.log(metrics, images, 1)
    tracker.finish("FINISHED")
    (run / "config.yaml").write_text("name: planted  # <script src='https://example.org'>\n")
    oracle = model(Oracle(ATTRIBUTES), str(run), run)
    return page_of(oracle, model(Seer(ATTRIBUTES), "seer"), shards, run / "report", tables=("swap", "fidelity"))


def test_the_page_needs_nothing_outside_its_file(written):
    path, _ = written
    text = path.read_text()
    found = Outside(text)
    assert not found.found
    assert "&lt;planted&gt; &amp; more" in text and "<planted>" not in text
    pngs = sorted(path.with_suffix("").glob("*.png"))
    assert sorted(found.pictures) == sorted(png.read_bytes() for png in pngs), "page and folder show different pictures"
    for png in found.pictures:
        Image.open(io.BytesIO(png)).verify()


@pytest.mark.parametrize(
    "planted",
    ['<img src="sweep.png">', '<a href="https://x.org">', "<script>1</script>", "<style>@import 'a.css'</style>"],
)
def test_the_test_sees_what_is_outside(written, planted):
    assert Outside(written[0].read_text() + planted).found


def test_the_page_shows_what_was_found(written):
    path, report = written
    text = path.read_text()
    names = {png.stem for png in path.with_suffix("").glob("*.png")}
    sweeps = {f"sweep-{name}" for name in ("Smiling", "Eyeglasses", "Beard.none", "Beard.moustache", "Beard.full")}
    cases = {f"cases-{name}" for name in ATTRIBUTES.names}
    assert names == {"swaps", "accuracy", "sliders", "curves", "attributes"} | sweeps | cases
    order = ("<h2>Swaps", 'class="cards"', "<h2>At a glance", "<h2>Tables", "<h2>Sweeps")
    assert sorted(order, key=text.index) == list(order), "a reader looks before he reads a number"
    for table in evaluation.as_tables([report]):
        assert f"<h3>{table.title}</h3>" in text
    assert "balanced swap accuracy" in text and "<b>1.000</b>" in text and "name: planted" in text


def test_no_verdict_stands_before_the_swaps(written):
    _, report = written
    flattery = Flattery("Smiling", *report.readers, 0.5, 0.4, 0.6)
    flattered = dataclasses.replace(report, flattered=[flattery], builds=["one", "other"])
    flattered.warnings = ["20 of the 40 records", *flattered.verdicts()]
    sections = page.Section("Swaps"), page.Section("At a glance")
    text = page._html(flattered, model(Oracle(ATTRIBUTES), "oracle"), sections, [])
    order = ("20 of the 40 records", "<h2>Swaps", "Smiling is FLATTERED", 'class="cards"', "<h2>At a glance")
    assert sorted(order, key=text.index) == list(order)


def test_worst_and_best_are_by_the_judges_probability(shards):  # noqa: F811
    """An identity swaps nothing, so a sure judge gives every swap next to nothing; an oracle's swaps nearly all."""
    split, seer = ShardSet.open(shards).split("test"), model(Seer(ATTRIBUTES), "seer")
    seen = {}

    def sheet(rows, above, gaps=()):
        seen.setdefault(method, []).append([float(words) for words in above])
        assert len(rows) == 2 and gaps == (pictures.SIDE_BY_SIDE,)
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_sheet", sheet)
        for method in (Oracle, Identity):
            one = model(method(ATTRIBUTES), "x")
            batches = page._batches(one, split, 40, 16, evaluation.Specification())
            pictures.case_sheets(one, seer, split, batches)
    for probabilities in [*seen[Oracle], *seen[Identity]]:
        assert probabilities == sorted(probabilities) and len(probabilities) == 2 * pictures.SIDE_BY_SIDE
    assert min(map(min, seen[Oracle])) > 0.5 > max(map(max, seen[Identity]))


def test_a_judges_own_page_and_one_without_a_spool(shards, tmp_path):  # noqa: F811
    path, _ = page_of(model(Seer(ATTRIBUTES), "seer"), None, shards, tmp_path, limit=20)
    assert path.name == "report-test-first-20.html" and not Outside(path.read_text()).found
    assert "There are no curves" in path.read_text() and "Worst and best judged" in path.read_text()
    assert {png.stem for png in path.with_suffix("").glob("sweep*")} == set()


def test_a_samplers_page_shows_its_samples(shards, tmp_path):  # noqa: F811
    path, _ = page_of(model(Noise(ATTRIBUTES), "noise"), model(Seer(ATTRIBUTES), "seer"), shards, tmp_path, tables=("swap",))
    names = {png.stem for png in path.with_suffix("").glob("*.png")}
    assert {"swaps", "accuracy", "sweep-Smiling", "cases-Beard", "neighbours"} <= names and not Outside(path.read_text()).found


def test_a_face_learned_by_heart_stands_beside_itself(monkeypatch):
    """The nearest of all batches, nearest first; and how far samples and real pictures are from them."""
    torch.manual_seed(0)
    images = torch.rand(20, 3, SIZE, SIZE) * 2 - 1
    labels = torch.zeros(20, len(ATTRIBUTES))
    batches = [Batch.alone(images[start : start + 5], labels[:5]) for start in range(5, 20, 5)]
    learned = images[[17, 5]].lerp(images[[6, 12]], torch.tensor([0.3, 0.4])[:, None, None, None])  # still nearer to the first
    one = model(Noise(ATTRIBUTES), "noise")
    monkeypatch.setattr(one.method, "sample", lambda noise, code: learned)
    rows = []
    monkeypatch.setattr(pictures, "_sheet", lambda cells, above: rows.extend(cells) or b"")
    sheet = pictures.neighbour_sheet(one, Batch.alone(images[:2], labels[:2]), lambda look: [look(batch) for batch in batches])
    assert len(rows) == 2 and all(len(row) == 1 + pictures.NEIGHBOURS for row in rows)
    for row, wanted in zip(rows, ([17, 6], [5, 12])):
        assert [(cell == to_uint8(images[k : k + 1])[0].numpy()).all() for cell, k in zip(row[1:], wanted)] == [True, True]
    samples, real = map(float, re.findall(r"0\.\d+", sheet.caption))
    nearest = (learned[1] - images[5]).square().mean().sqrt(), (learned[0] - images[17]).square().mean().sqrt()
    assert samples == pytest.approx(float(min(nearest)), abs=1e-3) and real > 0.5
