"""A reader of latents that is solved for, not trained: the kernel Fisher discriminant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KernelReader(nn.Module):
    """What lies apart in the feature space of a Gaussian kernel, and how far: Fisher's discriminant, of several values.

    With μ_v the mean of those of value v, μ̄ the mean of the μ_v, so that rare values count alike, Σ the covariance of
    all and ρ the ridge, the direction of v is d_v = (Σ + ρ)⁻¹ (μ_v - μ̄), its separation J_v = (μ_v - μ̄)ᵀ d_v. The kernel
    is exp(-|u - u'|² / 2F) of F numbers, each standardised: e⁻¹ between two latents of usual distance, if the numbers are
    independent.

    The ridge sets how fine it reads. Too large, it is blind to what lies in directions of small variance; too small, it
    reads its records' chance: of J, about a share F'/N of N records is that, F' the features that the ridge leaves.

    All state is buffers. Before it is fit all it reads is 0.

    Args:
        size: F, numbers of a latent.
        num_records: the most it can be fit to.
        slices: the columns that are the values of one attribute, for each.
        ridge: ρ as a share of the mean squared length of a feature vector about its mean.

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
            members: [num_records, width], how much each is of each value; all 0 where that is not known. An attribute of
                which a value has no record is not read.
            filled: [num_records], 1 where there is a record and 0 where there is none; of members there are none then.
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
            factor, _ = torch.linalg.cholesky_ex(system)  # of what is not finite it makes what is not finite, no error
            self.alphas.copy_(torch.cholesky_solve(apart, factor))
            read = kernel @ self.alphas
            self.separations.copy_((apart * read).sum(0))
            for part in self.slices:
                self.centres[part] = shares[:, part].mean(1) @ read[:, part]

    def read(self, latents: Tensor) -> Tensor:
        """[N, size] latents to [N, width]: for each value d_vᵀ (φ - φ̄), φ̄ the mean of all it was fit to; differentiable."""
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
