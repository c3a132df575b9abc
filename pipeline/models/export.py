"""Write a model to a folder of plain tensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from pipeline.config import addresses
from pipeline.files import digest_of, replacing_folder
from pipeline.models.judges import check_judge
from pipeline.models.loading import judge_folders, load
from pipeline.models.model import Model


def export(
    run: str | Path, out: str | Path, judge: str | Sequence[str] | None = None, *, checkpoint: str = "latest", ema: bool = True
) -> Path:
    """Write a model for use: model.safetensors, card.json, and its judges' exports in judge/, judge-2/ …, whole; an
    export that is there already is replaced. run, checkpoint, ema: what `load` takes. judge: the judges to put in, by
    default the run's own.

    Raises ValueError: the run cannot be loaded, the judge does not fit, or `out` holds something else.
    """
    out = Path(out)
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export; choose another folder")
    model = load(run, checkpoint=checkpoint, ema=ema, own_judge=judge is None)
    if judge is not None:
        model.judges = tuple(load(address) for address in addresses(judge))
        for one in model.judges:
            check_judge(one, model.attributes, model.preprocessing, model.source, partly=True)
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
    if model.judges:
        card["judge"] = [judge.source for judge in model.judges]
        for name, judge in zip(judge_folders(card), model.judges):
            _write(judge, folder / name)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
