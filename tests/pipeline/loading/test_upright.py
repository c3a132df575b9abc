"""Which way up a picture is: read once, when it is prepared, and the same for every loader, wherever it is said."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.data.datasets import DATASETS
from pipeline.data.shards import ShardSet, Split, prepare, verify
from pipeline.data.shards.files import ORIENTATION
from pipeline.files import digest_of, write_json
from pipeline.images import Preprocessing, check, decode
from pipeline.loading.dali import decoder, open_loader
from pipeline.loading.plan import Request, sequential

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
)
HEAD = b"Exif\0\0"
WIDE, SQUARE = (90, 60), (60, 60)


def tiff(value: int | bytes, kind: int = 3, count: int = 1, order: str = "<") -> bytes:
    """Exif with one tag, the orientation, of a type and count."""
    packed = struct.pack(f"{order}H", value) if isinstance(value, int) and kind == 3 else value
    packed = struct.pack(f"{order}I", packed) if isinstance(packed, int) else packed
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IHHHI", 8, 1, 0x112, kind, count)
    return start + packed.ljust(4, b"\0") + bytes(4)


def corners(size: tuple[int, int]) -> Image.Image:
    """A picture that no turn or mirror maps to itself."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    pixels[: size[1] // 2] = 200
    pixels[:, : size[0] // 3, 0] = 120
    return Image.fromarray(pixels)


def encoded(size: tuple[int, int], kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    corners(size).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, at: int = 33) -> bytes:
    plain = encoded(WIDE, "PNG")
    place = at if at > 0 else len(plain) + at
    return plain[:place] + b"".join(chunks) + plain[place:]


def late(kind: int, data: bytes) -> bytes:
    """A JPEG with a segment right before its pixels, behind the size."""
    plain = encoded(WIDE)
    place = plain.index(b"\xff\xda")
    return plain[:place] + bytes([0xFF, kind]) + struct.pack(">H", 2 + len(data)) + data + plain[place:]


def pictures() -> dict[str, tuple[bytes, int]]:
    """By key: a picture, and the orientation that it says."""
    out = {f"exif{n}-{size[0]}": (encoded(size, exif=HEAD + tiff(n)), n) for n in range(1, 9) for size in (WIDE, SQUARE)}
    out |= {f"xmp{n}-{size[0]}": (encoded(size, xmp=(XMP % n).encode()), n) for n in (3, 6) for size in (WIDE, SQUARE)}
    out |= {f"png{n}": (encoded(WIDE, "PNG", exif=tiff(n)), n) for n in (3, 5)}
    for lossless in (True, False):  # of odd and of even length, which matters to nvImageCodec
        for n in range(4):
            options = {"lossless": lossless, "quality": 90 + n, "exif": HEAD + tiff(6)}
            out[f"webp{lossless}{n}"] = (encoded((90 + n, 60), "WEBP", **options), 6)
    raw = b"\nexif\n      32\n" + (HEAD + tiff(6)).hex().encode() + b"\n"
    out |= {
        "none": (encoded(WIDE), 1),
        "doubled6": (encoded(WIDE, exif=HEAD + HEAD + tiff(6)), 6),
        "doubled3": (encoded(SQUARE, exif=HEAD + HEAD + tiff(3)), 3),
        "big-endian": (encoded(WIDE, exif=HEAD + tiff(6, order=">")), 6),
        "long": (encoded(WIDE, exif=HEAD + tiff(6, kind=4)), 6),
        "two": (encoded(WIDE, exif=HEAD + tiff(b"\6\0\3\0", count=2)), 6),
        "both": (encoded(WIDE, exif=HEAD + tiff(3), xmp=(XMP % 6).encode()), 3),
        "late-exif": (late(0xE1, HEAD + tiff(6)), 6),
        "late-xmp": (late(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + (XMP % 6).encode()), 6),
        "element": (encoded(WIDE, xmp=b"<r><tiff:Orientation>6</tiff:Orientation></r>"), 6),
        "xmp-webp": (encoded(WIDE, "WEBP", lossless=True, xmp=(XMP % 6).encode()), 6),
        "xmp-png": (png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + (XMP % 6).encode())), 6),
        "raw-png": (png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))), 6),
        "late-png": (png(chunk(b"eXIf", tiff(6)), at=-12), 6),
    }
    # tags that say nothing: of a value that means nothing, of a type that holds no number, in metadata that is damaged
    nothing = {f"value{n}": tiff(n) for n in (0, 9, 1000)} | {
        "byte": tiff(b"\6", kind=1), "text": tiff(b"6\0", kind=2, count=2), "undefined": tiff(b"\6", kind=7),
        "float": tiff(struct.pack("<f", 6.0), kind=11), "count0": tiff(6, count=0),
        "rational": tiff(struct.pack("<I", 26), kind=5) + struct.pack("<II", 6, 1), "far": tiff(6, kind=3, count=9999),
        "cut": tiff(6)[:12], "garbage": b"\1\2\3 no exif at all",
    }  # fmt: skip
    out |= {f"no-{name}": (encoded(WIDE, exif=HEAD + exif), 1) for name, exif in nothing.items()}
    out |= {f"no-xmp{n}": (encoded(WIDE, xmp=(XMP % n).encode()), 1) for n in (0, 9)}
    out["no-png"] = png(chunk(b"eXIf", b"garbage")), 1
    out["no-webp"] = encoded(WIDE, "WEBP", lossless=True, exif=b"garbage"), 1
    return out


