"""Measures of pictures, of judged attributes and of sliders: pure functions of tensors, in float64 where sums are long.

Nothing here knows of files, ranks or networks. Images are [N, C, H, W] in [-1, 1], so the peak-to-peak range is 2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PEAK = 2.0
SSIM_FROM = 11  # pixels a side: the window
MS_SSIM_FROM = 176  # pixels a side: below, the coarsest of MS-SSIM's five scales is smaller than its window
_MSE_FLOOR = 1e-10  # so that a perfect picture has a finite PSNR: 106.0 dB
_BOOTSTRAP_CELLS = 4_000_000  # resampling weights held at once: 32 MB in float64


_LOWER = ("mse", "shift", "leak", "fid", "kid", "wcis", "bcfid", "wcfid", "judge_ece", "twin_inside", "twin_outside")


def lower_is_better(name: str) -> bool:
    """Whether a metric of the tables, named without its split, is the better the lower it is."""
    return name.partition(".")[0] in _LOWER


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `hits` in `count` answers. Source: Wilson 1927, the score interval."""
    share, z2 = hits / count, 1.959964**2
    middle, width = share + z2 / (2 * count), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count)
    return max(0.0, (middle - width) / (1 + z2 / count)), min(1.0, (middle + width) / (1 + z2 / count))


def mse(images: Tensor, target: Tensor) -> Tensor:
    """[N] float64 mean squared difference of each image, over its channels and pixels, on [-1, 1].
    Raises ValueError: shapes disagree."""
    _same(images, target)
    return (images.double() - target.double()).square().flatten(1).mean(1)


def psnr(mean_squared: Tensor) -> Tensor:
    """[N] peak signal-to-noise ratio in dB: 10·log10(2² / MSE), at most 106.0 dB."""
    return 10 * torch.log10(PEAK**2 / mean_squared.double().clamp(min=_MSE_FLOOR))


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """[N] structural similarity, 1 for equal images; Gaussian window of 11 pixels, sigma 1.5.
    Raises ValueError: shapes disagree, or a side is under 11 pixels.
    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity"; torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return _similarity(structural_similarity_index_measure, "SSIM's window needs", SSIM_FROM, images, target)


def ms_ssim(images: Tensor, target: Tensor) -> Tensor:
    """[N] multi-scale structural similarity over five scales, 1 for equal images.
    Raises ValueError: shapes disagree, or a side is under 176 pixels.
    Source: Wang, Simoncelli, Bovik 2003, "Multiscale structural similarity for image quality assessment"; torchmetrics."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return _similarity(multiscale_structural_similarity_index_measure, "MS-SSIM's five scales need", MS_SSIM_FROM, images, target)


def _similarity(measure: Callable[..., Any], needs: str, smallest: int, images: Tensor, target: Tensor) -> Tensor:
    _same(images, target)
    if min(images.shape[-2:]) < smallest:
        raise ValueError(f"images are {tuple(images.shape[-2:])} pixels; {needs} {smallest} a side")
    return measure(images.float(), target.float(), data_range=PEAK, reduction="none").reshape(len(images)).double()


def _same(images: Tensor, target: Tensor) -> None:
    if images.shape != target.shape or images.ndim != 4:
        found = f"{tuple(images.shape)} and {tuple(target.shape)}"
        raise ValueError(f"images are {found}; both must be the same [N, C, H, W]")


