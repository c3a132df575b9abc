"""The page in a real browser, Debian's chromium: what a person does, and what they see of it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fader.similarity import Similarity
from pipeline.app import server, session
from pipeline.app.shelf import Opened, Shelf
from pipeline.app.study import read_answers
from pipeline.faces.alignment import Face
from tests.page import painted, photo, serving
from tests.pipeline.app.test_shelf import spool, study  # noqa: F401
from tests.runs import FADER, make_run

RED, BLACK = (255, 0, 0), (0, 0, 0)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SHOWN = "document.getElementById('after').dataset.shown === document.getElementById('after').dataset.asked"
COLOUR = "[...document.getElementById('after').getContext('2d').getImageData(9, 9, 1, 1).data].slice(0, 3)"


def missing(reason: str) -> None:
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(f"REQUIRE_BROWSER is 1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        missing(f"playwright drives the browser: {error}")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        missing("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *FAKE_CAMERA], timeout=120_000)
        yield started
        started.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "runs" / "other", FADER)
    spool(run, *({"step": 100 * k, "metrics": {"autoencoder/mse": 1 / k, "latent/weight": k / 90}} for k in range(1, 90)))
    (run / "spool/pictures/sliders-000008900-ab.png").write_bytes(photo(BLACK))
    (run / "report").mkdir()
    (run / "report" / "report-test.html").write_text("<!doctype html><title>report</title><h1>It slides</h1>")
    with painted(folder) as model:
        yield server.Service(Shelf(Opened(model, model.editing), folder / "runs"), limits=server.Limits(upload_bytes=1_000_000))


@pytest.fixture(scope="module")
def address(service):
    with serving(service) as address:
        yield address


@contextlib.contextmanager
def visit(browser, address: str, fragment: str = "", quiet: bool = True, ready: str = ".slider", **options):
    """A person's browser on the page. quiet: nothing may be said on its console. ready: what to wait for."""
    context = browser.new_context(accept_downloads=True, **options)
    context.set_default_timeout(60_000)
    page, said = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://{address}/{fragment}")
    try:
        page.wait_for_selector(ready)
        yield page
    finally:
        context.close()
    assert not (quiet and said), said


@pytest.fixture
def page(browser, address):
    with visit(browser, address) as page:
        yield page


def until(page, expression: str) -> None:
    """Wait until an expression is true. Playwright's own way evaluates text inside the page, which our policy forbids."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}; the page says {page.inner_text('#message')!r}"
        time.sleep(0.02)


def give(page, data: bytes, name: str = "face.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("#save:enabled")
    until(page, SHOWN)


def drag(page, name: str, value: float) -> None:
    """Drag a slider's thumb with the mouse, in steps, from where it stands."""
    slider = page.get_by_label(name, exact=True)
    slider.scroll_into_view_if_needed()
    box, at = slider.bounding_box(), float(slider.input_value())
    start, end = (box["x"] + 8 + (box["width"] - 16) * (v + 2) / 4 for v in (at, value))
    middle = box["y"] + box["height"] / 2
    page.mouse.move(start, middle)
    page.mouse.down()
    page.mouse.move(end, middle, steps=12)
    page.mouse.up()
    until(page, SHOWN)
    assert abs(float(slider.input_value()) - value) < 0.15


def colour(page) -> list[int]:
    until(page, SHOWN)
    return page.evaluate(COLOUR)


def downloaded(page, button: str) -> Image.Image:
    with page.expect_download() as waiting:
        page.click(button)
    return Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes()))


