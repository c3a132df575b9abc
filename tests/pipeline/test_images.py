"""Decoding, crops, the one kernel each way, and the way to [-1, 1] and back."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import images
from pipeline.images import Preprocessing


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture, different in every corner and channel."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_celeba_crop_is_rows_20_to_minus_20_then_the_178_square():
    array = np.asarray(picture(178, 218))
    out = images.preprocess(Image.fromarray(array), Preprocessing(178))
    assert np.array_equal(out, array[20:-20])


def test_celeba_crop_refuses_another_size_and_names_it():
    with pytest.raises(ValueError, match="found 640x480.*crop: center"):
        Preprocessing(64).box(640, 480)
    with pytest.raises(ValueError, match="found 179x218"):
        Preprocessing(64).boxes(np.array([178, 179]), np.array([218, 218]))


def test_center_crop_is_the_largest_square_and_boxes_agree_with_box():
    rule = Preprocessing(64, crop="center")
    widths, heights = np.array([640, 480, 31, 178]), np.array([480, 640, 31, 218])
    boxes = rule.boxes(widths, heights)
    assert boxes.tolist() == [[80, 0, 560, 480], [0, 80, 480, 560], [0, 0, 31, 31], [0, 20, 178, 198]]
    assert [list(rule.box(w, h)) for w, h in zip(widths, heights)] == boxes.tolist()


def test_there_is_one_kernel_each_way():
    square = picture(100, 100)
    center = "center"
    assert np.array_equal(images.preprocess(square, Preprocessing(100, center)), np.asarray(square))
    up = square.resize((128, 128), Image.Resampling.LANCZOS)
    assert np.array_equal(images.preprocess(square, Preprocessing(128, center)), np.asarray(up))
    down = square.resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(images.preprocess(square, Preprocessing(64, center)), np.asarray(down))


def test_shrinking_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (128, 64)))
    out = images.preprocess(stripes.convert("RGB"), Preprocessing(32, "center"))
    assert abs(out.astype(float) - 127.5).max() < 12  # without antialiasing it would be 127.5


def test_pixels_outside_the_crop_leave_no_trace():
    array = np.asarray(picture(178, 218)).copy()
    before = images.preprocess(Image.fromarray(array), Preprocessing(64))
    array[:20], array[-20:] = 255, 0
    assert np.array_equal(images.preprocess(Image.fromarray(array), Preprocessing(64)), before)


def test_grey_preprocessing_has_one_channel():
    assert images.preprocess(picture(178, 218), Preprocessing(32, channels=1)).shape == (32, 32, 1)


@pytest.mark.parametrize(
    "options", [{"image_size": 0}, {"image_size": 64, "crop": "middle"}, {"image_size": 64, "channels": 2}]
)
def test_impossible_preprocessing_is_refused(options):
    with pytest.raises(ValueError):
        Preprocessing(**options)


def test_floats_run_from_minus_one_to_one_and_every_grey_level_returns():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    floats = images.to_float(levels)
    assert floats.shape == (1, 3, 16, 16) and floats.dtype == torch.float32
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(images.to_uint8(floats), levels)
    assert torch.equal(images.to_float(levels.permute(0, 3, 1, 2)), floats)
    assert images.to_uint8(torch.full((1, 3, 2, 2), 7.0)).unique().tolist() == [255]


def test_flip_mirrors_left_to_right_and_only_where_told():
    batch = torch.arange(2 * 3 * 2 * 4).float().view(2, 3, 2, 4)
    out = images.flip(batch, torch.tensor([True, False]))
    assert torch.equal(out[0], batch[0].flip(2)) and torch.equal(out[1], batch[1])


def test_grid_places_rows_and_columns():
    cells = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 0.5, 1.0, -0.5, 0.25)]).view(2, 3, 3, 4, 4)
    out = images.grid(cells, gap=1)
    assert out.shape == (11, 16, 3)
    assert (out[1, 1, 0], out[1, 6, 0], out[6, 1, 0]) == (0, 128, 255) and (out[0] == 255).all()
    assert np.array_equal(np.asarray(images.decode(images.png_bytes(out))), out)


def test_decode_makes_rgb_of_grey_cmyk_palette_and_alpha():
    base = picture(40, 30)
    for mode, kind in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "WEBP")):
        image = images.decode(encoded(base.convert(mode), kind))
        assert image.mode == "RGB" and image.size == (40, 30), mode


def test_decode_turns_a_photo_upright_and_check_knows_the_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(40, 30), exif=exif.tobytes())
    assert images.decode(data).size == (30, 40)
    assert images.check(data) == (30, 40, 6, "JPEG")


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"\xff\xd8\xff", encoded(picture(64, 64))[:-200], encoded(picture(64, 64), "PNG")[:300]],
)
def test_bytes_that_are_no_whole_picture_are_refused(data):
    for read in (images.decode, images.check):
        with pytest.raises(ValueError, match="not a readable picture"):
            read(data)


def test_a_picture_that_declares_giant_sizes_is_refused():
    bomb = bytearray(encoded(picture(16, 16)))
    place = bomb.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = b"\xff\xff\xff\xff"
    for read in (images.decode, images.check):
        with pytest.raises(ValueError, match="not a readable picture"):
            read(bytes(bomb))


def test_check_gives_the_verdict_of_a_full_decode_on_damaged_jpegs():
    """`check` spares the inverse transform; on thousands of damaged files that never changes what it says."""
    chance = random.Random(7)
    kinds = [encoded(picture(90, 110, s), quality=80, progressive=s % 2 == 1, subsampling=s % 3) for s in range(6)]
    refused = 0
    for _ in range(3000):
        data = bytearray(chance.choice(kinds))
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        verdicts = []
        for read in (images.check, images.decode):
            try:
                read(bytes(data))
                verdicts.append(True)
            except ValueError:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1]
        refused += not verdicts[0]
    assert 300 < refused < 2700


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_look_at_the_header_finds_what_is_cut_short(kind):
    out = io.BytesIO()
    Image.effect_noise((90, 70), 60).convert("RGB").save(out, kind)
    data = out.getvalue()
    assert images.check(data, "header") == images.check(data) == (90, 70, 1, kind)
    assert images.check(data + bytes(99 if kind == "JPEG" else 0), "header") == (90, 70, 1, kind)
    for part in (data[: len(data) // 2], data[:-20]):
        with pytest.raises(ValueError, match="cut short|not a readable picture"):
            images.check(part, "header")


def test_a_comment_that_looks_like_the_beginning_of_the_pixels_does_not_end_the_header():
    for size in ((90, 70), (70, 90)):
        out = io.BytesIO()
        Image.new("RGB", size).save(out, "JPEG", comment=b"\xff\xda and so on")
        assert images.check(out.getvalue(), "header") == (*size, 1, "JPEG")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"a word"}, {"turned": 6}, {"turned": 3}], ids=str)
def test_the_header_alone_gives_the_size_that_decoding_gives(mode, options):
    picture, out = Image.effect_noise((90, 70), 60).convert(mode), io.BytesIO()
    exif = Image.Exif()
    if "turned" in options:
        exif[0x0112] = options["turned"]
    picture.save(out, "JPEG", exif=exif, **{key: value for key, value in options.items() if key != "turned"})
    found = images.check(out.getvalue(), "header")
    assert found == images.check(out.getvalue()) and found[:2] == images.decode(out.getvalue()).size


def test_only_decoding_finds_damage_inside():
    out = io.BytesIO()
    Image.effect_noise((90, 70), 60).save(out, "JPEG")
    data = bytearray(out.getvalue())
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = bytes([255] * 16)  # more codes than there can be
    assert images.check(bytes(data), "header") == (90, 70, 1, "JPEG")
    with pytest.raises(ValueError):
        images.check(bytes(data))
