"""Every loader gives the batches that the plan asks for: the same pixels, the right labels, on any number of ranks."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fader.attributes import Attribute, Attributes
from fader.draws import key_of
from pipeline.config import DataConfig
from pipeline.data.datasets.celeba import read_celeba
from pipeline.data.shards import ShardSet, Split, prepare
from pipeline.images import Preprocessing
from pipeline.loading.dali import DaliLoader, graph, open_loader
from pipeline.loading.plan import Plan, Request, sequential

COLOURS = Attributes([Attribute("Red"), Attribute("Green"), Attribute("Blue")])
SMALL = Preprocessing(64)
KINDS = [("dali", "device"), ("dali", "host"), ("dali", "none"), ("pillow", "none")]
SPLIT_SIZES = {"train": 40, "valid": 12, "test": 9}


def jpeg(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **({"quality": 90} | options))
    return out.getvalue()


def planted(number: int) -> tuple[np.ndarray, list[int]]:
    """A 178x218 picture that says which it is: its number as eight black or white blocks, its labels as its colour.

    Each label is 1 where the channel is bright, by bits of another order than the number's. The left is not the right.
    """
    labels = [(number * 37 >> bit) & 1 for bit in (1, 3, 4)]
    pixels = np.empty((218, 178, 3), np.uint8)
    pixels[:] = [210 if label else 50 for label in labels]
    for bit in range(8):
        pixels[30:80, bit * 22 + 1 : bit * 22 + 23] = 255 * (number >> bit & 1)
    pixels[120:180, 10:40] = 128
    return pixels, labels


def textured(number: int) -> np.ndarray:
    """A 178x218 picture with edges, gradients and grain, as photographs have."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:218, 0:178]
    waves = 128 + 60 * np.sin(x / (5 + number % 7) + number) + 40 * np.cos(y / (7 + number % 5))
    pixels = np.stack([waves, y * 255 / 218, x * 255 / 178], -1) + rng.normal(0, 8, (218, 178, 3))
    pixels[60:150, 40:90] *= 0.4
    return np.clip(pixels, 0, 255).astype(np.uint8)


def celeba_folder(folder: Path, pictures: list[bytes], labels: list[list[int]], splits: list[str]) -> Path:
    """A folder in CelebA's own format."""
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(len(pictures))]
    for name, data in zip(names, pictures):
        (folder / "img_align_celeba" / name).write_bytes(data)
    rows = [f"{name} {' '.join(f'{2 * label - 1:2d}' for label in row)}" for name, row in zip(names, labels)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(len(rows)), " ".join(COLOURS.names), *rows]) + "\n")
    numbers = {"train": 0, "valid": 1, "test": 2}
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{name} {numbers[split]}\n" for name, split in zip(names, splits))
    )
    return folder


def planted_set(folder: Path) -> ShardSet:
    splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
    made = [planted(number) for number in range(len(splits))]
    source = celeba_folder(folder / "source", [jpeg(p) for p, _ in made], [labels for _, labels in made], splits)
    return prepare(read_celeba(source), folder / "shards", shard_records=16, workers=1)


