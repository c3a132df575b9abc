"""Blur, rescaling and reduction of square pictures: each is a product with one matrix from the left and from the right."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE_SIZE = 64  # pixels a side at which a blur's sigma is named; at another size it is scaled with the side


def blur_matrices(sigma: Tensor, size: int) -> Tensor:
    """Return [N, S, S] matrices whose rows are Gaussian weights that sum to 1.
    sigma: [N] in pixels of a picture of 64 pixels a side; 0 gives the identity."""
    place = torch.arange(size, device=sigma.device, dtype=torch.float32)
    scaled = (sigma * (size / REFERENCE_SIZE)).clamp(min=0.05)[:, None, None]  # at 0.05 the neighbours weigh 1e-87
    weights = torch.exp(-((place[:, None] - place[None, :]) ** 2) / (2 * scaled**2))
    return weights / weights.sum(2, keepdim=True)


@functools.lru_cache
def rescaling_matrices(size: int, device: torch.device) -> Tensor:
    """Return [S + 1, S, S] matrices: that of number r shrinks S pixels to r and grows them again, bilinearly."""
    identity = torch.eye(size)[None, None]
    rows = [identity[0, 0]]
    for r in range(1, size + 1):
        small = F.interpolate(identity, (r, size), mode="bilinear", antialias=True)
        rows.append(F.interpolate(small, (size, size), mode="bilinear")[0, 0])
    return torch.stack(rows).to(device)


def filtered(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply matrices [N, S, S] or [1, S, S] to the rows and to the columns of images [N, C, S, S]."""
    matrices = matrices[:, None].to(images.dtype)
    return matrices @ images @ matrices.transpose(2, 3)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Blur images [N, C, S, S] alike; sigma is in pixels of a picture of 64 pixels a side."""
    return filtered(images, blur_matrices(torch.tensor([sigma], device=images.device), images.shape[-1]))


def reduced(images: Tensor, size: int) -> Tensor:
    """Shrink images [N, C, S, S] to `size` pixels a side by the antialiased triangle; those of that size stay as they are."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
