"""Random numbers that belong to a record: the same on any rank, any device, in any order of asking.

A number is a pure function of (key, record, name, position), and the key is one of (seed, stream, draw). Nothing is
consumed, so nothing has to be restored: a resumed run, or the same run on another number of ranks, sees the same flips
and the same noise. The key is a tensor on the device, so that every step is the same sequence of kernels.

The mixer is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators", OOPSLA), applied once for each part of the key.
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The two's complement reading of an unsigned 64-bit integer, which is what torch.int64 holds."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the copied sign bits are masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def key_of(*parts: object) -> int:
    """A signed 64-bit key of any printable parts, the same in every process and every version of Python."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@functools.lru_cache
def _key_of_name(name: str) -> int:
    return key_of(name)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch, keyed by record.
    key: scalar int64 on the device of `index`, see `Draws.of`. index: [N] int64, the record's row in its split.
    host_key: the key as a Python number, for the host alone: the engine seeds dropout from it, and no loss reads it."""

    key: Tensor
    index: Tensor
    host_key: int

    @staticmethod
    def of(seed: int, stream: str, draw: int, index: Tensor) -> "Draws":
        """The numbers of one draw of a stream.
        seed: the run's seed (with its salt mixed in by whoever makes the batch).
        stream: the name of the sequence of batches this batch belongs to. draw: how many batches of the stream came before.
        index: [N] int64, the record's row in its split."""
        key = key_of(seed, stream, draw)
        return Draws(torch.full((), key, dtype=torch.int64, device=index.device), index, key)

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """[N, *shape] int64, 64 random bits each."""
        width = math.prod(shape)
        record = _mix(self.index * _signed(_GOLDEN) + _mix(self.key + _key_of_name(name)))
        position = torch.arange(1, width + 1, device=self.index.device, dtype=torch.int64) * _signed(_GOLDEN)
        return _mix(_mix(record[:, None] + position[None, :])).view(len(self.index), *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[N, *shape] float32, uniform on [0, 1) in steps of 2^-24."""
        return _shift_right(self._bits(name, shape), 40).to(torch.float32) * 2.0**-24

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """[N, *shape] float32, standard normal (Box and Muller 1958)."""
        bits = self._bits(name, shape)
        radius = (_shift_right(bits, 40).to(torch.float32) + 0.5) * 2.0**-24
        angle = ((bits & 0xFFFFFF).to(torch.float32)) * (2.0**-24 * 2.0 * math.pi)
        return torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)

    def integers(self, name: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """[N, *shape] int64, uniform on 0 … high-1 (bias below 2^-40 for the small `high` used here)."""
        if high < 1:
            raise ValueError(f"integers below {high} do not exist; high must be at least 1")
        return _shift_right(self._bits(name, shape), 8) % high