def all_train(source: Path, out: Path) -> Split:
    """A set whose records are all train; from train records alone CelebA's reader would take valid and test ones."""
    dataset = read_celeba(source)
    return prepare(replace(dataset, splits=["train"] * len(dataset)), out, workers=1).split("train")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return planted_set(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def train(shards) -> Split:
    return shards.split("train")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("textured")
    pictures = [jpeg(textured(number), quality=87) for number in range(24)]
    source = celeba_folder(folder / "source", pictures, [[0, 1, 0]] * 24, ["train"] * 24)
    return all_train(source, folder / "shards")


def made(kind: tuple[str, str], split: Split, preprocessing: Preprocessing = SMALL, **options):
    return open_loader(*kind, split, COLOURS, preprocessing, **({"seed": 7} | options))


def requests(size: int, draws, batch_size: int = 7, stream: str = "a", **options) -> list[Request]:
    plan = Plan(size, seed=7)
    return [Request(stream, draw, plan.rows(stream, draw, batch_size), **options) for draw in draws]


def pixels_of(loader, size: int) -> np.ndarray:
    """Every picture of a split in grey levels, [n, C, S, S]."""
    batches = loader.batches(sequential(size, 11))
    return torch.cat([batch.images for batch in batches]).add(1).mul(127.5).numpy()


def equal(a, b) -> bool:
    same = torch.equal(a.attributes, b.attributes) and torch.equal(a.index, b.index) and torch.equal(a.known, b.known)
    if a.images is None or b.images is None:
        return same and a.images is b.images
    return same and torch.equal(a.images, b.images) and a.draws.host_key == b.draws.host_key


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128, 178, 256])
def test_dali_gives_the_pixels_that_pillow_gives(photos, size):
    preprocessing = Preprocessing(size)
    reference = pixels_of(made(("pillow", "none"), photos, preprocessing), len(photos))
    found = pixels_of(made(("dali", "none"), photos, preprocessing), len(photos))
    error = np.abs(found - reference)
    assert error.mean() <= 0.3 and np.quantile(error, 0.99) <= 2, (error.mean(), np.quantile(error, 0.99))
    assert np.abs(found - found.round()).max() < 1e-3  # they were rounded to grey levels
    if size == 178:
        assert error.max() <= 1


@pytest.mark.parametrize("fault", ["one row too low", "channels in another order", "another kernel"])
def test_the_tolerance_is_one_that_a_fault_exceeds(photos, fault, monkeypatch):
    reference = pixels_of(made(("pillow", "none"), photos), len(photos))
    loader = made(("dali", "none"), photos)
    if fault == "one row too low":
        loader.geometry.boxes = loader.boxes + [0, 1, 0, 1]
    if fault == "another kernel":
        monkeypatch.setattr(graph.types, "INTERP_LINEAR", graph.types.INTERP_NN)
    found = pixels_of(loader, len(photos))
    if fault == "channels in another order":
        found = found[:, ::-1]
    error = np.abs(found - reference)
    assert error.mean() > 5 * 0.3 and np.quantile(error, 0.99) > 3 * 2, (error.mean(), np.quantile(error, 0.99))


def test_grey_pictures_agree(photos):
    preprocessing = Preprocessing(64, channels=1)
    reference = pixels_of(made(("pillow", "none"), photos, preprocessing), len(photos))
    found = pixels_of(made(("dali", "device"), photos, preprocessing), len(photos))
    assert found.shape == (24, 1, 64, 64)
    assert np.abs(found - reference).mean() <= 0.5 and np.quantile(np.abs(found - reference), 0.99) <= 2


@pytest.mark.parametrize("size", [64, 150])
def test_pictures_of_many_sizes_and_turned_ones_agree(tmp_path, size):
    """Centre crop; some shrink and some grow in one batch; one lies on its side, as EXIF says."""
    sizes = [(218, 178), (100, 300), (300, 100), (150, 150), (61, 90), (218, 178), (218, 178)]
    pictures = []
    for number, (height, width) in enumerate(sizes):
        pixels = np.asarray(Image.fromarray(textured(number)).resize((width, height), Image.Resampling.BICUBIC))
        exif = Image.Exif()
        if number >= 5:
            exif[0x0112] = 6 if number == 5 else 3
        pictures.append(jpeg(pixels, exif=exif))
    source = celeba_folder(tmp_path / "source", pictures, [[0, 1, 0]] * 7, ["train"] * 7)
    split = all_train(source, tmp_path / "shards")
    preprocessing = Preprocessing(size, crop="center")
    reference = pixels_of(made(("pillow", "none"), split, preprocessing), 7)
    for cache in ("device", "none"):
        error = np.abs(pixels_of(made(("dali", cache), split, preprocessing), 7) - reference)
        assert error.mean(axis=(1, 2, 3)).max() <= 0.3 and np.quantile(error, 0.99) <= 2, error.mean(axis=(1, 2, 3))