def balanced_accuracy(preds: Tensor, labels: Tensor, k: int) -> float:
    """Mean over the values that occur of the share of their records that are right; unknown labels (-1) left out.
    Always guessing one value scores 1/k. Not a number when no label is known.
    preds, labels: [N], 0 … k-1."""
    shares = [(preds[labels == value] == value).double().mean().item() for value in range(k) if (labels == value).any()]
    return sum(shares) / len(shares) if shares else math.nan


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.
    scores: [N], higher for "present". labels: [N], 0 or 1, -1 = unknown (left out).
    Returns: 0.5 when the scores tell nothing; not a number when one of the two classes is empty.
    Source: the Mann-Whitney form, Hanley and McNeil 1982."""
    known = labels >= 0
    scores, positive = scores[known].double(), labels[known] == 1
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[place]  # the mean of the ranks that equal scores share
    above = ranks[positive].sum().item() - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def calibration_error(confidence: Tensor, right: Tensor, weights: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, over bins of equal width.

    confidence: [N] probability of the value judged, in [0, 1]. right: [N] bool, whether the value judged is the label.
    weights: [N] what each record counts for; 0 leaves it out.
    Returns: Σ over bins of the bin's share of the weight times |mean confidence - accuracy|; not a number without weight.
    Source: Guo et al. 2017, arXiv:1706.04599, equation 3, with weights.
    """
    total = weights.double().sum()
    if not total:
        return math.nan
    bin_of = (confidence * bins).long().clamp(0, bins - 1)
    gap = weights.double() * (confidence.double() - right.double())
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, gap).abs().sum() / total)


def means(values: Tensor, counted: Tensor) -> Tensor:
    """[D] float64 mean of each column over its counted records; not a number where none is counted.
    values: [N, D]. counted: [N, D] bool."""
    counted = counted.double()
    return (torch.where(counted > 0, values.double(), 0.0)).sum(0) / counted.sum(0)


def bootstrap_means(values: Tensor, counted: Tensor, *, seed: int, resamples: int = 1000) -> Tensor:
    """The same means over records drawn with replacement, [resamples, D] float64.

    Whole records are drawn, so columns of one resample belong together: a mean over columns keeps their correlation.
    A pure function of its arguments: a torch generator on the CPU, seeded with `seed`.

    values: [N, D]. counted: [N, D] bool: which records belong to the column at all.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    num_records, num_columns = values.shape
    if not num_records or not resamples:
        return torch.full((resamples, num_columns), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    counted = counted.double().cpu()
    values = torch.where(counted > 0, values.double().cpu(), 0.0)
    chunk = max(1, _BOOTSTRAP_CELLS // num_records)
    rows = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = torch.randint(num_records, (size, num_records), generator=generator)
        weights = torch.zeros(size, num_records, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(size, num_records))
        rows.append((weights @ values) / (weights @ counted))
    return torch.cat(rows)


def interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of [resamples] numbers, by percentiles; those that are not a number are left out."""
    resampled = resampled[~resampled.isnan()]
    if not len(resampled):
        return math.nan, math.nan
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    low, high = torch.quantile(resampled, tails).tolist()
    return low, high


def monotonic_share(response: Tensor, fall: float = 0.01, rise: float = 0.05) -> float:
    """Share of records whose response rises along the slider and never turns back.
    A record counts when it never falls by more than `fall` from one point to the next and ends more than `rise` above where it
    began, so a slider that changes nothing scores 0.
    response: [N, P] the judge's probability of the attribute at each of P slider positions."""
    steps = response.diff(dim=1)
    good = (steps >= -fall).all(1) & (response[:, -1] - response[:, 0] > rise)
    return good.double().mean().item() if len(good) else math.nan


