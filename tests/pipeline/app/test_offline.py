"""The page as a folder of files, in a real browser with onnxruntime-web, where ONNXRUNTIME_WEB names its dist folder."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.app.offline import RUNTIME, export_page
from pipeline.images import decode, preprocess, to_float
from tests.page import photo
from tests.pipeline.app.test_browser import SHOWN, browser, downloaded, give, until, visit  # noqa: F401
from tests.runs import FADER, make_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    model = models.load(make_run(folder / "run", FADER))
    export_page(model, folder / "page")
    return model, folder / "page"


def test_the_folder_holds_the_page_and_names_nothing_elsewhere(exported):
    _, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {"encoder.onnx", "decoder.onnx", "card.json", "index.html", "page.css", "page.js", "local.js"}
    page = (folder / "index.html").read_text()
    assert 'src="/' not in page and 'href="/' not in page and "http" not in page
    assert page.index(RUNTIME) < page.index("local.js") < page.index("page.js")


@contextlib.contextmanager
def files(folder: Path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *given: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif("ONNXRUNTIME_WEB" not in os.environ, reason="ONNXRUNTIME_WEB names no folder of onnxruntime-web (npm)")
def test_sliders_move_without_a_server(exported, browser):  # noqa: F811
    model, folder = exported
    for path in Path(os.environ["ONNXRUNTIME_WEB"]).iterdir():
        if path.name == RUNTIME or path.name.startswith("ort-wasm"):
            shutil.copy(path, folder)
    given = photo((200, 30, 90), (32, 32))
    pixels = preprocess(decode(given), model.preprocessing.fitting(32, 32))
    images, editing = to_float(torch.from_numpy(pixels[None].copy())), model.editing
    labels, _ = editing.labels(images)
    latent = editing.encode(images, labels)
    with files(folder) as address, visit(browser, address) as page:
        give(page, given)
        assert not page.is_visible("#live") and "no server sees it" in page.inner_text("footer")
        for name, value in (("Smiling", 1.5), ("Beard", 2)):
            if name == "Beard":
                page.get_by_label(name, exact=True).select_option("full")
                page.get_by_label("Strength of Beard", exact=True).fill("2")
            else:
                page.get_by_label(name, exact=True).fill(str(value))
            page.get_by_label(name, exact=True).dispatch_event("change")
            until(page, SHOWN)
        sliders = [editing.slider("Smiling", 1.5), editing.slider("Beard.full", 1)]
        wanted = ((editing.decode(latent, labels, sliders)[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
        saved = np.asarray(downloaded(page, "#save").convert("RGB"))
        assert np.abs(saved - wanted).max() <= 2, (labels, page.inner_text("#command"))
        page.get_by_label("Show steps of Smiling").click()
        page.wait_for_selector("#strip:visible")
        until(page, "document.querySelector('#strip img').naturalWidth === 9 * 32")
