"""The server behind the page: whose pictures go where, and what is refused."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from fader.similarity import Similarity
from pipeline import models
from pipeline.app import server, session
from pipeline.app.shelf import Opened, Shelf
from pipeline.faces import photos
from pipeline.faces.alignment import Face
from pipeline.images import to_uint8
from tests.page import painted, person, photo, pixels, serving
from tests.runs import make_run
from tests.shams import Drawing, registered

LIMITS = server.Limits(upload_bytes=200_000, pixels=1_000_000, idle_seconds=30)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with painted(tmp_path_factory.mktemp("page")) as model:
        yield server.Service(Shelf(Opened(model, model.editing)), limits=LIMITS)


@pytest.fixture(scope="module")
def address(service):
    with serving(service) as address:
        yield address


def near(picture: np.ndarray, *colour: int) -> bool:
    return np.abs(picture.reshape(-1, 3).astype(int) - colour).max() <= 3  # a move travels as JPEG


def test_a_photo_goes_in_and_each_move_brings_its_picture(address):
    with person(address) as one:
        assert [a["name"] for a in one.model["attributes"]] == ["Smiling", "Eyeglasses", "Beard"]
        face = one.give(photo((255, 0, 0)))
        assert face["labels"] == [1, 0, 0] and set(face["origins"].values()) == {"judge"}
        assert near(one.move(), 255, 0, 0), "unmoved it is the reconstruction"
        assert near(one.move(2, Smiling=0, Eyeglasses=1), 128, 255, 0)
        assert near(one.move(3, **{"Beard.full": 0.5}), 255, 0, 191)
        head, row = one.ask({"kind": "strip", "slider": "Smiling", "sliders": {"Eyeglasses": 1}})
        assert head == {"kind": "strip", "slider": "Smiling", "steps": [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]}
        assert pixels(row)[18, 18::34].tolist() == [[r, 255, 0] for r in (0, 0, 0, 64, 128, 191, 255, 255, 255)]


def test_what_is_saved_is_exact_and_says_of_which_sliders_it_is(address):
    with person(address) as one:
        one.give(photo((0, 0, 0), (400, 300)), "my face.jpg")
        sliders = {"Smiling": 0.5, "Beard.full": 1}
        head, picture = one.ask({"kind": "save", "pasted": False, "sliders": sliders})
        image = Image.open(io.BytesIO(picture))
        assert head["name"] == "my face-edited.png" and image.format == "PNG"
        assert image.text["Sliders"] == "Smiling=0.5 Beard.full=1" and image.text["Model"].endswith("painter")
        assert (pixels(picture) == (191, 0, 255)).all()
        head, picture = one.ask({"kind": "save", "pasted": True, "sliders": sliders})
        whole = pixels(picture)
        assert head["name"] == "my face-pasted.png" and whole.shape == (300, 400, 3)
        assert (whole[150, 200] == (191, 0, 255)).all() and not whole[:, :49].any(), "only the square changes"


def test_a_drawn_face_is_there_to_begin_with(address):
    with person(address) as one:
        faces = [one.ask({"kind": "drawn", "number": number})[0] for number in (3, 4)]
        assert faces[0]["name"] == "drawn-face-3.png" and faces[0]["faces"] != faces[1]["faces"]
        assert one.move().shape == (32, 32, 3)


def test_a_sampler_makes_faces_of_seeds_and_slides_them(tmp_path):
    with registered(Drawing):
        model = models.load(make_run(tmp_path / "drawing", {"name": "sham_drawing"}))
        with serving(server.Service(Shelf(Opened(model, model.sampling)), limits=LIMITS)) as address, person(address) as one:
            assert one.model["edits"] is False
            assert "takes no photo" in one.give(photo())["text"]
            face = one.ask({"kind": "drawn", "number": 7})[0]
            seeds, given = torch.tensor([7]), dict(zip(model.attributes.names, face["labels"]))
            assert set(face["origins"].values()) == {"drawn"} and given["Beard"] in (0, 1, 2)
            before = pixels(base64.b64decode(face["faces"][0].partition(",")[2]))
            assert (before == to_uint8(model.sampling.sample(seeds, given))[0].numpy()).all()
            assert face["command"].endswith("--seed 7 --count 1") and face["idle"] == ""
            for moves in ({"Smiling": 0.5, "Eyeglasses": -1, "Beard.full": 1}, {"Smiling": 1, "Eyeglasses": 1, "Beard.none": 2}):
                wanted = model.sampling.sample(seeds, sliders=[model.sampling.slider(*move) for move in moves.items()])
                saved = pixels(one.ask({"kind": "save", "pasted": False, "sliders": moves})[1])
                assert (saved == to_uint8(wanted)[0].numpy()).all() and near(one.move(**moves), *saved[0, 0])


def test_the_face_in_a_cameras_frame_is_edited_and_pasted_back(address, monkeypatch):
    faces: list[Face] = []
    monkeypatch.setattr(session, "find", lambda photo, detector: faces)
    frame, sliders = photo((9, 9, 9), (320, 240), "JPEG"), {"Smiling": 1.0, "Eyeglasses": 1.0, "Beard.full": -1.0}
    with person(address) as one:
        assert "there is no photo yet" in one.ask({"kind": "live", "sliders": sliders}, frame)[0]["text"]
        one.give(photo())
        head, picture = one.ask({"kind": "live", "sliders": sliders}, frame)
        assert head == {"kind": "live"} and near(pixels(picture), 9, 9, 9), "without a face it is the frame"
        faces.append(Face(Similarity(0.8, 100 + 20j)))
        picture = pixels(one.ask({"kind": "live", "sliders": sliders}, frame)[1])
        assert picture.shape == (240, 320, 3) and near(picture[105:110, 168:173], 255, 255, 0) and near(picture[:, :90], 9, 9, 9)
        assert "more than the 1,000,000 allowed" in one.ask({"kind": "live", "sliders": {}}, photo(size=(1001, 1000)))[0]["text"]


def test_one_of_several_faces_is_chosen(address, monkeypatch):
    places = [Face(Similarity(1, 0j)), Face(Similarity(1, 200 + 0j), sure=False)]
    monkeypatch.setattr(photos, "find", lambda *given: places)
    both = np.zeros((218, 378, 3), np.uint8)
    both[:, 200:, 0] = 255
    out = io.BytesIO()
    Image.fromarray(both).save(out, "PNG")
    with person(address) as one:
        face = one.give(out.getvalue(), align=True)
        assert len(face["faces"]) == 2 and face["chosen"] == 0 and face["labels"][0] == 0
        assert face["command"].endswith("--align auto")
        other = one.ask({"kind": "choose", "face": 1})[0]
        assert other["labels"][0] == 1 and other["command"].endswith("--align auto --face 2")
        whole = pixels(one.ask({"kind": "save", "pasted": True, "sliders": {"Eyeglasses": 1}})[1])
        assert (whole[110, 290] == (255, 255, 0)).all() and not whole[:, :200].any()
        assert "there is no number 3" in one.ask({"kind": "choose", "face": 2})[0]["text"]


def test_a_photo_without_a_face_is_shown_whole_and_says_so(address):
    with person(address) as one:
        face = one.give(photo((255, 0, 0), (300, 300)), align=True)
        assert "no face found" in face["notes"][0] and "whole photo" in face["notes"][0]
        assert "--align" not in face["command"]


def test_the_newest_move_wins_and_none_queue(address, monkeypatch):
    started, free, decoded = threading.Event(), threading.Event(), []
    shown = session.Session.shown

    def slow(self, sliders):
        decoded.append(sliders["Smiling"])
        started.set()
        assert free.wait(60)
        return shown(self, sliders)

    with person(address) as one:
        one.give(photo())
        monkeypatch.setattr(session.Session, "shown", slow)
        for number in range(50):
            one.say({"kind": "move", "number": number, "sliders": {"Smiling": number / 50}})
            assert started.wait(60)
        assert "there is no number" in one.ask({"kind": "choose", "face": 9})[0]["text"], "all of them are read by now"
        free.set()
        heads = [one.hear()[0]["number"] for _ in range(2)]
    assert heads == [0, 49] and decoded == [0, 0.98]


def bomb() -> bytes:
    """A small PNG that declares 50,000 x 50,000 pixels."""
    head = (50_000).to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        made += len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    return made


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a readable picture"),
        (b"\x00" * 1000, "no known picture format"),
        (b"<svg onload='alert(1)'></svg>", "no known picture format"),
        (photo(kind="JPEG")[:-300], "not a readable picture"),
        (bomb(), "2500000000 pixels"),
        (photo(size=(1001, 1000)), "1001x1000 pixels, more than the 1,000,000 allowed"),
    ],
)
def test_what_is_no_photo_is_refused_in_one_line_and_the_photo_before_stays(address, data, match):
    with person(address) as one:
        one.give(photo((255, 0, 0)))
        answer = one.give(data)
        assert answer["kind"] == "error" and match in answer["text"] and "\n" not in answer["text"]
        assert near(one.move(), 255, 0, 0)


def test_an_upload_above_the_limit_ends_the_connection(address):
    with person(address) as one, pytest.raises(ConnectionClosed, match="1009"):
        one.say({"kind": "photo", "name": "a.png", "align": False}, bytes(LIMITS.upload_bytes + 10_000))
        one.hear()


def test_a_thousand_malformed_messages_get_an_error_each_and_harm_nobody(address):
    chance = random.Random(0)
    plain = [
        "", "null", "[]", "{}", '{"kind": "move"}', '{"kind": "quit"}', '{"kind": "choose", "face": -1}', "{" * 2000,
        '{"kind": "move", "number": 1, "sliders": {"Smilling": 1}}', '{"kind": "move", "number": "1", "sliders": {}}',
        '{"kind": "move", "number": 1, "sliders": {"Smiling": NaN}}', '{"kind": "move", "number": 1, "sliders": {"Beard": 1}}',
        '{"kind": "move", "number": 1, "sliders": {"Smiling": "1"}}', '{"kind": "move", "number": 1, "sliders": {"Beard.x": 1}}',
        '{"kind": "strip", "slider": "x", "sliders": {}}', '{"kind": "save", "pasted": 1, "sliders": {}}',
        '{"kind": "drawn", "number": 1e9}', '{"kind": "photo", "name": "../../etc/passwd", "align": false}',
    ]  # fmt: skip
    with person(address) as one, person(address) as other:
        other.give(photo((0, 255, 0)))
        one.give(photo((255, 0, 0)))
        for number in range(1000):
            one.socket.send(chance.choice(plain) if number % 2 else chance.randbytes(chance.randrange(300)))
            head, _ = one.hear()
            assert head["kind"] == "error" and head["text"], head
        assert near(one.move(), 255, 0, 0) and near(other.move(), 0, 255, 0)


def test_fifty_people_at_once_each_get_their_own_photo(address):
    barrier = threading.Barrier(50)

    def visit(number: int) -> bool:
        colour = tuple(255 * (number >> bit & 1) for bit in (0, 1))
        with person(address) as one:
            barrier.wait(120)
            face = one.give(photo((*colour, 0)), f"{number}.png")
            picture = one.move(number, **{"Beard.full": number / 25 - 1})
        return face["name"] == f"{number}.png" and near(picture, *colour, round(255 * number / 50))

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(visit, range(50)))


def test_only_our_own_page_may_speak(address, service):
    port = address.rpartition(":")[2]
    for origin in (None, "null", "http://evil.example", f"http://evil.example:{port}", "http://127.0.0.1:1", f"file://{address}"):
        with pytest.raises(InvalidStatus, match="403"), person(address, origin):
            pass
    for host, allowed in (("127.0.0.1:7860", True), ("localhost:7860", True), ("[::1]:7860", True), ("evil.example", False)):
        headers = {"host": host, "origin": f"http://{host}"}
        assert service.admits(headers, None) == allowed, f"{host}: a name that was made to lead here"
        guarded = dataclasses.replace(service, token="secret")
        assert guarded.admits(headers, "secret") and not guarded.admits(headers, "Secret") and not guarded.admits(headers, None)


def test_the_files_are_served_and_nothing_else(address):
    for path, (_, kind) in server.FILES.items():
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as got:
            assert got.headers["Content-Type"] == kind and "default-src 'none'" in got.headers["Content-Security-Policy"]
    for path in ("/docs", "/openapi.json", "/page/index.html", "/../setup.cfg", "/%2e%2e/setup.cfg", "/page.js/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{address}{path}", timeout=60)


def test_who_is_idle_is_let_go_and_who_comes_too_late_is_told(service):
    few = dataclasses.replace(service, limits=dataclasses.replace(LIMITS, sessions=1, idle_seconds=2.0))
    with serving(few) as address:
        with person(address) as one:
            with pytest.raises(ConnectionClosed, match="1 people are here already"), person(address):
                pass
            with pytest.raises(ConnectionClosed, match="nothing moved"):
                one.hear()
        until = time.monotonic() + 60
        while few.people and time.monotonic() < until:
            time.sleep(0.05)
        with person(address):
            pass


def test_no_photo_touches_a_disk(address):
    written, watching = [], True

    def hook(event: str, args: tuple) -> None:
        if watching and event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(args[0])

    sys.addaudithook(hook)  # it stays to the end of this process, and sees nothing once `watching` is False
    with person(address) as one:
        one.give(photo((255, 0, 0), (500, 400)), align=True)
        one.move(Smiling=1)
        one.ask({"kind": "save", "pasted": True, "sliders": {}})
    with open(os.devnull, "w"):
        pass
    watching = False
    assert written == [os.devnull], "only what the test itself opened"
