"""What most commands import; a process that holds it has no thread and no process group yet, so it may be forked."""

import pyarrow.dataset  # noqa: F401  reading a manifest imports it, and that pandas: 0.7 s
import torch._dynamo  # noqa: F401  the first optimizer imports it: 1.2 s

import launch.command  # noqa: F401
import pipeline.models  # noqa: F401
import pipeline.training.run  # noqa: F401
