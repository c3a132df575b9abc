"""What the capture of a CUDA graph refuses, refused on the CPU: a step that runs under `refusing` can be captured.

Refused are: a number read from the device, a shape that depends on data, a tensor made from memory of the host, and
a generator seeded by the host. Some operators read the device inside, so they are refused by their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch._dynamo  # torch imports it inside a function mode, and it would meet the generators that are replaced here
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "_linalg_check_errors"}
READS |= {"_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "bincount", "histc"}  # inside, on CUDA
SHAPES = {"nonzero", "argwhere", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
HOST_MEMORY = {"lift_fresh", "lift", "_pin_memory"}
FUNCTIONS = {"tolist", "numpy", "cpu", "pin_memory", "cuda"}  # of tensors; they pass the dispatcher by
SEEDING = ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state")


class Refused(AssertionError):
    """A capture would refuse this."""


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            raise Refused(f"{function} reads a number from the device")
        if name in SHAPES or (name.startswith("index") and _picks_by_mask(args)):
            raise Refused(f"{function} gives a shape that depends on data")
        if name in HOST_MEMORY:
            raise Refused(f"{function} makes a tensor from memory of the host")
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in FUNCTIONS:
            raise Refused(f"Tensor.{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


def _picks_by_mask(args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _refuse_seed(*given: object) -> None:
    raise Refused("the host seeds a generator")


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """While this lasts, whatever a capture refuses raises `Refused`."""
    with contextlib.ExitStack() as stack:
        for name in SEEDING:
            stack.enter_context(mock.patch(name, _refuse_seed))
        stack.enter_context(mock.patch("torch.Generator", _refuse_seed))
        generator = mock.Mock(**{"manual_seed.side_effect": _refuse_seed, "seed.side_effect": _refuse_seed})
        stack.enter_context(mock.patch("torch.default_generator", generator))
        stack.enter_context(Functions())
        stack.enter_context(Operators())
        yield
