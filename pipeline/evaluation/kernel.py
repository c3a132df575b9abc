"""A probe of latents that is solved in closed form, not trained: Fisher's discriminant with a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KernelReader(nn.Module):
    """Reads which value of an attribute a latent has, by the kernel Fisher discriminant of several values.

    For a value v, μ_v is the mean feature vector of the records that have it. μ̄ is the mean of all μ_v, so that rare
    values count as much as common ones. Σ is the covariance of all records and ρ the ridge. The direction that tells v is
    d_v = (Σ + ρ)⁻¹ (μ_v - μ̄), and its separation is J_v = (μ_v - μ̄)ᵀ d_v.

    Features are those of the kernel exp(-|u - u'|² / 2F), where F numbers of a latent are standardised first. Two latents
    of usual distance then have the kernel e⁻¹, if their numbers are independent.

    The ridge decides how fine the reader sees. If it is too large, the reader misses what lies in directions of small
    variance. If it is too small, the reader learns the accidents of its records: with N records and F' features that the
    ridge leaves, a share of about F'/N of J is accident.

    A reader that was not fitted yet reads 0 everywhere. All its state is buffers.

    Args:
        size: F, the numbers of a latent.
        num_records: the largest number of records that it can be fitted to.
        slices: for each attribute, the columns of its values.
        ridge: ρ, as a share of the mean squared length of a feature vector about its mean.

    Source: Mika, Rätsch, Weston, Schölkopf, Müller 1999, "Fisher discriminant analysis with kernels",
    doi:10.1109/NNSP.1999.788121; several values: Rao 1948, section 7.
    """

    def __init__(self, size: int, num_records: int, slices: Sequence[slice], ridge: float) -> None:
        super().__init__()
        self.ridge, self.slices = ridge, list(slices)
        width = max(part.stop for part in self.slices)
        self.register_buffer("middle", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.register_buffer("known", torch.zeros(num_records, size))
        self.register_buffer("filled", torch.zeros(num_records))
        self.register_buffer("columns", torch.zeros(num_records))
        self.register_buffer("alphas", torch.zeros(num_records, width))
        self.register_buffer("separations", torch.zeros(width))
        self.register_buffer("centres", torch.zeros(width))

    @torch.no_grad()
    def fit(self, latents: Tensor, members: Tensor, filled: Tensor) -> None:
        """Solve for records.

        Args:
            latents: [num_records, size].
            members: [num_records, width], how far each record has each value; all 0 where the label is unknown. An
                attribute is not read when one of its values has no record.
            filled: [num_records], 1 where the row is a record and 0 where it is empty; empty rows have no members.
        """
        count = filled.sum().clamp(min=1)
        self.filled.copy_(filled)
        self.middle.copy_((latents * filled[:, None]).sum(0) / count)
        variance = ((latents - self.middle).square() * filled[:, None]).sum(0) / count
        self.spread.copy_(variance.sqrt().clamp(min=1e-3 * variance.mean().sqrt() + 1e-12))
        self.known.copy_((latents - self.middle) / self.spread * filled[:, None])
        with torch.autocast(self.known.device.type, enabled=False):
            kernel = self._kernel(self.known) * self.filled[:, None]
            self.columns.copy_(kernel.sum(0) / count)
            kernel = self._centred(kernel) * self.filled[:, None]
            shares = members / members.sum(0).clamp(min=1e-9)
            apart = shares.clone()
            for part in self.slices:
                apart[:, part] -= shares[:, part].mean(1, keepdim=True)
                apart[:, part] *= (members[:, part].sum(0) > 0).all()
            system = kernel / count
            system.diagonal().add_(self.ridge * system.diagonal().sum() + 1e-12 + (1 - self.filled))
            factor, _ = torch.linalg.cholesky_ex(system)  # latents that are not finite give a solution that is not, and no error
            self.alphas.copy_(torch.cholesky_solve(apart, factor))
            read = kernel @ self.alphas
            self.separations.copy_((apart * read).sum(0))
            for part in self.slices:
                self.centres[part] = shares[:, part].mean(1) @ read[:, part]

    def read(self, latents: Tensor) -> Tensor:
        """[N, size] latents to [N, width]: for each value d_vᵀ (φ - φ̄), where φ̄ is the mean of the records fitted to."""
        with torch.autocast(latents.device.type, enabled=False):
            standard = (latents - self.middle.to(latents.dtype)) / self.spread.to(latents.dtype)
            return self._centred(self._kernel(standard)) @ self.alphas.to(latents.dtype)

    def logits(self, latents: Tensor) -> Tensor:
        """[N, size] to [N, width]: the linear discriminant's log odds of each value, all of an attribute equally likely.

        Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; Rao 1948, equation 7.1.
        """
        return self.read(latents) - self.centres.to(latents.dtype) - self.separations.to(latents.dtype) / 2

    def _kernel(self, standard: Tensor) -> Tensor:
        """[N, size] to [N, num_records], 0 where there is no record."""
        known = self.known.to(standard.dtype)
        squares = standard.square().sum(1)[:, None] + known.square().sum(1) - 2 * standard @ known.T
        return (squares / (-2 * known.shape[1])).exp() * self.filled.to(standard.dtype)

    def _centred(self, kernel: Tensor) -> Tensor:
        columns, filled = self.columns.to(kernel.dtype), self.filled.to(kernel.dtype)
        count = filled.sum().clamp(min=1)
        return (kernel - kernel.sum(1, keepdim=True) / count - columns + columns.sum() / count) * filled
