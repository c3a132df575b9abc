"""Models for use: load one from a run, an export or MLflow's registry; export a run; register a version.

An export is a folder: `model.safetensors` ("network/parameter or buffer"), `card.json`, and, when a judge belongs to
the model, its export in `judge/`. It is plain tensors and JSON; nothing in it is pickled. A registered version is an
MLflow pyfunc model "from code": a file of two lines that calls `served_model`, with an export as its artifact.

    model      a method with its weights, its sliders, and what they do to pictures
    loading    from a run, an export or a registered version
    card       what a model's card says of it
    export     a model written to a folder
    versions   a version of a registered model
    serving    what MLflow serves
    store      MLflow, speaking to one store
"""

from pipeline.models.export import export
from pipeline.models.loading import load, parse_source, variant_of
from pipeline.models.model import Model, Slider
from pipeline.models.serving import answer, served_model
from pipeline.models.versions import Version, register

__all__ = [
    "Model",
    "Slider",
    "Version",
    "answer",
    "export",
    "load",
    "parse_source",
    "register",
    "served_model",
    "variant_of",
]
