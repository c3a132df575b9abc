"""Write a model to a folder of plain tensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from pipeline.files import digest_of, replacing_folder
from pipeline.models.judges import check_judge
from pipeline.models.loading import load
from pipeline.models.model import Model


def export(
    run: str | Path,
    out: str | Path,
    judge: str | Path | None = None,
    *,
    checkpoint: str = "latest",
    ema: bool = True,
) -> Path:
    """Write a model for use: model.safetensors, card.json, and its judge's export in judge/. All of it or nothing.

    Args:
        run, checkpoint, ema: what `load` takes.
        out: the export's folder; an export that is there already is replaced.
        judge: the judge to put in; by default the one the run names.

    Raises:
        ValueError: the run cannot be loaded, the judge does not fit, or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export; choose another folder")
    model = load(run, checkpoint=checkpoint, ema=ema, own_judge=judge is None)
    if judge is not None:
        model.judge = load(judge)
        check_judge(model.judge, model.attributes, model.preprocessing, model.source, partly=True)
    with replacing_folder(out) as folder:
        _write(model, folder)
    return out


def _write(model: Model, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, network in model.method.networks.items()
        for key, tensor in network.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    card = model.card | {"weights_digest": digest_of(folder / "model.safetensors")}
    if model.judge is not None:
        _write(model.judge, folder / "judge")
        card["judge"] = model.judge.source
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
