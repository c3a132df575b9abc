"""Similarities of the plane: what turns, scales and shifts a picture without distorting it.

Points are complex numbers x + iy, so a similarity is z → factor · z + shift: the modulus of `factor` scales, its argument turns
(clockwise on a screen, where y grows downwards). Works on Python's complex numbers and on complex tensors alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Similarity:
    """z → factor · z + shift; both complex, or complex tensors [N] for N similarities."""

    factor: Any = 1 + 0j
    shift: Any = 0j

    def __call__(self, points: Any) -> Any:
        """Complex points to complex points; a tensor of similarities [N] takes points [N] or one point."""
        return self.factor * points + self.shift

    def __matmul__(self, first: "Similarity") -> "Similarity":
        """(a @ b)(z) = a(b(z))."""
        return Similarity(self.factor * first.factor, self.factor * first.shift + self.shift)

    def inverse(self) -> "Similarity":
        return Similarity(1 / self.factor, -self.shift / self.factor)

    @staticmethod
    def between(source: tuple[complex, complex], target: tuple[complex, complex]) -> "Similarity":
        """The one that takes two points to two points.
        Raises ValueError: the two points of a pair coincide, so that no turn or scale follows from them."""
        if source[0] == source[1] or target[0] == target[1]:
            raise ValueError(f"{source} to {target}: two points that coincide say nothing of turn and scale")
        factor = (target[1] - target[0]) / (source[1] - source[0])
        return Similarity(factor, target[0] - factor * source[0])


def positions(size: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[size, size] complex: the centres of the pixels of a square whose edges are at -1 and 1."""
    line = (torch.arange(size, device=device, dtype=dtype) * 2 + 1) / size - 1
    return torch.complex(line[None, :].expand(size, size), line[:, None].expand(size, size))


def sample(images: Tensor, points: Tensor) -> Tensor:
    """Pictures [N, C, H, W] read at complex points [N, h, w], bilinear: [N, C, h, w].
    -1 and 1 are the edges of the picture; what lies beyond is its mirror image."""
    grid = torch.view_as_real(points).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