# --- the right records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLIT_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_pixels_and_labels_belong_together_in_every_split(shards, kind, name):
    split = shards.split(name)
    seen = []
    for batch in made(kind, split).batches(sequential(len(split), 7)):
        for picture, labels, row in zip(batch.images, batch.attributes, batch.index):
            centres = [int((bit * 22 + 12) * 64 / 178) for bit in range(8)]
            bits = (picture[:, int(35 * 64 / 178), centres].mean(0) > 0).long()
            number = int((bits << torch.arange(8)).sum())
            assert split.keys[row] == f"{number:06d}"
            assert labels.tolist() == (picture[:, 55, 40] > 0).float().tolist() == planted(number)[1]
            seen.append(number)
    numbers = iter(range(61))
    expected = {name: list(itertools.islice(numbers, size)) for name, size in SPLIT_SIZES.items()}
    assert sorted(seen) == expected[name]


def test_attributes_come_in_the_order_asked_for(train):
    some = Attributes([COLOURS[2], COLOURS[0]])
    batch = next(DaliLoader(train, some, SMALL, seed=7).batches(requests(40, [3])))
    assert torch.equal(batch.attributes, torch.from_numpy(train.labels[batch.index][:, [2, 0]]))


@pytest.mark.parametrize("flip", [True, False])
def test_kept_equals_streamed_to_the_bit(photos, flip):
    asked = requests(24, range(12), flip=flip)
    kept = made(("dali", "device"), photos).batches(asked)
    streamed = made(("dali", "none"), photos, threads=1, prefetch=1).batches(asked)
    assert all(equal(a, b) for a, b in zip(kept, streamed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size, world_size", [(8, 2), (7, 2), (7, 3), (1, 2)])
def test_ranks_together_make_the_one_process_batch(train, kind, batch_size, world_size):
    asked = requests(40, range(8), batch_size, flip=True)
    whole = list(made(kind, train).batches(asked))
    ranks = [
        list(made(kind, train, rank=rank, world_size=world_size).batches(asked)) for rank in range(world_size)
    ]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.attributes for part in parts]), batch.attributes)
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        for part in parts:
            assert part.size * world_size == batch_size
            assert torch.allclose(part.known * world_size, batch.known)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_read_each_record_once_an_epoch(train, kind):
    asked = requests(40, range(10), 8)
    rows = [batch.index for rank in (0, 1) for batch in made(kind, train, rank=rank, world_size=2).batches(asked)]
    assert torch.bincount(torch.cat(rows)).tolist() == [2] * 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_gives_what_the_unbroken_one_gave(train, kind):
    unbroken = list(made(kind, train).batches(requests(40, range(14), flip=True)))
    resumed = list(made(kind, train).batches(requests(40, range(5, 14), flip=True)))
    assert all(equal(a, b) for a, b in zip(unbroken[5:], resumed, strict=True))


# --- kinds of requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_may_have_any_size_in_any_order(train, kind):
    sizes = [3, 1, 40, 2, 2, 41, 5, 90, 1]
    rows = [np.arange(size, dtype=np.int64) % 40 for size in sizes]
    batches = made(kind, train).batches(Request("a", draw, part) for draw, part in enumerate(rows))
    reference = pixels_of(made(kind, train), 40)
    for part, batch in zip(rows, batches, strict=True):
        assert batch.index.tolist() == part.tolist()
        assert np.array_equal(batch.images.add(1).mul(127.5).numpy(), reference[part])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [1, 3, 60])
def test_requests_with_and_without_images_keep_their_order(train, kind, run):
    asked = []
    for draw in range(4):
        asked += requests(40, [draw], stream="a")
        asked += requests(40, range(run * draw, run * (draw + 1)), stream="labels", images=False)
    batches = list(made(kind, train).batches(iter(asked)))
    for request, batch in zip(asked, batches, strict=True):
        assert batch.draws.host_key == key_of(7, request.stream, request.draw)
        assert batch.index.tolist() == request.rows.tolist()
        assert (batch.images is not None) == request.images


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_stream_of_labels_decodes_nothing(train, kind, monkeypatch):
    monkeypatch.setattr(Split, "bytes", lambda self, row: pytest.fail("a picture was read"))
    endless = (request for draw in itertools.count() for request in requests(40, [draw], images=False))
    batches = list(itertools.islice(made(kind, train).batches(endless), 100))
    assert [batch.draws.host_key for batch in batches] == [key_of(7, "a", draw) for draw in range(100)]
    assert all(batch.images is None and batch.attributes.shape == (7, 3) for batch in batches)


