"""A second device for machines without one: its tensors lie on the CPU, and refuse to meet those of the CPU.

Within `second_device()` tensors of the device "meta" hold numbers, and whoever mixes them with the CPU's is refused as
CUDA refuses it. So a test of a GPU's way through the code runs here as well, but for rounding and speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = "meta"
aten = torch.ops.aten
TAKE_BOTH = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
GIVE_THE_HOST = {aten._local_scalar_dense.default, aten.equal.default}


class Away(torch.Tensor):
    """A tensor of the second device; `near` holds its numbers."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Away:
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), device=DEVICE, **layout)

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.near.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.near})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation on the CPU; its results lie on the second device if it was asked for or the inputs lie there.

    Raises:
        RuntimeError: tensors of both devices meet, and neither is a single number.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        with SecondDevice():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    values, shape = tree_flatten((args, kwargs))
    away = {id(value.near): value for value in values if isinstance(value, Away)}
    asked = kwargs.get("device")
    if not away and (asked is None or asked.type != DEVICE):
        return function(*args, **kwargs)
    near = [value for value in values if isinstance(value, torch.Tensor) and not isinstance(value, Away) and value.ndim]
    if away and near and function not in TAKE_BOTH:
        raise RuntimeError(f"{function}: expected all tensors to be on the same device")
    plain = [value.near if isinstance(value, Away) else value for value in values]
    plain_args, plain_kwargs = tree_unflatten(plain, shape)
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = function(*plain_args, **plain_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if function in GIVE_THE_HOST or (asked is not None and asked.type != DEVICE):
        return result
    def wrapped(value: Any) -> Any:
        """An operation in place gives its own input back."""
        if not isinstance(value, torch.Tensor):
            return value
        return away[id(value)] if id(value) in away else Away(value.resolve_conj().resolve_neg())

    return tree_map(wrapped, result)


def _then_moved(make: Callable) -> Callable:
    """`torch.tensor` and the like take the numbers of a list to the device by a way of their own, which sees no numbers."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, Away) and device is None:
            return make(data, *args, **kwargs)
        tensor = data if isinstance(data, Away) else make(data, *args, **kwargs)
        return tensor if device is None else tensor.to(device, kwargs.get("dtype"))

    return made


def _no_grad(mode: bool = True) -> contextlib.AbstractContextManager:
    """In place of `torch.inference_mode`, whose tensors cannot be wrapped."""
    return torch.no_grad() if mode else contextlib.nullcontext()


@contextlib.contextmanager
def second_device() -> Iterator[str]:
    """The device "meta" holds numbers while this lasts; gives its name."""
    with contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, _then_moved(getattr(torch, name))))
        stack.enter_context(patch.object(torch, "inference_mode", _no_grad))
        stack.enter_context(SecondDevice())
        yield DEVICE


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), DEVICE])
def other_device(request) -> Iterator[str]:
    """A device that is not the CPU: CUDA where there is some, and the second device everywhere.

    On CUDA convolutions are computed in float32 proper: TF32 keeps 10 bits of a factor, so a bound that lets it pass
    hides faults up to 1e-3.
    """
    if request.param == DEVICE:
        with second_device():
            yield DEVICE
    else:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield request.param

