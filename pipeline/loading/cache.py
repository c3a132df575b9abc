"""Decoded pictures kept in memory: where they fit, and the memory, on the device or shared by the ranks of a machine.

A record is kept from the first time it is decoded. The memory that ranks share has no name anywhere: it is an anonymous
file (memfd) that the others open through /proc, so it is not limited by the size of /dev/shm, and it is gone with the
last process that has it, however that process ends.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Cache = Literal["auto", "device", "host", "none"]

DEVICE_SHARE, HOST_SHARE = 0.5, 0.7
"""Of the free memory, what "auto" may take: training itself comes later and needs the rest."""


OnNode = Callable[[Any], list[Any]]
"""Takes a value of this rank and gives those of all ranks of this machine, in their order. They all call it together."""


def alone(value: Any) -> list[Any]:
    return [value]


def choose(cache: Cache, num_bytes: int, device: torch.device, on_node: OnNode = alone) -> tuple[Cache, str]:
    """Where `num_bytes` of decoded pictures are kept, the same on every rank of a machine, and why, in words.

    "device" is the memory of each rank's own device; of ranks on the CPU, of each process. "host" is one memory of the
    machine for all its ranks. "auto" takes the device where that leaves half of it free; the host where it leaves three
    tenths of that; none otherwise. Raises ValueError: a place was asked for that has no room.
    """
    if cache not in get_args(Cache):
        raise ValueError(f"unknown cache {cache!r}; there are: {', '.join(get_args(Cache))}")
    free = on_node((free_memory(device), free_memory(torch.device("cpu"))))
    on_device, on_host = (min(part) for part in zip(*free))
    ranks, on_cpu = len(free), device.type == "cpu"
    needed = num_bytes * (ranks if on_cpu else 1)
    copies = f" in {ranks} processes" if on_cpu and ranks > 1 else ""
    said = f"{_gigabytes(on_host)} of the machine's memory are free"
    if not on_cpu:
        said = f"{_gigabytes(on_device)} of {device} and {said}"
    if cache == "auto":
        if needed <= on_device * (HOST_SHARE if on_cpu else DEVICE_SHARE) and not (on_cpu and ranks > 1):
            cache = "device"
        else:
            cache = "host" if num_bytes <= on_host * HOST_SHARE else "none"
    elif cache == "device" and needed > on_device:
        raise ValueError(f"{_gigabytes(num_bytes)} of decoded pictures{copies} do not fit: {said}; set data.cache=auto")
    elif cache == "host" and num_bytes > on_host:
        raise ValueError(f"{_gigabytes(num_bytes)} of decoded pictures do not fit: {said}; set data.cache=none")
    return cache, f"{_gigabytes(num_bytes)}{copies if cache == 'device' else ''}; {said}"


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def free_memory(device: torch.device) -> float:
    """Bytes free on the device; infinite where the system does not say.

    Of the CPU: what the kernel calls available, and no more than the control groups of this process leave it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(Path("/proc/meminfo")), *_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _available(meminfo: Path) -> float:
    if not meminfo.exists():
        return float("inf")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _group_limits(own: Path, root: Path) -> Iterator[float]:
    """What each control group that this process is in, from its own up to the topmost, leaves of its limit."""
    yield float("inf")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        folder = root
        if controllers:  # version 1
            names, folder = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        parts = [part for part in place.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):  # in a container the own group may be mounted as the topmost
            group = folder.joinpath(*parts[:depth])
            try:
                limit, used = ((group / name).read_text().strip() for name in names[:2])
                fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield int(limit) - int(used) + int(fields.get(names[2], 0))  # files are let go when room is needed


class Kept:
    """uint8 pictures [n, S, S, C], of which some are there. Not safe from several threads. pixels: an array of this
    process, or one that it shares; or a tensor on the device. there: [n] uint8, 1 for each that is whole."""

    def __init__(self, pixels: np.ndarray | Tensor, there: np.ndarray, device: torch.device) -> None:
        self._pixels, self._there, self._device = pixels, there, device
        self._fence = threading.Lock()

    def absent(self, rows: np.ndarray) -> np.ndarray:
        return rows[self._there[rows] == 0]

    def missing(self, rows: np.ndarray, coming: np.ndarray) -> np.ndarray:
        """Those of `rows` [B] that are neither there nor among `coming` [n] bool: each once, in the order given."""
        missing = self.absent(rows)
        missing = missing[~coming[missing]]
        _, firsts = np.unique(missing, return_index=True)
        return missing[np.sort(firsts)]

    def put(self, rows: np.ndarray, pixels: Tensor) -> None:
        """Keep pixels [N, S, S, C] on the device as those of `rows`. Other processes see a record when it is whole."""
        if isinstance(self._pixels, Tensor):
            self._pixels.index_copy_(0, self._sent(rows), pixels)
        else:
            self._pixels[rows] = pixels.cpu().numpy()
        with self._fence:  # a lock taken and given back is a barrier also on processors that reorder writes
            pass
        with self._fence:
            self._there[rows] = 1

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self._there))

    def take(self, rows: np.ndarray) -> Tensor:
        """Pixels [N, S, S, C] on the device of `rows` [N], all of which must be there."""
        with self._fence:
            assert self._there[rows].all()
        if isinstance(self._pixels, Tensor):
            return self._pixels.index_select(0, self._sent(rows))
        return self._sent(self._pixels[rows])

    def _sent(self, array: np.ndarray) -> Tensor:
        """An array on the device; the copy to a CUDA device is not waited for."""
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)


def open_kept(
    cache: Literal["device", "host"], size: int, shape: tuple[int, ...], device: torch.device, on_node: OnNode = alone
) -> Kept:
    """Memory for `size` pictures of a shape [S, S, C], none of them there yet. With "host" every rank of the machine
    calls this, and all get the same memory. Raises ValueError: this rank cannot open what the first one made."""
    if cache == "host":
        there, pixels = _shared(size, shape, on_node)
        return Kept(pixels, there, device)
    on_cpu = device.type == "cpu"
    memory = np.empty((size, *shape), np.uint8) if on_cpu else torch.empty((size, *shape), dtype=torch.uint8, device=device)
    return Kept(memory, np.zeros(size, np.uint8), device)


def _shared(size: int, shape: tuple[int, ...], on_node: OnNode) -> tuple[np.ndarray, np.ndarray]:
    """What is there [size] uint8, and the pictures [size, *shape], in memory that the ranks of a machine share."""
    head = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    num_bytes = head + size * int(np.prod(shape))
    index = on_node(os.getpid()).index(os.getpid())
    handle = -1
    try:
        if index == 0:
            handle = os.memfd_create("fader-cache")
            os.ftruncate(handle, num_bytes)
        first = on_node(f"/proc/{os.getpid()}/fd/{handle}")[0]
        fault, memory = "", None
        try:
            if index:
                handle = os.open(first, os.O_RDWR)
            memory = mmap.mmap(handle, num_bytes)
        except OSError as error:
            fault = f"process {os.getpid()} cannot open the shared cache {first}: {error}"
        faults = [other for other in on_node(fault) if other]  # no rank goes on before all have opened it
        if faults:
            raise ValueError(f"{faults[0]}; set data.cache=device or none")
    finally:
        if handle >= 0:
            os.close(handle)
    whole = np.frombuffer(memory, np.uint8)
    return whole[:size], whole[head:num_bytes].reshape(size, *shape)
