"""The page as a folder of files: ONNX Runtime decodes in the browser, and no photo leaves the machine."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.app.server import PAGE
from pipeline.files import write_json
from pipeline.models import Model
from pipeline.models.onnx import export_onnx

RUNTIME = "ort.min.js"


def export_page(model: Model, out: Path, int8: bool = False) -> dict[str, Any]:
    """Write a model as `export_onnx` does, and the page beside it.
    The page needs onnxruntime-web's `ort.min.js` and its `.wasm` and `.mjs` files in the same folder."""
    if model.card["channels"] != 3:
        raise ValueError(f"{model.source} reads grey pictures; the page of files takes colour")
    about = export_onnx(model, out, int8)
    card = json.loads((out / "card.json").read_text())
    write_json(out / "card.json", card | {"name": model.source})
    for name in ("page.js", "page.css", "local.js"):
        shutil.copy(PAGE / name, out / name)
    page = (PAGE / "index.html").read_text().replace('"/page.', '"page.')
    scripts = "".join(f'<script src="{name}" defer></script>\n' for name in (RUNTIME, "local.js"))
    (out / "index.html").write_text(page.replace('<script src="page.js"', f'{scripts}<script src="page.js"'))
    return about