def test_a_photo_two_sliders_and_a_saved_picture(page):
    give(page, photo(RED, (400, 300)), "red one.png")
    assert colour(page)[0] > 250 and page.get_by_label("Smiling", exact=True).input_value() == "1"
    drag(page, "Smiling", 0)
    drag(page, "Eyeglasses", 1)
    red, green, blue = colour(page)
    assert abs(red - 128) < 12 and green > 250 and blue < 5
    assert page.evaluate("document.getElementById('before').naturalWidth") == 32
    command = page.inner_text("#command")
    assert command.startswith("fader edit 'red one.png' --model ") and "--set Smiling=" in command and "Eyeglasses=" in command

    saved = downloaded(page, "#save")
    assert saved.size == (32, 32) and abs(saved.getpixel((9, 9))[0] - red) <= 3 and "Smiling=" in saved.text["Sliders"]
    whole = downloaded(page, "#paste")
    assert whole.size == (400, 300) and whole.getpixel((2, 2)) == RED and whole.getpixel((200, 150))[1] > 250

    page.click("#undo")
    assert colour(page)[1] < 5 and abs(colour(page)[0] - red) <= 3
    page.keyboard.press("Control+z")
    assert colour(page)[0] > 250
    drag(page, "Smiling", -1)
    page.click("#reset")
    assert colour(page)[0] > 250 and page.get_by_label("Smiling", exact=True).input_value() == "1"


def test_one_of_many_values_is_a_choice_with_strength(page):
    give(page, photo(BLACK))
    page.get_by_label("Beard", exact=True).select_option("full")
    assert colour(page)[2] > 250
    drag(page, "Strength of Beard", 0)
    assert abs(colour(page)[2] - 128) < 12
    page.get_by_label("Show steps of Beard").click()
    page.wait_for_selector("#strip:visible")
    until(page, "document.querySelector('#strip img').naturalWidth === 9 * 34 + 2")


def test_keys_move_sliders_and_each_control_has_a_name(page):
    give(page, photo(BLACK))
    slider = page.get_by_label("Eyeglasses", exact=True)
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "-0.5" and abs(colour(page)[1] - 64) < 6
    assert "1 is present" in slider.get_attribute("aria-valuetext")
    nameless = """[...document.querySelectorAll('input, button, select')].filter((e) => !e.getAttribute('aria-label')
        && !e.textContent.trim() && !e.labels?.length && !e.querySelector('img[alt]')).map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.get_by_label("How much of the picture").focus()
    page.keyboard.press("End")
    assert page.evaluate("document.getElementById('stage').style.getPropertyValue('--at')") == "100%"


def test_a_photo_also_comes_by_drop_by_clipboard_by_camera_or_is_drawn(page):
    hand = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'given.png', {type: 'image/png'}));
        const event = kind === 'drop' ? new DragEvent('drop', {dataTransfer: data, bubbles: true})
                                      : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
        document.body.dispatchEvent(event);
    }"""
    for kind, given in (("drop", RED), ("paste", BLACK)):
        page.evaluate(hand, [kind, list(photo(given))])
        until(page, f"document.getElementById('after').dataset.shown && {COLOUR}[0] === {given[0] and 254} && {SHOWN}")
    page.click("#camera")
    until(page, "document.querySelector('video').videoWidth > 0")
    page.click("#take")
    until(page, "document.getElementById('command').textContent.includes('camera.png')")
    page.click("#drawn")
    until(page, "document.getElementById('command').textContent.includes('drawn-face-')")


def test_the_cameras_picture_follows_the_sliders(page, monkeypatch):
    monkeypatch.setattr(session, "find", lambda photo, detector: [Face(Similarity(0.8, 100 + 20j))])
    give(page, photo(BLACK))
    page.click("#live")
    middle = "[...document.getElementById('after').getContext('2d').getImageData(160, 110, 1, 1).data].slice(0, 3)"
    until(page, f"document.getElementById('after').width === 320 && Math.max(...{middle}) < 6")
    page.get_by_label("Smiling", exact=True).fill("1")
    until(page, f"{middle}[0] > 250")
    assert "frames a second" in page.inner_text("#message")
    page.click("#live")
    until(page, f"document.getElementById('after').width === 32 && {COLOUR}[0] > 250")


def test_a_bad_upload_says_why_and_harms_nothing(page):
    give(page, photo(RED))
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"no picture at all"})
    page.wait_for_selector("#message.bad")
    assert "not a readable picture" in page.inner_text("#message")
    page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": bytes(1_100_000)})
    until(page, "document.getElementById('message').textContent.includes('1,100,000 bytes')")
    drag(page, "Smiling", -1)
    assert colour(page)[0] < 5, "the photo before is still there"


