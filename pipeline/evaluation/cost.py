"""Table 5: what a model costs to run."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fader.method import Method
from fader.networks.normalization import num_parameters
from pipeline.models import Model, editor, sampler


def cost_of(model: Model, device: torch.device, batch_size: int, seconds: float = 0.5) -> dict[str, Any]:
    method = model.method
    cost: dict[str, Any] = {
        "parameters": {name: num_parameters(net) for name, net in method.networks.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }
    with torch.inference_mode():
        one, many = (dict(_calls(method, records, device)) for records in (1, batch_size))
        for verb in one:
            cost[f"{verb}_flops"] = _flops(one[verb])
            cost[f"{verb}_images_per_second"] = batch_size / _duration(many[verb], device, seconds)
    return cost


def _calls(method: Method, records: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a method does to so many blank records, by the verb."""
    labels = torch.zeros(records, len(method.attributes), device=device)
    code, edits, samples = method.attributes.code(labels), editor(method), sampler(method)
    if edits is not None:
        images = torch.zeros(records, method.channels, method.image_size, method.image_size, device=device)
        latent = edits.encode(images, labels)
        yield "encode", partial(edits.encode, images, labels)
        yield "decode", partial(edits.decode, latent, code)
    if samples is not None:
        yield "sample", partial(samples.sample, torch.zeros(records, samples.noise_width, device=device), code)


def _flops(call: Callable[[], Any]) -> int:
    """Count the floating-point operations of convolutions and matrix products; a multiply and an add are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _duration(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds that a call takes: the mean over as many as fit in `seconds`, after one to warm up."""

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
