"""What a run must restore of weights and optimizers, and how tensors come back to where they belong."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class State:
    """Everything of the weights and optimizers that a run must restore, by name, on the CPU.
    networks: "network/parameter or buffer". ema: the same names. optimizers: "network/parameter/moment", the step count among
    them, whole whatever back end and number of ranks held them; and "group/loss_scale" under fp16."""

    networks: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizers: dict[str, Tensor]


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, laid out in order, that no further training changes."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy on the parameter's device; a moment also in its memory format, which fused kernels take for granted."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)


def load_networks(networks: nn.ModuleDict, state: Mapping[str, Tensor], what: str) -> None:
    """Load what a state holds of each network.
    Raises ValueError: a tensor is missing, or has another shape, or no network has it. No network was changed."""
    own = {f"{name}/{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}
    for key in sorted(own.keys() | state.keys()):
        there, here = _shape(state.get(key)), _shape(own.get(key))
        if there != here:
            raise ValueError(
                f"the {what} is of other networks: {key} is {there} there and {here} here. A run goes on with the networks "
                "that it began with: leave the settings of method and data as they were, or begin a run in another folder"
            )
    for name, network in networks.items():
        network.load_state_dict({k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")})


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a number"