def test_no_request_gives_no_batch(train):
    assert all(list(made(kind, train).batches([])) == [] for kind in KINDS)


# --- working ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [("dali", "none"), ("pillow", "none")])
def test_a_loader_reads_a_few_requests_ahead_and_no_more(train, kind):
    asked = 0

    def endless():
        nonlocal asked
        for draw in itertools.count():
            asked += 1
            yield from requests(40, [draw])

    batches = made(kind, train, prefetch=3).batches(endless())
    for given in range(1, 20):
        next(batches)
        assert given + 2 <= asked <= given + 4
    batches.close()


def tasks() -> int:
    """Threads of this process, DALI's own among them."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("kind", [("dali", "none"), ("pillow", "none")])
@pytest.mark.parametrize("end", ["close", "forget", "exhaust"])
def test_an_ended_iterator_leaves_no_thread(train, kind, end):
    loader = made(kind, train)
    list(loader.batches(requests(40, range(2))))
    gc.collect()
    before, python_threads = tasks(), threading.active_count()  # the files tested before leave one of fsspec
    for _ in range(5):
        endless = (request for draw in itertools.count() for request in requests(40, [draw]))
        batches = loader.batches(endless if end != "exhaust" else requests(40, range(3)))
        next(batches)
        assert tasks() > before
        if end == "close":
            batches.close()
        elif end == "exhaust":
            list(batches)
        del batches
    gc.collect()
    for _ in range(50):
        if tasks() <= before:
            break
        time.sleep(0.02)
    assert tasks() <= before and threading.active_count() <= python_threads


@pytest.mark.parametrize("kind", ["dali", "pillow"])
def test_a_process_ends_with_an_iterator_still_open(shards, kind):
    code = f"""
        import itertools, numpy as np
        from pipeline.data.shards import ShardSet
        from pipeline.loading.plan import Request
        from pipeline.loading.dali import open_loader
        from pipeline.images import Preprocessing
        split = ShardSet.open({str(shards.path)!r}).split("train")
        loader = open_loader({kind!r}, "none", split, split.attributes, Preprocessing(64), seed=1)
        batches = loader.batches(Request("a", k, np.arange(8)) for k in itertools.count())
        for _ in range(3):
            next(batches)
        print("read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, cwd=Path.cwd()
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
    assert "rror" not in done.stderr


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> tuple[Split, int]:
    """A split one of whose pictures was overwritten after it was prepared, and that picture's row."""
    split = planted_set(tmp_path).split("train")
    row = 23
    with open(split.shards[split.shard[row]], "r+b") as tar:
        tar.seek(int(split.offset[row]))
        tar.write(bytes(int(split.size[row]) * 2 // 3))
    return split, row


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_that_does_not_decode_is_named(damaged, kind):
    split, row = damaged
    loader = made(kind, split)
    batches = loader.batches(sequential(40, 8))
    given = []
    with pytest.raises(ValueError) as caught:
        for batch in batches:
            given.append(batch)
    message = str(caught.value)
    assert str(split.keys[row]) in message and split.shards[split.shard[row]].name in message
    assert "fader verify" in message and "\n" not in message
    assert len(given) == 2
    others = [batch.index.tolist() for batch in loader.batches([Request("a", 0, np.arange(20))])]
    assert others == [list(range(20))]


def test_a_picture_of_another_size_than_its_manifest_says_is_named(train):
    loader = made(("dali", "none"), train)
    loader.split = Split(**{**vars(train), "width": train.width + 1})
    loader.geometry.boxes = loader.boxes + [0, 0, 1, 0]
    with pytest.raises(ValueError, match=r"it is \(178, 218\), its manifest says \(179, 218\) pixels"):
        list(loader.batches(requests(40, [0])))


def test_a_failure_of_requests_reaches_the_caller(train):
    def failing():
        yield from requests(40, range(6))
        raise ValueError("no plan")

    for kind in KINDS:
        with pytest.raises(ValueError, match="no plan"):
            list(made(kind, train).batches(failing()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_the_split_is_refused(train, tmp_path, kind):
    with pytest.raises(ValueError, match="did you mean 'Green'"):
        open_loader(*kind, train, Attributes([Attribute("Grean")]), SMALL, seed=7)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        made(kind, train, rank=2, world_size=2)
    with pytest.raises(ValueError, match="0 threads"):
        made(kind, train, threads=0)
    small = [jpeg(planted(n)[0][:100]) for n in range(3)]
    source = celeba_folder(tmp_path / "source", small, [[0, 0, 0]] * 3, ["train"] * 3)
    split = all_train(source, tmp_path / "shards")
    with pytest.raises(ValueError, match="178x100"):
        made(kind, split)


def test_an_unknown_loader_is_refused(train):
    with pytest.raises(ValueError, match="unknown loader 'cv2'; there are: dali, pillow"):
        made(("cv2", "none"), train)


@pytest.mark.parametrize(
    "path", ["http://me:pw@host/set", "s3://key:pw@box/set", "https://token@host/set", "zip://::ftp://a:b@c/x"]
)
def test_an_address_with_a_password_is_refused_because_every_run_would_keep_it(path):
    with pytest.raises(ValueError, match="it holds a password"):
        DataConfig(path=path, attributes=("*",))
    for other in ("s3://bucket/a:b@c", "sftp://me@host/set", "/data/a:b@c", "http://host:80/set"):
        DataConfig(path=other, attributes=("*",))


def test_a_loader_says_what_it_does(train, caplog):
    caplog.set_level(logging.INFO)
    list(made(("dali", "device"), train).batches(requests(40, range(6))))
    made(("dali", "none"), train)
    about = "train: 40 records at 64 pixels, decoded by DALI on cpu (2 threads, 3 batches ahead)"
    assert f"{about}, once, and kept in the memory of cpu (data.cache device: 0.5 MB; " in caplog.text
    assert "train: all 40 records are kept now, after" in caplog.text
    assert f"{about}, and not kept (data.cache none: 0.5 MB; " in caplog.text


# --- on a GPU -------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("size", [64, 128, 178, 256])
    def test_mixed_decoding_gives_the_pixels_that_pillow_gives(self, photos, size):
        preprocessing = Preprocessing(size)
        reference = pixels_of(made(("pillow", "none"), photos, preprocessing), len(photos))
        loader = made(("dali", "none"), photos, preprocessing, device=torch.device("cuda"))
        batches = list(loader.batches(sequential(len(photos), 11)))
        assert all(batch.images.is_cuda and batch.attributes.is_cuda for batch in batches)
        found = torch.cat([batch.images for batch in batches]).cpu().add(1).mul(127.5).numpy()
        error = np.abs(found - reference)
        assert error.mean() <= 0.3 and np.quantile(error, 0.99) <= 2, (error.mean(), np.quantile(error, 0.99))

    @pytest.mark.parametrize("cache", ["device", "host"])
    @pytest.mark.parametrize("flip", [True, False])
    def test_kept_equals_streamed_to_the_bit(self, photos, flip, cache):
        """With kernels of training queued between batches, so that a buffer reused too early would show."""
        asked = requests(24, range(60), flip=flip)
        device = torch.device("cuda")
        kept = made(("dali", cache), photos, device=device).batches(asked)
        streamed = made(("dali", "none"), photos, device=device, prefetch=2).batches(asked)
        load = torch.randn(2048, 2048, device=device)
        pairs = []
        for a, b in zip(kept, streamed, strict=True):
            load = torch.tanh(load @ load)
            pairs.append((a, b))
        assert all(equal(a, b) for a, b in pairs)

    def test_flips_and_labels_are_those_of_the_cpu(self, train):
        asked = requests(40, range(8), flip=True)
        here = made(("dali", "device"), train).batches(asked)
        there = made(("dali", "device"), train, device=torch.device("cuda")).batches(asked)
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.attributes, b.attributes.cpu()) and torch.equal(a.index, b.index.cpu())
            assert torch.equal(a.known, b.known.cpu())
            assert (a.images - b.images.cpu()).abs().mean() * 127.5 <= 0.3
