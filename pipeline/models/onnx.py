"""A model as ONNX: its encoder and its decoder apart, for any number of pictures, held against torch."""

import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fader.method import Edits
from pipeline.data.datasets.faces import draw_face
from pipeline.files import replacing_folder, write_json
from pipeline.images import preprocess, to_float
from pipeline.metrics import psnr
from pipeline.models.capabilities import Editing
from pipeline.models.model import Model

OPSET = 18
TOLERANCE = 1e-4  # of pictures in [-1, 1]; of latents, in shares of the largest value
_CHECKED = (1, 3)  # pictures at once; the graphs are traced with two
_RUNS = 9
_FACES = 8  # drawn, for the loss by int8
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


def export_onnx(model: Model, out: Path, int8: bool = False) -> dict[str, Any]:
    """Write encoder.onnx, decoder.onnx and card.json to a folder, all or none; docs/using.md says what they take.

    int8: keep the weights as int8; the runtime computes with floats as before. Returns what the card says: how far each
    graph is from torch ("off"), before rounding, and of int8 the PSNR of drawn faces against torch's, in dB ("int8_psnr").
    Raises ValueError: the model does not edit, ONNX is not installed, or `out` holds something else.
    """
    if out.exists() and not (out / "decoder.onnx").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no export to ONNX; choose another folder")
    editing = model.editing
    graphs = {"encoder": _encoder(editing), "decoder": _decoder(editing)}
    off = _differences(editing, *(run_by(graph) for graph in graphs.values()))
    assert max(off.values()) <= TOLERANCE, f"ONNX is off what torch gives: {off}"
    about: dict[str, Any] = {"opset": OPSET, "off": off}
    if int8:
        graphs = {name: quantised(graph) for name, graph in graphs.items()}
        about["int8_psnr"] = _psnr_of_faces(model, *(run_by(graph) for graph in graphs.values()))
    with replacing_folder(out) as folder:
        for name, graph in graphs.items():
            (folder / f"{name}.onnx").write_bytes(graph)
        write_json(folder / "card.json", model.card | {"onnx": about})
    return about


def quantised(graph: bytes) -> bytes:
    """Round a graph's weights to int8, symmetrically and with a scale for each output channel (where that is an axis).

    Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2.2 and 3.1 (weights only, per channel).
    """
    onnx = _installed("onnx")
    from onnx import helper, numpy_helper

    model = onnx.load_from_string(graph)
    for weight in [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]:
        array, name = numpy_helper.to_array(weight), weight.name
        axis = int(any(node.op_type == "ConvTranspose" and name in node.input for node in model.graph.node))
        rest = tuple(i for i in range(array.ndim) if i != axis)
        scale = np.maximum(np.abs(array).max(axis=rest) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        rounded = np.rint(array / np.expand_dims(scale, rest)).astype(np.int8)
        parts = {f"{name}.int8": rounded, f"{name}.scale": scale, f"{name}.zero": np.zeros_like(scale, np.int8)}
        model.graph.initializer.remove(weight)
        model.graph.initializer.extend(numpy_helper.from_array(part, key) for key, part in parts.items())
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", list(parts), [name], axis=axis))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _psnr_of_faces(model: Model, encode: Callable[..., list[Tensor]], decode: Callable[..., list[Tensor]]) -> float:
    """Return the PSNR in dB of drawn faces through these graphs against torch's own."""
    editing = model.editing
    faces = [preprocess(draw_face(0, number), model.preprocessing) for number in range(_FACES)]
    images = to_float(torch.from_numpy(np.stack(faces)))
    labels, _ = editing.labels(images)
    code = editing.attributes.code(labels)
    latents = _latents(editing.encode(images, labels))
    (theirs,) = decode(**dict(zip(latents, encode(images=images, labels=labels))), code=code)
    with torch.inference_mode():
        ours = editing.decode(editing.encode(images, labels), labels, [])
    return round(float(psnr((ours - theirs).square().mean())), 1)


def run_by(graph: bytes) -> Callable[..., list[Tensor]]:
    """Return a function that runs a graph in ONNX Runtime, on as many threads as torch had, of tensors by their names."""
    onnxruntime = _installed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a browser may need the same cores
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # int8 weights are scaled back once, not at each run
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