PICTURES = pictures()


def upright(key: str) -> np.ndarray:
    """[height, width, 3]: the picture as it should be seen, by numpy alone."""
    data, orientation = PICTURES[key]
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}
    pixels = np.rot90(pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels, turns[orientation])
    return pixels


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    for key, (data, _) in PICTURES.items():
        (folder / f"{key}.jpg").write_bytes(data)
    (folder / "list.csv").write_text("path,Odd,split\n" + "".join(f"{k}.jpg,{n % 2},train\n" for n, k in enumerate(PICTURES)))
    return folder / "list.csv"


@pytest.fixture(scope="module", params=["full", "header"])
def split(request, source, tmp_path_factory) -> Split:
    warnings.simplefilter("ignore")  # Pillow's, about metadata that is damaged
    dataset = DATASETS["table"](source)
    dataset = replace(dataset, splits=["train"] * len(dataset))
    whole = prepare(dataset, tmp_path_factory.mktemp("turned") / "set", workers=1, check=request.param)
    assert verify(whole.path, workers=1).records == len(PICTURES)
    return whole.split("train")


def pixels(kind: str, split: Split, rule: Preprocessing, device: str = "cpu") -> dict[str, np.ndarray]:
    """Grey levels [S, S, 3] of each key."""
    loader = open_loader(kind, "none", split, split.attributes, rule, seed=0, threads=1, device=torch.device(device))
    parts = [batch.images.permute(0, 2, 3, 1).cpu().numpy() for batch in loader.batches(sequential(len(split), 8))]
    return dict(zip(split.keys.tolist(), (np.concatenate(parts) + 1) * 127.5))


def test_the_manifest_says_how_each_picture_is_stored_and_its_size_upright(split):
    for row, key in enumerate(split.keys.tolist()):
        assert split.orientation[row] == PICTURES[key][1], key
        assert (split.height[row], split.width[row]) == upright(key).shape[:2], key
        assert np.array_equal(np.asarray(split.picture(row)), upright(key)), key


@pytest.mark.parametrize("crop", ["center", "letterbox"])
def test_dali_shows_every_picture_as_pillow_shows_it(split, crop, caplog):
    for size in (32, 61):
        rule = Preprocessing(size, crop=crop)
        reference = pixels("pillow", split, rule)
        for key, found in pixels("dali", split, rule).items():
            error = np.abs(found - reference[key])
            assert error.mean() < 1 and np.quantile(error, 0.99) <= 3, (key, size, error.mean())
    assert "DALI gets it as a PNG" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["center", "letterbox"])
