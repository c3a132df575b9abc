"""A registered version as MLflow serves it: images and sliders in, edited images out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fader.method import Aligns, Decodes
from pipeline.models.loading import load
from pipeline.models.model import BATCH_SIZE, Model


def signature(model: Model) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = TensorSpec(np.dtype("float32"), (-1, *_input_size(model)))
    if isinstance(model.method, Aligns):
        return ModelSignature(Schema([images]), Schema([TensorSpec(np.dtype("float32"), (-1, 4))]))
    if not isinstance(model.method, Decodes):
        probabilities = TensorSpec(np.dtype("float32"), (-1, model.attributes.code_width))
        return ModelSignature(Schema([images]), Schema([probabilities]))
    params = ParamSchema([ParamSpec("sliders", "string", "{}"), ParamSpec("attributes", "string", "{}")])
    return ModelSignature(Schema([images]), Schema([images]), params)


def _input_size(model: Model) -> tuple[int, int, int]:
    side = model.method.window_size if isinstance(model.method, Aligns) else model.method.image_size
    return model.method.channels, side, side


def example(model: Model) -> Any:
    images = np.zeros((1, *_input_size(model)), np.float32)
    if not isinstance(model.method, Decodes):
        return images
    first = model.attributes[0]
    name = f"{first.name}.{first.categories[0]}" if first.kind == "k-way" else first.name
    return images, {"sliders": json.dumps({name: 1.0})}


CODE = '''"""A model of attribute sliders, served: images and slider positions in, edited images out."""
from mlflow.models import set_model

from pipeline.models import served_model

set_model(served_model())
'''


def served_model() -> Any:
    """The MLflow pyfunc model that answers for a registered version; see `answer` for what it takes."""
    import mlflow

    class Served(mlflow.pyfunc.PythonModel):
        def load_context(self, context: Any) -> None:
            self.model = load(context.artifacts["export"])
            self.model.source = self.model.card["config"]["name"]

        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
            return answer(self.model, model_input, params or {})

    return Served()


def answer(model: Model, images: np.ndarray, params: Mapping[str, str]) -> np.ndarray:
    """What a served model returns.

    Args:
        images: float32 [N, C, S, S] in [-1, 1], cropped and resized as the card's preprocessing says.
        params: `sliders`, a JSON object such as {"Smiling": 1.5, "Beard": "moustache"}; `attributes`, a JSON object of
            the pictures' own labels where they are known (the judge reads the others).

    Returns:
        Edited pictures, float32 as the input; of a judge, probabilities [N, code_width]; of an aligner, which takes
        its windows, corrections [N, 4].

    Raises:
        ValueError: unknown attribute, a value that is no number, or pictures of another size.
    """
    batches = torch.from_numpy(np.array(images, np.float32)).split(BATCH_SIZE)
    if isinstance(model.method, Aligns):
        return torch.cat([model.corrections(batch) for batch in batches]).numpy()
    if not isinstance(model.method, Decodes):
        return torch.cat([model.probabilities(batch) for batch in batches]).numpy()
    sliders = [model.slider(name, value) for name, value in _object(params, "sliders").items()]
    given = {name: model.label(name, value) for name, value in _object(params, "attributes").items()}
    edited = [model.edit(batch, model.labels(batch, given)[0], [sliders])[:, 0] for batch in batches]
    return torch.cat(edited).numpy()


def _object(params: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        value = json.loads(params.get(name) or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{name} is {params.get(name)!r}; a JSON object is needed, as {{"Smiling": 1.5}}')
    return value
