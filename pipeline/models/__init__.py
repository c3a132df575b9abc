"""Models for use: load one from a run, an export or MLflow's registry; export a run; register a version.

An export is a folder: `model.safetensors` ("network/parameter or buffer"), `card.json`, and, when a judge belongs to
the model, its export in `judge/`. It is plain tensors and JSON; nothing in it is pickled. A registered version is an
MLflow pyfunc model "from code": a file of two lines that calls `served_model`, with an export as its artifact.

    capabilities  what a method can do: edit, sample, judge, align
    sliders       what people write about attributes, read
    judges        which judge may speak about a model's pictures, and what it reads off them
    model         a method with its weights, and what is known about it
    card          what is said of a model: its numbers and limits, its terms, the packages it needs
    loading       from a run, an export or a registered version
    onnx          its encoder and decoder as ONNX
    versions      a model written to a folder, and registered as a version
    aliases       the champion, moved by one promotion at a time
    serving       what MLflow serves
    store         MLflow, speaking to one store
"""

from pipeline.models.capabilities import Aligning, Capability, Editing, Judging, Sampling, aligner, editor, judge, sampler
from pipeline.models.judges import BLUR, PANEL_SIZE, Reader, check_independent, check_judge, readers_of
from pipeline.models.loading import load, parse_source, variant_of
from pipeline.models.model import Model
from pipeline.models.serving import served_model
from pipeline.models.sliders import Slider
from pipeline.models.versions import Version, export, register
