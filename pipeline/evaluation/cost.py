"""Table 5: what a model costs to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pipeline.models import Model


def cost_of(model: Model, device: torch.device, batch_size: int, seconds: float = 0.5) -> dict[str, Any]:
    """Parameters of each network, floating-point operations of one image, images a second."""
    method: Any = model.method
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in method.networks.items()}
    cost: dict[str, Any] = {
        "parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }
    size = model.preprocessing.image_size
    shape = (model.preprocessing.channels, size, size)
    with torch.inference_mode():
        labels = torch.zeros(batch_size, len(model.attributes), device=device)
        images = torch.zeros(batch_size, *shape, device=device)
        code = model.attributes.code(labels)
        latent = method.encode(images, labels)
        single = method.encode(images[:1], labels[:1])
        calls = {
            "encode": (partial(method.encode, images[:1], labels[:1]), partial(method.encode, images, labels)),
            "decode": (partial(method.decode, single, code[:1]), partial(method.decode, latent, code)),
        }
        for name, (one, all_) in calls.items():
            cost[f"{name}_flops"] = _flops(one)
            cost[f"{name}_images_per_second"] = batch_size / _duration(all_, device, seconds)
    return cost


def _flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products; a multiply and an add are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _duration(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds a call takes: the mean over as many as fit in `seconds`, after one to warm up."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    start, calls = clock(), 0
    while True:
        call()
        calls += 1
        if (now := clock()) - start >= seconds:
            return (now - start) / calls
