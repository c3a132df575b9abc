"""A registered version as MLflow serves it: an array and parameters in, an array out."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.models.loading import load

CODE = '''"""A model of attribute sliders, served; `pipeline.models.serving` says what it takes and gives."""
from mlflow.models import set_model

from pipeline.models import served_model

set_model(served_model())
'''


def served_model() -> Any:
    """Return the MLflow pyfunc model that answers for a registered version by the model's first capability.

    An editor takes float32 images [N, C, S, S] in [-1, 1], cropped and resized as the card's preprocessing says, with
    the parameters `sliders`, a JSON object such as {"Smiling": 1.5, "Beard": "moustache"}, and `attributes`, one of the
    pictures' own labels where they are known; it gives edited images. A sampler takes seeds [N] with the same parameters
    and gives images; a judge takes images and gives probabilities; an aligner takes windows and gives corrections.
    """
    import mlflow

    class Served(mlflow.pyfunc.PythonModel):
        def load_context(self, context: Any) -> None:
            self.model = load(context.artifacts["export"])
            self.model.source = self.model.card["config"]["name"]

        def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
            return self.model.capabilities[0].answer(model_input, params or {})

    return Served()
