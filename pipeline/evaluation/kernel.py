"""A probe of latents that is solved in closed form, not trained: Fisher's discriminant with a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KernelReader:
    """Reads which value of an attribute a latent has, by the kernel Fisher discriminant of several values.

    For a value v, μ_v is the mean feature vector of the records that have it. μ̄ is the mean of all μ_v, so that rare
    values count as much as common ones. Σ is the covariance of all records and ρ the ridge. The direction that tells v is
    d_v = (Σ + ρ)⁻¹ (μ_v - μ̄), and its separation is J_v = (μ_v - μ̄)ᵀ d_v. Features are those of the kernel exp(-|u -
    u'|² / 2F), where F numbers of a latent are standardised first.

    latents: [N, F] of the records that it learns from. members: [N, width], how far each record has each value, 0 where
    the label is unknown; slices: for each attribute, the columns of its values. ridge: ρ, as a share of the mean squared
    length of a feature vector about its mean: if it is too large, directions of small variance are missed; if too small,
    accidents learnt.

    Source: Mika, Rätsch, Weston, Schölkopf, Müller 1999, "Fisher discriminant analysis with kernels",
    doi:10.1109/NNSP.1999.788121; several values: Rao 1948, section 7.
    """

    def __init__(self, latents: Tensor, members: Tensor, slices: Sequence[slice], ridge: float) -> None:
        count, self.middle = len(latents), latents.sum(0) / len(latents)
        variance = (latents - self.middle).square().sum(0) / count
        self.spread = variance.sqrt().clamp(min=1e-3 * variance.mean().sqrt() + 1e-12)
        self.known = (latents - self.middle) / self.spread
        kernel = self._kernel(self.known)
        self.columns = kernel.sum(0) / count
        kernel = self._centred(kernel)
        shares = members / members.sum(0).clamp(min=1e-9)
        apart = shares.clone()
        for part in slices:
            apart[:, part] -= shares[:, part].mean(1, keepdim=True)
            apart[:, part] *= (members[:, part].sum(0) > 0).all()
        system = kernel / count
        system.diagonal().add_(ridge * system.diagonal().sum() + 1e-12)
        factor, _ = torch.linalg.cholesky_ex(system)  # latents that are not finite give a solution that is not, and no error
        self.alphas = torch.cholesky_solve(apart, factor).contiguous()
        read = kernel @ self.alphas
        self.separations = (apart * read).sum(0)
        self.centres = torch.cat([shares[:, part].mean(1) @ read[:, part] for part in slices])

    def read(self, latents: Tensor) -> Tensor:
        """[N, F] latents to [N, width]: for each value d_vᵀ (φ - φ̄), where φ̄ is the mean of the records learnt from."""
        return self._centred(self._kernel((latents - self.middle) / self.spread)) @ self.alphas

    def logits(self, latents: Tensor) -> Tensor:
        """[N, F] to [N, width]: the linear discriminant's log odds of each value, all of an attribute equally likely.

        Source: Fisher 1936, doi:10.1111/j.1469-1809.1936.tb02137.x; Rao 1948, equation 7.1.
        """
        return self.read(latents) - self.centres - self.separations / 2

    def _kernel(self, standard: Tensor) -> Tensor:
        squares = standard.square().sum(1)[:, None] + self.known.square().sum(1) - 2 * standard @ self.known.T
        return (squares / (-2 * self.known.shape[1])).exp()

    def _centred(self, kernel: Tensor) -> Tensor:
        return kernel - kernel.sum(1, keepdim=True) / len(self.known) - self.columns + self.columns.sum() / len(self.known)
