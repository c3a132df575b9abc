"""A critic of latents that is solved, not learnt: what a reader of any shape could make of those seen last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fader.attributes import Attributes
from fader.kernel import KernelReader
from fader.method import Rows
from fader.networks.layers import wide

_MOST = 16_384  # the kernel of so many takes 1 GiB, and 1.5e12 operations to solve


class KernelCritic(nn.Module):
    """How far apart an attribute's values lie in a latent, by the kernel Fisher discriminant of the latents seen last.

    It reads more than `FisherCritic`, whose moments fall behind the encoder and whose features are few, and takes more time.

    The separation of attribute a with k values is J = 1/k Σ_v J_v (see `KernelReader`). It is 0 when no reader can tell. A
    continuous attribute counts as its two ends, each record in proportion. The ridge sets what it sees: a linear reader with
    a ridge of a tenth of the mean variance told Male with 0.81 from latents of which one with three thousandths of it told
    0.86, for an encoder hides what it knows in directions of small variance.

    All state is buffers: every rank keeps the same, and a checkpoint holds them.

    Args:
        size: numbers of a latent.
        num_records: latents that are remembered, the last ones seen.
        ridge: of the reader.

    Raises:
        ValueError: num_records or ridge is not positive, or there are too many records to solve.
    """

    def __init__(self, attributes: Attributes, size: int, num_records: int = 4_096, ridge: float = 1e-3) -> None:
        super().__init__()
        if num_records < 1 or ridge <= 0:
            raise ValueError(f"num_records {num_records} and ridge {ridge:g} must be positive")
        if num_records > _MOST:
            raise ValueError(f"{num_records:,} latents are too many to solve for; {_MOST:,} are the most")
        self.reader = KernelReader(size, num_records, attributes.code_slices(), ridge)
        width = attributes.code_width
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # where the next one goes, but for full rounds
        self.register_buffer("latents", torch.zeros(num_records, size))
        self.register_buffer("members", torch.zeros(num_records, width))
        self.register_buffer("weights", torch.zeros(width))  # one over k and the share of all records that have the value

    @torch.no_grad()
    def observe(self, attributes: Attributes, latent: Tensor, labels: Tensor, gather: Rows) -> None:
        """Remember a batch of all ranks, in train mode. latent: [N, size]. labels: [N, A], -1 = unknown.

        A batch in which anything is not finite is left out, on every rank and without waiting for the device.
        """
        if not self.training:
            return
        capacity, size = self.latents.shape
        rows = gather(torch.cat([wide(latent), attributes.members(labels).to(wide(latent).dtype)], 1))[-capacity:]
        rows = rows.to(self.latents.dtype)
        sound = rows.isfinite().all()
        places = (self.seen + torch.arange(len(rows), device=rows.device)) % capacity
        for kept, new in zip((self.latents, self.members), rows.split([size, rows.shape[1] - size], 1)):
            kept[places] = torch.where(sound, new, kept[places])
        self.seen += len(rows) * sound

    @torch.no_grad()
    def solve(self) -> None:
        """Take what is remembered now as what `estimates` reads by; 0 of an attribute that has a value which was not seen."""
        filled = (torch.arange(len(self.latents), device=self.seen.device) < self.seen).to(self.latents.dtype)
        self.reader.fit(self.latents, self.members, filled)
        shares = (self.members.sum(0) / filled.sum().clamp(min=1)).clamp(min=1e-6)
        for part in self.reader.slices:
            self.weights[part] = 1 / (shares[part] * (part.stop - part.start))

    @property
    def separations(self) -> Tensor:
        """[A], by the last solution."""
        return torch.stack([self.reader.separations[part].mean() for part in self.reader.slices])

    def read(self, attributes: Attributes, latent: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each record's part of the separations [N], and these [A], by the last solution. As `estimates`."""
        return self.estimates(attributes, latent, labels), self.separations

    def estimates(self, attributes: Attributes, latent: Tensor, labels: Tensor) -> Tensor:
        """What each record adds to the sum of all separations, as far as its own latent goes, by the last solution: its
        mean over a batch of other records is an unbiased estimate of how that tells them apart, and its gradient moves
        the values of an attribute together.

        Args:
            latent: [N, size], with gradients. labels: [N, A].

        Returns:
            [N], float64 where the latent is and float32 else; of either sign.
        """
        latent = wide(latent)
        read = self.reader.read(latent) * self.weights.to(latent.dtype)
        return (read * attributes.members(labels)).sum(1)
