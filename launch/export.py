"""`fader export MODEL --out DIR`: a model as a folder of plain tensors and a card, or as ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from launch import values
from launch.command import main


def export(
    model: Annotated[str, typer.Argument(help="models:/NAME@alias, an export or a run", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="the folder to write", metavar="DIR")],
    onnx: Annotated[bool, typer.Option("--onnx", help="encoder.onnx and decoder.onnx, held against torch")] = False,
    page: Annotated[bool, typer.Option("--page", help="the same, and a page for onnxruntime-web beside it")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="with --onnx or --page: weights in a quarter of the space")] = False,
    judge: Annotated[str | None, typer.Option(help="put this judge in, not the model's own; not as ONNX")] = None,
    checkpoint: values.Checkpoint = "latest", raw: values.Raw = False,
) -> None:
    """Write a model for use elsewhere: all of it or nothing."""
    if (onnx or page) and judge:
        raise ValueError("--judge is for an export of tensors; ONNX holds encoder and decoder alone")
    if int8 and not (onnx or page):
        raise ValueError("--int8 goes with --onnx or --page")
    values.check_folder(out)
    from pipeline import models

    if onnx or page:
        from pipeline.app.offline import export_page
        from pipeline.models.onnx import export_onnx

        loaded = models.load(model, checkpoint=checkpoint, ema=not raw, own_judge=False)
        about = (export_page if page else export_onnx)(loaded, out, int8)
        for name, off in about["off"].items():
            typer.echo(f"wrote {out / name}.onnx, which is within {off:.1g} of torch" + " before its weights are rounded" * int8)
        if int8:
            typer.echo(f"int8: drawn faces come out {about['int8_psnr']} dB (PSNR) from what the floats give")
    if page:
        typer.echo(f"next: put ort.min.js of onnxruntime-web and its .wasm and .mjs files into {out}, and serve that folder")
    elif onnx:
        typer.echo(f"next: onnxruntime.InferenceSession('{out}/decoder.onnx'); {out}/card.json says what goes in")
    else:
        models.export(model, out, judge, checkpoint=checkpoint, ema=not raw)
        typer.echo(f"wrote {out}")
        typer.echo(f"next: {models.load(out).capabilities[0].next_command(str(out))}")


if __name__ == "__main__":
    main(export)
