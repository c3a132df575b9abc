"""How long a move takes to show in a browser: `python -m tests.latency`, on a machine that does nothing else.

For each size an untrained network is served from this process, and a slider is dragged for ten seconds in chromium. A
move takes from its input event to the frame after its picture was drawn; moves that a newer one overtook are not shown. On
a shared machine other guests take processor time away, and each row says how much. At 64 pixels a camera's picture
follows the slider, too: chromium films a drawn face that walks to and fro in 320 by 240 pixels.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from fader.attributes import Attribute, Attributes
from pipeline import models
from pipeline.app import server, session
from pipeline.app.shelf import Opened, Shelf
from pipeline.data.datasets.faces import draw_face
from pipeline.models.onnx import faster
from tests.page import serving
from tests.runs import make_run

ATTRIBUTES = Attributes([Attribute(name) for name in ("Smiling", "Male", "Young", "Eyeglasses")])
NETWORKS = (("small", 64), ("official", 256))
SECONDS, EVENT = 10, 0.016
CAMERA, FILM = ("--no-sandbox", "--use-fake-device-for-media-stream"), "--use-file-for-fake-video-capture="
CLOCK = """() => {
    const after = document.getElementById('after'), sent = new Map();
    window.took = [];
    document.getElementById('slider-0').addEventListener('input', () => sent.set(after.dataset.asked, performance.now()));
    const seen = () => {
        const began = sent.get(after.dataset.shown);
        if (began !== undefined) window.took.push(performance.now() - began);
    };
    new MutationObserver(() => requestAnimationFrame(seen)).observe(after, {attributeFilter: ['data-shown']});
}"""


def dragged(page) -> list[float]:
    """Drag the first slider to and fro; return what each picture took, in milliseconds."""
    page.evaluate(CLOCK)
    box = page.locator("#slider-0").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 4, middle)
    page.mouse.down()
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        count += 1
        share = 0.05 + 0.9 * abs((count % 120) / 60 - 1)
        page.mouse.move(box["x"] + box["width"] * share, middle)
        time.sleep(EVENT)
    page.mouse.up()
    time.sleep(1)
    return sorted(page.evaluate("window.took"))


def processor() -> tuple[int, int]:
    """Return the ticks of processor time that were taken by other guests of this machine, and all, since it started."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[7], sum(ticks)


def film(path: Path) -> Path:
    """Write what chromium takes for a camera: MJPEG of 30 frames a second, begun anew at its end."""
    face = draw_face(0, 0).resize((120, 147))
    with path.open("wb") as file:
        for number in range(120):
            frame = Image.new("RGB", (320, 240), (90, 120, 90))
            frame.paste(face, (40 + abs(number % 120 - 60) * 2, 50))
            frame.save(file, "JPEG", quality=90)
    return path


def followed(page, found: list[bool]) -> str:
    """Let the camera's picture follow the slider for ten seconds; return in words what was shown."""
    page.evaluate("() => { const shows = paint; window.painted = 0; paint = (picture) => { window.painted += 1; shows(picture); }; }")
    page.click("#live")
    while page.evaluate("window.painted") < 5:
        time.sleep(0.1)
    found.clear()
    before = page.evaluate("window.painted")
    for number in range(SECONDS):
        page.get_by_label("Smiling", exact=True).fill(str(number % 3 - 1))
        time.sleep(1)
    shown = page.evaluate("window.painted") - before
    page.click("#live")
    return f"live: {shown / SECONDS:.1f} frames a second; a face was found in {sum(found)} of {len(found)}"


def main() -> None:
    found, find = [], session.find
    session.find = lambda *given, **options: [faces := find(*given, **options), found.append(bool(faces))][0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        camera = [*CAMERA, f"{FILM}{film(Path(folder) / 'film.mjpeg')}"]
        for preset, size in NETWORKS:
            method, data = {"name": "fader", "preset": preset}, {"image_size": size}
            model = models.load(make_run(Path(folder) / preset, method, attributes=ATTRIBUTES, data=data))
            editing = model.editing
            print(f"{preset} at {size}: {faster(editing)}")
            with serving(server.Service(Shelf(Opened(model, editing)))) as address:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=camera)
                page = browser.new_context(permissions=["camera"]).new_page()
                page.goto(f"http://{address}/")
                page.click("#drawn")
                page.wait_for_selector("#save:enabled")
                before = processor()
                took = dragged(page)
                stolen, ticks = (now - then for now, then in zip(processor(), before))
                at = {share: took[int(share * (len(took) - 1))] for share in (0.5, 0.95, 1)}
                words = ", ".join(f"{share:.0%} within {value:.0f} ms" for share, value in at.items())
                print(f"  {len(took)} pictures in {SECONDS} seconds; {words}; {stolen / ticks:.1%} of the processors was stolen")
                if size == 64:
                    print(f"  {followed(page, found)}")
                browser.close()


if __name__ == "__main__":
    main()
