"""Pictures of any size and format come out right, through Pillow and through DALI alike: cropped or letter-boxed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import DATASETS, Shares
from pipeline.data.shards import Split, prepare
from pipeline.images import Preprocessing, decode, preprocess
from pipeline.loading.dali import open_loader
from pipeline.loading.plan import sequential

SIZES = [(218, 178), (100, 300), (300, 100), (150, 150), (61, 90), (64, 64), (65, 10), (64, 3), (500, 5), (63, 64)]


def textured(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def formats() -> dict[str, bytes]:
    base = textured(90, 70, 1)
    clear = base.convert("RGBA")
    clear.putalpha(base.convert("L"))
    deep = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    out = {f"turned{n}.jpg": encoded(base, exif=turned(n)) for n in (3, 6, 8)}
    return out | {
        "grey.jpg": encoded(base.convert("L")),
        "cmyk.jpg": encoded(base.convert("CMYK"), quality=95),
        "progressive.jpg": encoded(base, progressive=True),
        "colour.png": encoded(base, "PNG"),
        "grey.png": encoded(base.convert("L"), "PNG"),
        "bits.png": encoded(base.convert("1"), "PNG"),
        "palette.png": encoded(base.convert("P"), "PNG"),
        "clear.png": encoded(clear, "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "turned.png": encoded(base, "PNG", exif=turned(6)),
        "lossy.webp": encoded(base, "WEBP", quality=90),
        "exact.webp": encoded(base, "WEBP", lossless=True),
        "clear.webp": encoded(clear, "WEBP", lossless=True),
    }


def shards(folder: Path, pictures: dict[str, bytes]) -> Split:
    folder.mkdir()
    rows = [f"{name},{n % 2},{name.replace('.', '_')},train" for n, name in enumerate(pictures)]
    (folder / "list.csv").write_text("\n".join(["path,Odd,key,split", *rows]))
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    table = DATASETS["table"](folder / "list.csv", key="key", shares=Shares((100, 0, 0)))
    return prepare(table, folder / "set", workers=1).split("train")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Split:
    pictures = {f"{n}.jpg": encoded(textured(w, h, n), quality=95) for n, (h, w) in enumerate(SIZES)}
    pictures["lying.jpg"] = encoded(textured(200, 90, 7), exif=turned(6))
    return shards(tmp_path_factory.mktemp("sizes") / "source", pictures)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Split:
    return shards(tmp_path_factory.mktemp("kinds") / "source", formats())


def pixels(kind: str, split: Split, preprocessing: Preprocessing) -> np.ndarray:
    """[n, 3, S, S] grey levels of every record."""
    loader = open_loader(kind, "none", split, split.attributes, preprocessing, seed=0, threads=1)
    parts = [batch.images.numpy() for batch in loader.batches(sequential(len(split), 4))]
    return (np.concatenate(parts) + 1) * 127.5


@pytest.mark.parametrize("size", [64, 150])
@pytest.mark.parametrize("crop", ["center", "letterbox"])
def test_any_size_gives_the_same_pixels_through_dali_and_pillow(sizes, crop, size):
    preprocessing = Preprocessing(size, crop=crop)
    error = np.abs(pixels("dali", sizes, preprocessing) - pixels("pillow", sizes, preprocessing))
    boxes = preprocessing.boxes(sizes.width, sizes.height)
    grown_far = (boxes[:, 2:] - boxes[:, :2]).max(1) * 4 < size  # Pillow clips and rounds between its two passes
    mean = error.mean(axis=(1, 2, 3))
    assert mean[~grown_far].max() <= 0.3 and np.quantile(error[~grown_far], 0.99) <= 2, mean.round(2)
    assert not grown_far.any() or mean[grown_far].max() <= 1.5, mean.round(2)


@pytest.mark.parametrize("crop", ["center", "letterbox"])
def test_every_format_gives_the_same_pixels_through_dali_and_pillow(kinds, crop):
    preprocessing = Preprocessing(64, crop=crop)
    error = np.abs(pixels("dali", kinds, preprocessing) - pixels("pillow", kinds, preprocessing))
    worst = dict(zip(kinds.keys.tolist(), error.mean(axis=(1, 2, 3)).round(2).tolist()))
    assert max(worst.values()) <= 0.3 and np.quantile(error, 0.99) <= 2, worst


def test_formats_agree_with_the_picture_they_were_made_of(kinds):
    """Not only with each other: grey, CMYK and 16 bits are neither inverted nor cut off, turned ones are upright."""
    base = textured(90, 70, 1)
    grey, bits = base.convert("L").convert("RGB"), base.convert("1").convert("RGB")
    upright = {3: base.rotate(180), 6: base.rotate(-90, expand=True), 8: base.rotate(90, expand=True)}
    for row, key in enumerate(kinds.keys.tolist()):
        if key.startswith("turned"):
            expected = upright[6 if key == "turned_png" else int(key[6])]
        else:
            expected = {"grey": grey, "deep": grey, "bits": bits}.get(key.split("_")[0], base)
        image = decode(kinds.bytes(row))
        assert image.size == expected.size == (kinds.width[row], kinds.height[row]), key
        error = np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean()
        assert error < 18, (key, error)  # a palette is the coarsest; a wrong one is above 40


def test_letterbox_keeps_shapes_and_centres_them_on_black():
    disc = Image.new("RGB", (200, 100))
    y, x = np.mgrid[:100, :200]
    disc.paste((255, 255, 255), mask=Image.fromarray((((x - 60) ** 2 + (y - 50) ** 2 < 900) * 255).astype(np.uint8)))
    out = preprocess(disc, Preprocessing(100, crop="letterbox"))[..., 0]
    assert not out[:25].any() and not out[75:].any()
    rows, columns = np.nonzero(out > 127)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1 and abs(columns.mean() - 30) < 1 and abs(rows.mean() - 49.5) < 1


def test_letterbox_of_extreme_shapes_has_at_least_a_pixel_and_no_more_memory_than_the_square():
    rule = Preprocessing(64, crop="letterbox")
    boxes = rule.boxes(np.array([80_000_000, 1, 64, 65]), np.array([1, 5000, 64, 64]))
    assert rule.resized(boxes).tolist() == [[64, 1], [1, 64], [64, 64], [64, 63]]
    assert preprocess(Image.new("RGB", (50_000, 2), "white"), rule).max() == 255
