"""A model as ONNX: its encoder and its decoder apart, for any number of pictures, held against torch."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fader.method import Edits
from pipeline.files import replacing_folder, write_json
from pipeline.models.capabilities import Editing
from pipeline.models.model import Model

OPSET = 18
TOLERANCE = 1e-4  # of pictures in [-1, 1]; of latents, in shares of the largest value
_CHECKED = (1, 3)  # pictures at once; the graphs are traced with two
_RUNS = 9
_THREADS = torch.get_num_threads()


class _Encoding(nn.Module):
    """The encoder as ONNX sees it: tensors in, tensors out."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method, self.networks = method, nn.ModuleDict(method.networks)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(self.method.encode(images, labels)))


class _Decoding(_Encoding):
    """The decoder as ONNX sees it. form: how the latent's tensors belong together."""

    def __init__(self, method: Any, form: pytree.TreeSpec) -> None:
        super().__init__(method)
        self.form = form

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.method.decode(pytree.tree_unflatten(tensors[:-1], self.form), tensors[-1])


def export_onnx(model: Model, out: Path) -> dict[str, float]:
    """Write encoder.onnx, decoder.onnx and card.json to a folder, all or none.

    The encoder takes `images` [N, C, S, S] in [-1, 1], and `labels` [N, A] where it reads them; it gives `latent_0` and
    on. The decoder takes these and `code` [N, code_width]; it gives `image`.

    Returns:
        How far each graph is from torch.

    Raises:
        ValueError: the model does not edit, ONNX is not installed, or `out` holds something else.
    """
    if out.exists() and not (out / "decoder.onnx").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export to ONNX; choose another folder")
    editing = model.editing
    graphs = {"encoder": _encoder(editing), "decoder": _decoder(editing)}
    off = _differences(editing, *(run_by(graph) for graph in graphs.values()))
    assert max(off.values()) <= TOLERANCE, f"ONNX is off what torch gives: {off}"
    with replacing_folder(out) as folder:
        for name, graph in graphs.items():
            (folder / f"{name}.onnx").write_bytes(graph)
        write_json(folder / "card.json", model.card | {"onnx": {"opset": OPSET, "off": off}})
    return off


def run_by(graph: bytes) -> Callable[..., list[Tensor]]:
    """Return a function that runs a graph in ONNX Runtime, on as many threads as torch had, of tensors by their names."""
    onnxruntime = _installed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a browser may need the same cores
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = [put.name for put in session.get_inputs()]

    def run(**tensors: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {name: tensors[name].numpy() for name in wanted})]

    return run


@dataclass
class _Quick:
    """A method that runs in ONNX Runtime. form: how the latent's tensors belong together."""

    encoder: Callable[..., list[Tensor]]
    decoder: Callable[..., list[Tensor]]
    form: pytree.TreeSpec

    def encode(self, images: Tensor, labels: Tensor) -> Any:
        return pytree.tree_unflatten(self.encoder(images=images, labels=labels), self.form)

    def decode(self, latent: Any, code: Tensor) -> Tensor:
        return self.decoder(**_latents(latent), code=code)[0]


def faster(editing: Editing) -> str:
    """Let ONNX Runtime encode and decode where it is installed and the faster on this machine; say in words what decodes.

    Torch, which has only pictures to round then, gets one thread: several would wait for each other longer than they work.
    """
    try:
        form = pytree.tree_structure(editing.encode(*_example(editing, 1)[:2]))
        quick = _Quick(run_by(_encoder(editing)), run_by(_decoder(editing)), form)
    except (ValueError, torch.onnx.errors.OnnxExporterError) as error:
        return f"torch decodes, because ONNX cannot: {str(error).splitlines()[0]}"
    images, labels, code = _example(editing, 1)
    latent, took = editing.encode(images, labels), {}
    for name, method in (("torch", editing.method), ("ONNX Runtime", quick)):
        with torch.inference_mode():
            took[name] = sorted(_seconds(method, latent, code) for _ in range(_RUNS))[_RUNS // 2]
    if took["ONNX Runtime"] < took["torch"]:
        editing.method = quick
        torch.set_num_threads(1)
    best, other = sorted(took, key=lambda name: took[name])
    return f"{best} decodes a picture in {1e3 * took[best]:.1f} ms; {other} takes {1e3 * took[other]:.1f} ms"


def _seconds(method: Edits, latent: Any, code: Tensor) -> float:
    began = time.perf_counter()
    method.decode(latent, code)
    return time.perf_counter() - began


def _installed(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'attribute-sliders[onnx]'") from None


def _example(editing: Editing, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise for images, labels and a code, the same each time."""
    chance = torch.Generator().manual_seed(count)
    labels = torch.zeros(count, len(editing.attributes))
    code = torch.rand(count, editing.attributes.code_width, generator=chance) * 3 - 1
    return torch.rand(count, *editing.pixels, generator=chance) * 2 - 1, labels, code


def _latents(latent: Any) -> dict[str, Tensor]:
    return {f"latent_{i}": tensor for i, tensor in enumerate(pytree.tree_leaves(latent))}


def _encoder(editing: Editing) -> bytes:
    images, labels, _ = _example(editing, 2)
    names = list(_latents(editing.encode(images, labels)))
    return _traced(_Encoding(editing.method), {"images": images, "labels": labels}, names)


def _decoder(editing: Editing) -> bytes:
    images, labels, code = _example(editing, 2)
    with torch.no_grad():  # a tensor of inference mode cannot be traced
        latent = editing.method.encode(images, labels)
    form = pytree.tree_structure(latent)
    return _traced(_Decoding(editing.method, form), {**_latents(latent), "code": code}, ["image"])


def _traced(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> bytes:
    _installed("onnx")
    out, batch = io.BytesIO(), {name: {0: "n"} for name in (*inputs, *outputs)}
    with warnings.catch_warnings():  # that tracing is old, and that it does not follow our checks of shapes
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), out, dynamo=False, opset_version=OPSET, dynamic_axes=batch,
            input_names=list(inputs), output_names=list(outputs),
        )  # fmt: skip
    return out.getvalue()


def _differences(editing: Editing, encode: Callable[..., list[Tensor]], decode: Callable[..., list[Tensor]]) -> dict[str, float]:
    """Return the largest difference from torch of both graphs, at other numbers of pictures than they were traced with."""
    off = {"encoder": 0.0, "decoder": 0.0}
    for count in _CHECKED:
        images, labels, code = _example(editing, count)
        latent = editing.encode(images, labels)
        for ours, theirs in zip(_latents(latent).values(), encode(images=images, labels=labels), strict=True):
            off["encoder"] = max(off["encoder"], float((ours - theirs).abs().max() / ours.abs().max()))
        with torch.inference_mode():
            ours, (theirs,) = editing.method.decode(latent, code), decode(**_latents(latent), code=code)
        off["decoder"] = max(off["decoder"], float((ours - theirs).abs().max()))
    return off