def effective_range(response: Tensor, positions: Sequence[float]) -> tuple[float, float]:
    """Between which slider positions the mean response does the middle 80% of what it does from end to end.
    response: [P] mean probability at each position. positions: [P] rising.
    Returns: The positions (interpolated) at which the response first stands at 10% and at 90% of the way from its first to its
    last value; not numbers when it does not rise by at least 0.01 in all."""
    travel = float(response[-1] - response[0])
    if not travel >= 0.01:
        return math.nan, math.nan
    share = [(float(value) - float(response[0])) / travel for value in response]

    def first(level: float) -> float:
        i = next(i for i in range(1, len(share)) if share[i] >= level)  # the last share is 1
        return positions[i - 1] + (level - share[i - 1]) / (share[i] - share[i - 1]) * (positions[i] - positions[i - 1])

    return first(0.1), first(0.9)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution fitted to features. The covariance is factor' · factor, of any rank.
    mean: [F] float64. factor: [R, F] float64."""

    mean: Tensor
    factor: Tensor

    @staticmethod
    def fit(features: Tensor, correction: int = 1) -> "Gaussian":
        """Of [N, F] features; the covariance divides by N - correction. Raises ValueError: fewer than two features."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features are {tuple(features.shape)}; a covariance needs [N, F] with N at least 2")
        features = features.double()
        mean = features.mean(0)
        factor = (features - mean) / math.sqrt(len(features) - correction)
        if len(factor) > factor.shape[1]:  # R of A = QR has the same R'R = A'A in fewer rows
            factor = torch.linalg.qr(factor, mode="r").R
        return Gaussian(mean, factor)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), the squared Wasserstein-2 distance of two normal distributions.

    With Σ = F'F the trace of the root is the sum of the singular values of F₁F₂', which holds for covariances of any
    rank: no root of a singular matrix is taken and nothing is added to its diagonal.

    Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500 (FID).
    """
    root = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    return max(float((a.mean - b.mean).square().sum() + traces - 2 * root), 0.0)


def kernel_distance(a: Tensor, b: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000) -> tuple[float, float]:
    """Kernel distance (KID) of two sets of features: unbiased squared MMD with the kernel (x·y / F + 1)³.

    a, b: [N, F] and [M, F].
    subsets, subset_size: the mean is over so many draws, without replacement, of so many features of each set (of all, where
        there are fewer).
    Returns: Mean and standard deviation over subsets. The mean may be a little below 0.
    Raises ValueError: fewer than two features in a set.
    Source: Bińkowski et al. 2018, arXiv:1801.01401.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"{len(a)} and {len(b)} features; the kernel distance needs at least 2 of each")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:size].to(part.device)].double() for part in (a, b))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (size * (size - 1))
        found.append(float(within - 2 * xy.mean()))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def inception_scores(probabilities: Tensor, classes: Tensor) -> tuple[float, float, float]:
    """(IS, BCIS, WCIS): how much a classifier's answers vary over all images, between classes, and within a class.

    IS = exp E KL(p(y|x) ‖ p(y)); BCIS = exp E KL(p(y|c) ‖ p(y)), more is better; WCIS = exp E KL(p(y|x) ‖ p(y|c)), less is
    better. Classes weigh as many as they have images, so IS = BCIS · WCIS.
    probabilities: [N, K], rows that sum to 1. classes: [N] the class each image was made for (any integers).
    Source: Salimans et al. 2016, arXiv:1606.03498; Benny et al. 2021, arXiv:2004.12361.
    """
    p = probabilities.double()
    _, place, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    of_class = torch.zeros(len(counts), p.shape[1], dtype=p.dtype, device=p.device).index_add_(0, place, p)
    of_class = of_class / counts[:, None]
    everywhere = p.mean(0, keepdim=True)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(1)

    total = divergence(p, everywhere).mean()
    between = divergence(of_class[place], everywhere).mean()
    within = divergence(p, of_class[place]).mean()
    return float(total.exp()), float(between.exp()), float(within.exp())


def conditional_frechet(real: Sequence[Tensor], generated: Sequence[Tensor], correction: int = 1) -> tuple[float, float]:
    """(BCFID, WCFID): Fréchet distance between the classes' means, and within a class averaged over classes.

    Every class weighs alike. BCFID compares the normal distributions of the class means (covariance over classes, divided by
    their number); WCFID is the mean over classes of the Fréchet distance of their features. With equally large classes and
    `correction` 0, FID ≤ BCFID + WCFID.
    real, generated: for each class [N, F] features, at least two.
    Source: Benny et al. 2021, arXiv:2004.12361.
    """
    if len(real) != len(generated) or not real:
        raise ValueError(f"{len(real)} and {len(generated)} classes; both sides need the same, and one at least")
    fitted = [[Gaussian.fit(features, correction) for features in side] for side in (real, generated)]
    between = [_of_means([gaussian.mean for gaussian in side]) for side in fitted]
    within = [frechet_distance(a, b) for a, b in zip(*fitted)]
    return frechet_distance(*between), sum(within) / len(within)


def _of_means(means: Sequence[Tensor]) -> Gaussian:
    """Fitted to class means as if they were all there is; a single one has no spread."""
    return Gaussian.fit(torch.stack(list(means)), 0) if len(means) > 1 else Gaussian(means[0], 0 * means[0][None])