def test_two_people_do_not_see_each_others_photo(browser, address):
    with visit(browser, address) as one, visit(browser, address) as other:
        give(one, photo(RED))
        give(other, photo((0, 255, 0)))
        drag(one, "Eyeglasses", 0)
        assert abs(colour(one)[1] - 128) < 12 and colour(one)[0] > 250
        assert colour(other)[1] > 250 and colour(other)[0] < 5


@pytest.mark.parametrize("width", [320, 375, 768])
def test_the_page_fits_a_phone(browser, address, width):
    with visit(browser, address, viewport={"width": width, "height": 720}, has_touch=True, is_mobile=width < 700) as page:
        give(page, photo(RED))
        page.get_by_label("Show steps of Smiling").click()
        page.wait_for_selector("#strip:visible")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing stands out at the side"
        sides = page.evaluate("[...document.querySelectorAll('button, .button')].map((e) => e.getBoundingClientRect().right)")
        assert max(sides) <= width


def test_a_server_that_went_and_came_back_loses_nothing(browser, service):
    with contextlib.ExitStack() as life:
        address = life.enter_context(serving(service))
        with visit(browser, address, quiet=False) as page:  # a lost connection is said on the console
            give(page, photo(BLACK))
            drag(page, "Eyeglasses", 1)
            life.close()
            until(page, "document.getElementById('message').textContent.includes('server is gone')")
            with serving(service, int(address.rpartition(":")[2])):
                page.wait_for_selector("#save:enabled")
                assert colour(page)[1] > 250 and colour(page)[0] < 5


def test_the_address_with_its_token_opens_the_page(browser, service):
    guarded = server.Service(service.shelf, token="a b/c%")
    with serving(guarded) as address:
        with visit(browser, address, "#a%20b%2Fc%25") as page:
            give(page, photo(RED))
        with visit(browser, address, "#wrong", quiet=False, ready="#message.bad") as page:
            assert "token" in page.inner_text("#message") and not page.query_selector(".slider")


def test_a_picture_of_the_canvas_is_what_is_saved(page):
    give(page, photo(BLACK))
    drag(page, "Smiling", 0.5)
    shown = page.evaluate(COLOUR)
    assert np.abs(np.array(downloaded(page, "#save").getpixel((9, 9))) - shown).max() <= 3


def test_another_model_is_picked_and_its_training_watched(page, service):
    give(page, photo(RED))
    until(page, "document.getElementById('models').options.length === 2")
    other = f"{service.shelf.runs}/other"
    page.get_by_label("Model", exact=True).select_option(other)
    until(page, f"document.getElementById('about').textContent.startsWith({other!r}) && {SHOWN} && !document.getElementById('save').disabled")
    assert other in page.inner_text("#command"), "the photo went on to the other model"
    page.click("#watch")
    until(page, "document.querySelectorAll('#curves polyline').length === 2")
    assert "8,900 images seen" in page.inner_text("#state") and page.is_visible("#grid img")
    spool(service.shelf.runs / "other", {"step": 9000, "metrics": {"autoencoder/mse": 0.5}})
    until(page, "document.getElementById('state').textContent.includes('9,000')")
    with page.context.expect_page() as opening:
        page.click("#report")
    assert opening.value.inner_text("h1") == "It slides"


def test_a_picture_of_a_study_is_rated(browser, study):  # noqa: F811
    with serving(server.Service(Shelf(Opened(study.model, study.editing)), study=study)) as address:
        with visit(browser, address, ready="#answers:visible") as page:
            for natural, value, left in ((1, 0, 58), (0, 1, 57)):
                page.check(f"input[name=natural][value='{natural}']")
                page.check(f"input[name=value][value='{value}']")
                page.click("#answers button")
                until(page, f"document.getElementById('left').textContent.startsWith('{left} ')")
    rows = read_answers(study.answers)
    assert [(row["natural"], row["answer"]) for row in rows] == [("1", "0"), ("0", "1")]
