"""A served model answers curl: pictures of any size as base64, arrays, seeds; a wrong request gets 400 and one clear line."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import models
from pipeline.images import decode, preprocess, to_float
from pipeline.models.serving import answer
from tests.commands import environment, free_port
from tests.runs import FADER, JUDGE, make_run, make_store, painter

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where MLflow looks for uvicorn and uv
GREY, RED = (128, 128, 128), (255, 0, 0)


def base64_picture(size: tuple[int, int], colour: tuple[int, int, int], kind: str = "PNG") -> str:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return base64.b64encode(out.getvalue()).decode()


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def image(text: str, model: models.Model) -> torch.Tensor:
    """A base64 picture as the model reads it: [1, C, S, S]."""
    return to_float(torch.from_numpy(preprocess(decode(base64.b64decode(text)), model.preprocessing)[None].copy()))


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    with painter() as method:
        make_run(tmp_path / "judge", method)
        yield models.load(make_run(tmp_path / "painter", method, judge=str(tmp_path / "judge")))


def test_pictures_of_any_size_go_in_and_pngs_come_out(model):
    texts = [base64_picture((300, 200), RED), "data:image/jpeg;base64," + base64_picture((40, 640), (0, 0, 0), "JPEG")]
    edited = answer(model, texts, {"sliders": '{"Eyeglasses": 1}'})
    assert [pixels(text).shape for text in edited] == [(32, 32, 3), (32, 32, 3)]
    assert [pixels(text)[5, 5].tolist() for text in edited] == [[255, 255, 0], [0, 255, 0]]
    tensors = answer(model, np.array(texts), {"sliders": '{"Eyeglasses": 1}', "format": "tensor"})
    assert tensors.shape == (2, 3, 32, 32) and tensors[1, :, 0, 0].tolist() == [-1, 1, -1]
    assert pixels(answer(model, tensors, {"format": "png"})[0])[5, 5].tolist() == [255, 255, 0]


def test_a_judge_reads_pictures_too(tmp_path):
    judge = models.load(make_run(tmp_path / "judge", JUDGE))
    text = base64_picture((178, 218), RED)
    want = judge.judging.answer(image(text, judge), {})
    np.testing.assert_allclose(answer(judge, [text], {}), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "params", "line"),
    [
        (["no base64!"], {}, "picture 1 is not base64"),
        ([base64.b64encode(b"text").decode()], {}, "picture 1: not a readable picture (4 bytes)"),
        (np.zeros((1, 3, 32, 31)), {}, "takes float32 [N, 3, 32, 32] or base64 PNG or JPEG pictures, not [1, 3, 32, 31]"),
        ([[1, 2], [3]], {}, "what came is no such array"),
        (np.zeros((0, 3, 32, 32)), {}, "takes 1 to 4,096 rows at once, not 0"),
        (np.zeros((1, 3, 32, 32)), {"sliders": '{"Smilling": 1}'}, "unknown attribute 'Smilling'; did you mean 'Smiling'?"),
        (np.zeros((1, 3, 32, 32)), {"sliders": '{"Smiling": null}'}, "Smiling=None: not a number"),
        (np.zeros((1, 3, 32, 32)), {"sliders": "[1]"}, "sliders is '[1]'; a JSON object is needed"),
        (np.zeros((1, 3, 32, 32)), {"attributes": '{"Smiling": 2}'}, "Smiling=2: Smiling is 0 or 1"),
        (np.zeros((1, 3, 32, 32)), {"format": "gif"}, "format is 'gif'; it is png or tensor"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(model, data, params, line):
    with pytest.raises(ValueError, match=".") as refused:
        answer(model, data, params)
    assert line in str(refused.value) and "\n" not in str(refused.value)


# --- a served process -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A Fader network with its judge, registered as `faces`: (the run, the store's address)."""
    folder = tmp_path_factory.mktemp("served")
    make_run(folder / "judge", JUDGE)
    run, store = make_run(folder / "faces", FADER, judge=str(folder / "judge")), make_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.chdir(folder)
        models.register(run, "faces")
    return run, store


@contextlib.contextmanager
def serving(folder: Path, store: str, manager: str, seconds: float = 180, port: int = 0, **extra: str):
    """`mlflow models serve` of that model; gives what posts a request, with the server's process and port."""
    port = port or free_port()
    line = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/faces@challenger", "--port", str(port)]
    env = environment(MLFLOW_TRACKING_URI=store, MLFLOW_DISABLE_TELEMETRY="true", PATH=PATH, **extra)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*line, "--env-manager", manager], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, server, folder / "log", seconds)
        post = partial(_post, f"{address}/invocations")
        post.server, post.port = server, port
        yield post
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def served(registered, tmp_path_factory):
    """(The run, what posts a request to the served model.)"""
    run, store = registered
    with serving(tmp_path_factory.mktemp("server"), store, "local") as post:
        yield run, post


