"""The solved reader against the same discriminant in explicit features."""

from __future__ import annotations

import torch

from pipeline.evaluation.probe import KernelReader

SLICES = [slice(0, 3), slice(3, 5)]


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """[120, 4] latents of very different scales, and a label of three values that shows in the first of them."""
    chance = torch.Generator().manual_seed(3)
    latents = torch.randn(120, 4, generator=chance, dtype=torch.float64) * torch.tensor([9.0, 1.0, 1.0, 0.2]) - 2
    labels = torch.stack([torch.randint(0, k, (120,), generator=chance) for k in (3, 2)], 1)
    latents[:, 0] += 6 * labels[:, 0]
    return latents, labels


def members(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([(labels[:, j, None] == torch.arange(k)).double() for j, k in enumerate((3, 2))], 1)


def fitted(latents: torch.Tensor, labels: torch.Tensor) -> KernelReader:
    return KernelReader(latents, members(labels), SLICES, ridge=1e-2)


def test_it_is_the_linear_discriminant_in_the_features_of_its_kernel():
    """Coordinates whose products are the kernel's, and the discriminant in them by means and covariance."""
    latents, labels = drawn()
    reader = fitted(latents, labels)
    unit = (latents - latents.mean(0)) / latents.std(0, correction=0)
    values, vectors = torch.linalg.eigh((torch.cdist(unit, unit).square() / -8).exp())
    features = vectors * values.clamp(min=0).sqrt()
    covariance = features.T.cov(correction=0)
    covariance += 1e-2 * covariance.trace() * torch.eye(len(covariance))
    for j, part in enumerate(SLICES):
        means = torch.stack([features[labels[:, j] == value].mean(0) for value in range(part.stop - part.start)])
        middle = means.mean(0)
        directions = torch.linalg.solve(covariance, (means - middle).T)
        apart = ((means - middle).T * directions).sum(0)
        assert torch.allclose(reader.separations[part], apart, rtol=1e-6)
        assert torch.allclose(reader.read(latents)[:, part], (features - features.mean(0)) @ directions, rtol=1e-6, atol=1e-8)
        logits = (features - middle) @ directions - apart / 2
        assert torch.allclose(reader.logits(latents)[:, part], logits, rtol=1e-6, atol=1e-8)
        near = ((features[:, None] - means) @ torch.linalg.inv(covariance) * (features[:, None] - means)).sum(-1)
        assert torch.equal(reader.logits(latents)[:, part].argmax(1), near.argmin(1)), "the nearest mean"


def test_of_what_nobody_has_it_reads_nothing():
    latents, labels = drawn()
    labels[:, 1] = 0
    reader = fitted(latents, labels)
    assert not reader.read(latents)[:, SLICES[1]].any() and reader.read(latents)[:, SLICES[0]].any()
