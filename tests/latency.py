"""How long a move takes to show in a browser: `python -m tests.latency`, on a machine that does nothing else.

For each size an untrained network is served from this process, and a slider is dragged for ten seconds in chromium. A
move takes from its input event to the frame after its picture was drawn; moves that a newer one overtook are not shown.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from fader.attributes import Attribute, Attributes
from pipeline import models
from pipeline.app import server
from pipeline.app.shelf import Opened, Shelf
from pipeline.models.onnx import faster
from tests.page import serving
from tests.runs import make_run

ATTRIBUTES = Attributes([Attribute(name) for name in ("Smiling", "Male", "Young", "Eyeglasses")])
NETWORKS = (("small", 64), ("official", 256))
SECONDS, EVENT = 10, 0.016
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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for preset, size in NETWORKS:
            method, data = {"name": "fader", "preset": preset}, {"image_size": size}
            model = models.load(make_run(Path(folder) / preset, method, attributes=ATTRIBUTES, data=data))
            editing = model.editing
            print(f"{preset} at {size}: {faster(editing)}")
            with serving(server.Service(Shelf(Opened(model, editing)))) as address:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                page = browser.new_page()
                page.goto(f"http://{address}/")
                page.click("#drawn")
                page.wait_for_selector("#save:enabled")
                took = dragged(page)
                at = {share: took[int(share * (len(took) - 1))] for share in (0.5, 0.95, 1)}
                words = ", ".join(f"{share:.0%} within {value:.0f} ms" for share, value in at.items())
                print(f"  {len(took)} pictures in {SECONDS} seconds; {words}")
                browser.close()


if __name__ == "__main__":
    main()