def _wait(address: str, server: subprocess.Popen, log: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not answer:\n{log.read_text()}")


def _post(address: str, body: object) -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_served_model_edits_as_the_run_does(served):
    run, post = served
    model = models.load(run)
    text, params = base64_picture((178, 218), RED), {"sliders": '{"Smiling": 1.5, "Beard": "full"}'}
    images = image(text, model)
    editing = model.editing
    sliders = [editing.slider("Smiling", 1.5), editing.slider("Beard", "full")]
    want = editing.edit(images, editing.labels(images)[0], [sliders])[0, 0].numpy()
    for body in ({"inputs": [text]}, {"dataframe_records": [{"image": text}]}):
        status, said = post(body | {"params": params})
        assert status == 200, said
        edited = np.asarray(pixels(said["predictions"][0])).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(edited, want, atol=0.5 / 127.5 + 1e-6)
    status, said = post({"inputs": images.tolist(), "params": params})
    assert status == 200
    np.testing.assert_allclose(said["predictions"][0], want, atol=1e-5)


def bomb() -> str:
    """A PNG of 69 bytes that declares 10,000 x 10,000 pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    head = (10_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def test_a_wrong_request_gets_400_and_one_clear_line_without_a_stack(served):
    _, post = served
    face = base64_picture((178, 218), GREY)
    for body, line in [
        ({"inputs": ["no base64!"]}, "picture 1 is not base64: "),
        ({"inputs": [face, base64.b64encode(b"x" * 90_000).decode()]}, "picture 2: not a readable picture (90,000 bytes)"),
        ({"inputs": [bomb()]}, "declares 10000x10000 pixels, more than the 89,478,485 allowed"),
        ({"inputs": [[[[0.0]]]]}, "takes float32 [N, 3, 32, 32] or base64 PNG or JPEG pictures, not [1, 1, 1, 1]"),
        ({"inputs": [face], "params": {"sliders": '{"Smilling": 1}'}}, "unknown attribute 'Smilling'; did you mean 'Smiling'?"),
        ({"inputs": [face], "params": {"sliders": '{"Smiling": "much"}'}}, "Smiling=much: not a number; -1 is absent"),
        ({"inputs": [face], "params": {"sliders": "{"}}, "sliders is '{'; a JSON object is needed"),
    ]:
        status, said = post(body)
        assert status == 400 and line in said["message"], said
        assert "\n" not in said["message"] and len(said["message"]) < 200 and "Traceback" not in json.dumps(said)
    for body in (b"{", b"[]", b"\xff", b"{}"):
        status, said = post(body)
        assert status == 400 and "Traceback" not in json.dumps(said)
    assert post({"inputs": [face]})[0] == 200, "it goes on answering"


def test_fifty_people_at_once_and_a_thousand_malformed_requests(served):
    """Each gets the picture that is theirs; nobody's error is another's."""
    run, post = served
    model, chance = models.load(run), random.Random(0)
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        texts = [base64_picture((40, 40), (5 * number, 255 - 5 * number, 90)) for number in range(50)]
        alone = [answer(model, [text], {"sliders": '{"Smiling": 1}'})[0] for text in texts]
        for text, (status, said) in zip(alone, pool.map(post, [{"inputs": [t], "params": {"sliders": '{"Smiling": 1}'}} for t in texts])):
            assert status == 200 and np.abs(pixels(said["predictions"][0]).astype(int) - pixels(text)).max() <= 1
        bodies = [chance.randbytes(chance.randrange(1, 200)) if k % 2 else {"inputs": [chance.randrange(9)]} for k in range(1000)]
        for status, said in pool.map(post, bodies):
            assert status == 400 and "Traceback" not in json.dumps(said)
    assert post({"inputs": [texts[0]]})[0] == 200


def test_a_killed_server_gives_no_wrong_answer_and_comes_back(served, registered, tmp_path):
    """The last that `served` is asked: whoever waits is told that the connection broke, or has the right picture."""
    run, post = served
    texts = [base64_picture((40, 40), (20 * number, 90, 255 - 20 * number)) for number in range(8)]
    model, bodies = models.load(run), [{"inputs": [text]} for text in texts]
    alone = [pixels(answer(model, [text], {})[0]).astype(int) for text in texts]

    def right(number: int, said: dict) -> bool:
        return np.abs(pixels(said["predictions"][0]) - alone[number]).max() <= 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert post(bodies[0])[0] == 200
        waiting = [pool.submit(post, bodies[number % 8]) for number in range(64)]
        next(concurrent.futures.as_completed(waiting)).result()
        os.killpg(post.server.pid, signal.SIGKILL)
        broken = 0
        for number, asked in enumerate(waiting):
            try:
                status, said = asked.result()
                assert status == 200 and right(number % 8, said)
            except (OSError, http.client.HTTPException):
                broken += 1
    assert broken, "the kill came too late to break a request"
    post.server.wait()
    with serving(tmp_path, registered[1], "local", port=post.port) as again:
        assert all(right(number, again(body)[1]) for number, body in enumerate(bodies))


@pytest.mark.skipif("FADER_TEST_NETWORK" not in os.environ, reason="downloads torch; FADER_TEST_NETWORK=1 runs it")
def test_it_answers_in_a_fresh_environment_that_holds_its_requirements_only(registered, tmp_path):
    """uv makes the environment; of this project there is nothing in it but the code that travels with the model."""
    _, store = registered
    links = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    own = {"MLFLOW_ENV_ROOT": str(tmp_path / "envs"), "PYTHONPATH": "", **links}
    with serving(tmp_path, store, "uv", 1200, **own) as post:
        status, said = post({"inputs": [base64_picture((300, 200), RED)], "params": {"sliders": '{"Smiling": 1.5}'}})
    assert status == 200 and pixels(said["predictions"][0]).shape == (32, 32, 3)
    assert not list((tmp_path / "envs").rglob("accelerate"))
