"""Training on one process or many, behind few verbs: update, read_report, mean, largest, state, load.

Only this package knows of several processes.

A phase's loss is what gets wrapped. For each trained group the engine builds one module whose forward runs a whole loss
with the raw networks inside, while only the group's parameters require gradients; the back end wraps *that*. So no
method can call a trained network around its wrapper, autocast covers everything, and a frozen discriminator costs no
communication. Back ends: one process, DDP, and DeepSpeed ZeRO-0, 1, 2 (one DeepSpeed engine a trained group).

Accelerate makes the process group and names device and rank on every back end. DeepSpeed is asked for in the experiment
or by Accelerate's launcher (`--use_deepspeed`, `distributed_type: DEEPSPEED`); the engine reads what that launcher left
in the environment and starts DeepSpeed itself, because Accelerate's own way takes one model and needs transformers.

    engine     the engine: which step comes next and what it is given, state and load
    step       one prepared update of a phase, with the guard against updates that are not finite, and summed reports
    capture    steps held by CUDA graphs, and networks compiled by torch.compile
    groups     a trained group on one process and under DDP: its wrapped loss, optimizer, moving average, loss scale
    zero       a trained group behind a DeepSpeed engine, and DeepSpeed's settings
    ranks      the processes of a launch: sums, means and agreements over them
    launcher   what the launcher left in the environment
    state      what a run must restore
"""

from pipeline.engine.engine import Engine
from pipeline.engine.groups import LossScale
from pipeline.engine.ranks import Ranks, leave, open_ranks
from pipeline.engine.state import State
