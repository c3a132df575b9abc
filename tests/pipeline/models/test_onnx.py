"""ONNX: both graphs give what torch gives, for any number of pictures, and the page decodes by the faster of the two."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.data.datasets.faces import draw_face
from pipeline.images import Preprocessing, preprocess, to_float
from pipeline.models import onnx
from tests.runs import FADER, JUDGE, make_run
from tests.warm import forked


def settings(**changes):
    return {**FADER, **changes}


LAYOUTS = {
    "to four pixels": settings(),
    "to one pixel": settings(num_layers=5),
    "skips": settings(num_skips=2),
    "pixelshuffle, instance norm": settings(deconv="pixelshuffle", norm="instance"),
    "upsampling": settings(deconv="upsampling"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_writes_graphs_that_give_what_torch_gives(tmp_path, layout, monkeypatch):
    """Read back by ONNX Runtime alone, at numbers of pictures that nothing was traced with."""
    import onnxruntime

    model = models.load(make_run(tmp_path / "run", LAYOUTS[layout]))
    off = onnx.export_onnx(model, tmp_path / "out")["off"]
    assert set(off) == {"encoder", "decoder"} and max(off.values()) <= onnx.TOLERANCE
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["onnx"]["off"] == off and Preprocessing(**card["preprocessing"]).image_size == 32
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx") for name in ("encoder", "decoder"))
    editing = model.editing
    for count in (1, 5):
        images, labels = torch.rand(count, 3, 32, 32) * 2 - 1, torch.zeros(count, 3)
        latents = encoder.run(None, {"images": images.numpy()})
        slider = editing.slider("Smiling", 2)
        wanted = editing.decode(editing.encode(images, labels), labels, [slider])
        code = model.attributes.with_slider(model.attributes.code(labels), "Smiling", 2.0).numpy()
        names = [put.name for put in decoder.get_inputs()]
        image = decoder.run(None, dict(zip(names, [*latents, code])))[0]
        np.testing.assert_allclose(image, wanted, atol=1e-4)
        code[:, 0] += 0.05
        assert np.abs(decoder.run(None, dict(zip(names, [*latents, code])))[0] - image).max() > 0, "the code is read"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_int8_take_a_quarter_and_their_loss_is_told(tmp_path, layout):
    """The loss is what ONNX Runtime gives by itself; scales are of each output channel, also where these come second."""
    import onnxruntime

    settings = LAYOUTS[layout] | {"init_channels": 32, "max_channels": 64}
    model = models.load(make_run(tmp_path / "run", settings))
    decoder = next(m for m in model.editing.method.networks["decoder"].modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 4)
    with torch.no_grad():
        channel = decoder.weight[:, 0] if isinstance(decoder, torch.nn.ConvTranspose2d) else decoder.weight[0]
        channel *= 1000  # with one scale for all, every other channel would be rounded to nothing
        if decoder.bias is not None:
            decoder.bias[0] *= 1000
    about = onnx.export_onnx(model, tmp_path / "out", int8=True)
    assert json.loads((tmp_path / "out" / "card.json").read_text())["onnx"] == about and 30 < about["int8_psnr"] < 90
    onnx.export_onnx(model, tmp_path / "floats")
    for name in ("encoder", "decoder"):
        small, large = (tmp_path / folder / f"{name}.onnx" for folder in ("out", "floats"))
        assert 0.24 < small.stat().st_size / large.stat().st_size < 0.36
    faces = torch.from_numpy(np.stack([preprocess(draw_face(0, n), model.preprocessing) for n in range(8)]))
    labels, _ = model.editing.labels(to_float(faces))
    code = model.attributes.code(labels).numpy()
    pictures = []
    for folder in ("out", "floats"):
        encoder, decoder = (onnxruntime.InferenceSession(tmp_path / folder / f"{n}.onnx") for n in ("encoder", "decoder"))
        latents = encoder.run(None, {"images": to_float(faces).numpy()})
        names = [put.name for put in decoder.get_inputs()]
        pictures.append(decoder.run(None, dict(zip(names, [*latents, code])))[0])
    measured = 10 * np.log10(4 / np.square(pictures[0] - pictures[1]).mean())
    assert about["int8_psnr"] == pytest.approx(measured, abs=0.2)


def test_the_faster_decodes_and_gives_the_same_pictures(tmp_path, monkeypatch):
    model = models.load(make_run(tmp_path / "run", FADER))
    images, labels = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 3)
    slow = model.editing
    for seconds, best in ((lambda method, *_: float(isinstance(method, onnx._Quick)), "torch"),
                          (lambda method, *_: float(not isinstance(method, onnx._Quick)), "ONNX Runtime")):  # fmt: skip
        monkeypatch.setattr(onnx, "_seconds", seconds)
        editing = model.editing
        assert onnx.faster(editing).startswith(f"{best} decodes a picture")
        assert isinstance(editing.method, onnx._Quick) == (best != "torch")
        move = [editing.slider("Beard", "full")]
        latent = editing.encode(images, labels)
        torch.testing.assert_close(editing.decode(latent, labels, move), slow.decode(latent, labels, move), atol=1e-4, rtol=0)


def test_where_onnx_is_missing_or_lacks_an_operator_torch_decodes_and_that_is_said(tmp_path, monkeypatch):
    editing = models.load(make_run(tmp_path / "run", FADER)).editing
    for error in (ValueError("No module named 'onnx'"), torch.onnx.errors.UnsupportedOperatorError("aten::x", 18, None)):
        monkeypatch.setattr(onnx, "_decoder", lambda editing, error=error: (_ for _ in ()).throw(error))
        assert onnx.faster(editing).startswith("torch decodes, because ONNX cannot: ")
        assert not isinstance(editing.method, onnx._Quick)


def test_a_graph_that_is_off_is_not_written(tmp_path, monkeypatch):
    model = models.load(make_run(tmp_path / "run", FADER))
    monkeypatch.setattr(onnx, "_differences", lambda *given: {"encoder": 0.0, "decoder": 2e-4})
    with pytest.raises(AssertionError, match="off what torch gives"):
        onnx.export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differences_are_seen(tmp_path):
    """The graph of other weights exceeds the tolerance a hundred times."""
    one, other = (models.load(make_run(tmp_path / str(seed), FADER, seed=seed)).editing for seed in (0, 1))
    graphs = [onnx.run_by(graph) for graph in (onnx._encoder(other), onnx._decoder(other))]
    assert min(onnx._differences(one, *graphs).values()) > 100 * onnx.TOLERANCE


def test_the_command_exports_either_way_and_says_what_it_cannot(tmp_path):
    make_run(tmp_path / "judge", JUDGE)
    make_run(tmp_path / "run", FADER, judge=str(tmp_path / "judge"))
    said = forked("launch.export", "run", "--out", "graphs", "--onnx", cwd=tmp_path).stdout
    assert "decoder.onnx, which is within" in said
    said = forked("launch.export", "run", "--out", "small", "--onnx", "--int8", cwd=tmp_path).stdout
    assert re.search(r"int8: drawn faces come out [\d.]+ dB \(PSNR\) from what the floats give", said)
    done = forked("launch.export", "run", "--out", "no", "--int8", cwd=tmp_path, code=2)
    assert "--int8 goes with --onnx or --page" in done.stderr
    forked("launch.export", "run", "--out", "tensors", cwd=tmp_path)
    assert models.load(tmp_path / "tensors").judges
    done = forked("launch.export", "run", "--out", "tensors", "--onnx", cwd=tmp_path, code=2)
    assert "tensors exists and is no export to ONNX" in done.stderr
    done = forked("launch.export", "judge", "--out", "no", "--onnx", cwd=tmp_path, code=2)
    assert "no sliders to move" in done.stderr and not (tmp_path / "no").exists()