def test_a_gpu_shows_every_picture_as_pillow_shows_it(split, crop):
    rule = Preprocessing(61, crop=crop)
    reference = pixels("pillow", split, rule)
    for key, found in pixels("dali", split, rule, "cuda").items():
        assert np.abs(found - reference[key]).mean() < 2, key


def test_a_picture_that_dali_alone_refuses_is_no_case_for_quarantine(split, monkeypatch, caplog):
    monkeypatch.setattr(decoder, "_without_exif_of_webp", lambda data: data)
    rule = Preprocessing(32, crop="center")
    reference, found = pixels("pillow", split, rule), pixels("dali", split, rule)
    assert all(np.abs(found[key] - reference[key]).mean() < 1 for key in PICTURES)
    said = [record.message for record in caplog.records if "DALI gets it as a PNG" in record.message]
    assert said and all("Traceback" not in line and "/opt" not in line and len(line) < 400 for line in said)


def test_a_set_of_a_time_without_the_column_is_read_as_it_was(split, tmp_path):
    """Exif says how pictures are turned, each decoder reads it for itself."""
    whole = ShardSet.open(split.shards[0].parent)
    for path in whole.path.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    table = pq.read_table(tmp_path / "manifest.parquet")
    pq.write_table(table.drop_columns([ORIENTATION]), tmp_path / "manifest.parquet")
    manifest = {"file": "manifest.parquet", "size": (tmp_path / "manifest.parquet").stat().st_size}
    manifest["digest"] = digest_of(tmp_path / "manifest.parquet")
    write_json(tmp_path / "dataset.json", {**whole.info, "manifest": manifest})
    old = ShardSet.open(tmp_path)
    assert old.digest == whole.digest and verify(tmp_path, workers=1).records == len(PICTURES)
    part = old.split("train")
    assert part.orientation is None and part.digest == split.digest
    rule = Preprocessing(32, crop="center")
    reference, found = pixels("pillow", split, rule), pixels("pillow", part, rule)
    assert all(np.array_equal(found[key], reference[key]) for key in PICTURES)
    plain = [row for row, key in enumerate(part.keys) if key.startswith(("exif", "png"))]
    loader = open_loader("dali", "none", part, part.attributes, rule, seed=0, threads=1)
    (batch,) = loader.batches([Request("a", 0, np.array(plain))])
    for row, image in zip(plain, batch.images):
        assert np.abs((image.permute(1, 2, 0).numpy() + 1) * 127.5 - reference[part.keys[row]]).mean() < 1


@pytest.mark.parametrize("size", [2_000_000, 20_000_000])
@pytest.mark.parametrize("packed", [True, False])
def test_a_long_text_beside_a_sound_png_is_no_damage(size, packed):
    text = b"parameters\0" + (b"\0" + zlib.compress(b"x" * size) if packed else b"x" * size)
    data = png(chunk(b"zTXt" if packed else b"tEXt", text))
    assert check(data) == check(data, "header") == (90, 60, 1, "PNG") and decode(data).size == WIDE


def film(size: int) -> bytes:
    return b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(size)


@pytest.mark.parametrize("progressive", [True, False])
def test_what_stands_behind_a_picture_does_not_make_it_cut_short(progressive):
    thumbnail = encoded((30, 20))
    exif = HEAD + tiff(6) + thumbnail  # which has an end of its own
    for data in (encoded(WIDE, progressive=progressive), encoded(WIDE, exif=exif, progressive=progressive)):
        for tail in (b"", b"\0", film(50_000), b"\xff\xd8" + film(9)):
            assert check(data + tail, "header").format == "JPEG"
        for end in (2, 3, 40, 300):
            with pytest.raises(ValueError, match="cut short"):
                check(data[:-end], "header")
            if end > 2:
                with pytest.raises(ValueError):
                    check(data[:-end])
    assert check(png() + film(20_000), "header") == (90, 60, 1, "PNG")
    with pytest.raises(ValueError):
        check(png()[:-12], "header")
