"""A registered version as MLflow serves it: pictures or arrays and parameters in, pictures or arrays out."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pipeline.images import Preprocessing, decode, png_bytes, preprocess, to_float, to_uint8
from pipeline.models.capabilities import Capability
from pipeline.models.loading import load
from pipeline.models.model import Model

CODE = '''"""A model of attribute sliders, served; `pipeline.models.serving` says what it takes and gives."""
from mlflow.models import set_model

from pipeline.models import served_model

set_model(served_model())
'''
FORMATS = ("", "png", "tensor")


def served_model() -> Any:
    """Return the MLflow pyfunc model that answers for a registered version, as `answer` says."""
    import mlflow
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class Refused(mlflow.exceptions.MlflowException):
        """A wrong request: status 400 and our line alone, before which MLflow's server would put the whole input."""

        @property
        def message(self) -> str:
            return self.line

        @message.setter
        def message(self, message: str) -> None:
            self.__dict__.setdefault("line", message)

    class Served(mlflow.pyfunc.PythonModel):
        def load_context(self, context: Any) -> None:
            self.model = load(context.artifacts["export"])
            self.model.source = self.model.card["config"]["name"]

        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
            try:  # the input may also be a list or a table, but MLflow would hold other hints against it
                return answer(self.model, model_input, params or {})
            except ValueError as error:
                raise Refused(" ".join(str(error).split()), error_code=INVALID_PARAMETER_VALUE) from None

    return Served()


def answer(model: Model, data: Any, params: Mapping[str, str]) -> Any:
    """Answer by the first of a model's capabilities.

    data: an editor and a judge take base64 PNG or JPEG files of any size, or float32 [N, C, S, S] in [-1, 1]; a sampler
    seeds [N], an aligner windows; a table (pandas) of one column is a list. params: `sliders` and `attributes`, JSON
    objects such as {"Smiling": 1.5}; `format`: "png" or "tensor" for pictures that come out, by default as they came.
    Returns them as such, a judge's probabilities [N, code_width], or an aligner's corrections [N, 4].
    """
    capability = model.capabilities[0]
    kind = params.get("format") or ""
    if kind not in FORMATS:
        raise ValueError(f"format is {kind!r}; it is png or tensor")
    rows = data.iloc[:, 0].tolist() if hasattr(data, "iloc") else data
    given = capability.pictures and _are_texts(rows)
    answered = capability.answer(_images(rows, model.preprocessing) if given else rows, params)
    if answered.ndim < 4 or not (kind == "png" or (given and not kind)):
        return answered
    return [base64.b64encode(png_bytes(pixels)).decode() for pixels in _pixels(answered)]


def _are_texts(rows: Any) -> bool:
    return isinstance(rows, (list, tuple, np.ndarray)) and len(rows) > 0 and all(isinstance(row, str) for row in rows)


def _images(texts: Any, rule: Preprocessing) -> torch.Tensor:
    """Decode base64 pictures and cut them square: [N, C, S, S]."""
    squares = []
    for number, text in enumerate(texts, 1):
        try:
            picture = decode(base64.b64decode(text.rpartition("base64,")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"picture {number} is not base64: {error}") from None
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from None
        squares.append(preprocess(picture, rule.fitting(*picture.size)))
    return to_float(torch.from_numpy(np.stack(squares)))


def _pixels(images: np.ndarray) -> np.ndarray:
    pixels = to_uint8(torch.from_numpy(images)).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def signature(capability: Capability) -> Any:
    """Return MLflow's description of what goes in and comes out; what takes pictures and arrays has no one type of input."""
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    inputs = Schema([TensorSpec(np.dtype(capability.dtype), (-1, *capability.takes))])
    outputs = Schema([TensorSpec(np.dtype("float32"), (-1, *capability.gives))])
    params = [ParamSpec("format", "string", "")] if len(capability.gives) == 3 else []
    if capability.sliders:
        params += [ParamSpec("sliders", "string", "{}"), ParamSpec("attributes", "string", "{}")]
    return ModelSignature(None if capability.pictures else inputs, outputs, ParamSchema(params) if params else None)


def example(capability: Capability) -> Any:
    """Return an input of one row, with parameters where there are any."""
    if capability.pictures:
        size = capability.pixels[1]
        data: Any = [base64.b64encode(png_bytes(np.full((size, size, 3), 127, np.uint8))).decode()]
    else:
        data = np.zeros((1, *capability.takes), capability.dtype)
    return (data, {"sliders": json.dumps(dict([capability.example_slider()]))}) if capability.sliders else data
