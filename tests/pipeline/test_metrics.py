"""Measures against numbers worked by hand, closed forms and other implementations."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline import metrics


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_mse_is_a_mean_for_each_image_on_the_scale_of_the_images():
    images, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    target[0] = 1
    target[1, 0, 0, 0] = 2
    assert metrics.mse(images, target).tolist() == pytest.approx([1.0, 4 / 48])
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        metrics.mse(images, target[:1])


def test_psnr_has_a_peak_of_two_and_is_finite_for_equal_images():
    assert metrics.psnr(torch.tensor([4.0, 0.04, 0.0])).tolist() == pytest.approx([0.0, 20.0, 106.0206], abs=1e-4)


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = noise(1, 3, 16, 16), noise(1, 3, 16, 16, seed=1)
    expected = float(peak_signal_noise_ratio(a, b, data_range=2.0))
    assert float(metrics.psnr(metrics.mse(a, b))) == pytest.approx(expected, rel=1e-6)


def test_ssim_is_one_for_equal_images_and_falls_with_noise_image_by_image():
    clean = noise(3, 3, 16, 16).cumsum(3) / 4
    worse = clean + torch.tensor([0.0, 0.1, 1.0])[:, None, None, None] * noise(3, 3, 16, 16, seed=1)
    a, b, c = metrics.ssim(worse, clean).tolist()
    assert a == pytest.approx(1.0, abs=1e-6) and 1 > b > c
    assert float(metrics.ssim(worse[1:2], clean[1:2])) == pytest.approx(b, abs=1e-6), "one image must not feel another"


def test_ms_ssim_from_its_smallest_size_up():
    images = noise(2, 3, metrics.MS_SSIM_FROM, metrics.MS_SSIM_FROM)
    assert metrics.ms_ssim(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    with pytest.raises(ValueError, match="176"):
        metrics.ms_ssim(images[..., :64, :64], images[..., :64, :64])


def test_balanced_accuracy_counts_each_value_alike_and_leaves_unknown_out():
    labels = torch.tensor([0, 0, 0, 0, 1, -1, -1])
    assert metrics.balanced_accuracy(torch.tensor([0, 0, 0, 1, 1, 0, 1]), labels, 2) == pytest.approx((0.75 + 1) / 2)
    assert metrics.balanced_accuracy(torch.zeros(7), labels, 2) == 0.5
    assert math.isnan(metrics.balanced_accuracy(torch.zeros(2), torch.tensor([-1, -1]), 2))


def test_auc_by_hand_with_ties_and_unknown_labels():
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4, 9.0])
    labels = torch.tensor([0, 0, 1, 1, 1, -1])
    # pairs (positive, negative): .35>.1, .35<.4, .8>.1, .8>.4, .4>.1, .4=.4
    assert metrics.auc(scores, labels) == pytest.approx(4.5 / 6)
    assert metrics.auc(torch.zeros(6), labels) == 0.5
    assert math.isnan(metrics.auc(scores, torch.ones(6)))


def test_calibration_error_by_hand_with_weights():
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.99])
    right = torch.tensor([True, False, True, True, False])
    weights = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0])
    assert metrics.calibration_error(confidence, right, weights) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert math.isnan(metrics.calibration_error(confidence, right, torch.zeros(5)))


def test_calibration_error_agrees_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 3, generator=generator).softmax(1)
    labels = torch.randint(0, 3, (500,), generator=generator)
    expected = multiclass_calibration_error(probabilities, labels, num_classes=3, n_bins=15, norm="l1")
    found = metrics.calibration_error(probabilities.amax(1), probabilities.argmax(1) == labels, torch.ones(500))
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_bootstrap_is_deterministic_by_seed_and_covers_the_normal_interval():
    values = (torch.arange(400) % 5 != 0).double()[:, None]
    counted = torch.ones_like(values, dtype=torch.bool)
    first, again, other = (metrics.bootstrap_means(values, counted, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    low, high = metrics.interval(first[:, 0])
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert low == pytest.approx(0.8 - half, abs=0.008) and high == pytest.approx(0.8 + half, abs=0.008)


def test_bootstrap_in_chunks_draws_all_resamples(monkeypatch):
    values = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).double()
    counted = torch.ones(50, 2, dtype=torch.bool)
    monkeypatch.setattr(metrics, "_BOOTSTRAP_CELLS", 50 * 7)
    chunked = metrics.bootstrap_means(values, counted, seed=0, resamples=100)
    assert chunked.shape == (100, 2) and len(chunked.unique(dim=0)) == 100


def test_bootstrap_draws_whole_records_so_columns_keep_their_correlation():
    bits = (torch.arange(100) % 2).double()
    values = torch.stack([bits, 1 - bits], 1)
    resampled = metrics.bootstrap_means(values, torch.ones(100, 2, dtype=torch.bool), seed=0)
    assert torch.allclose(resampled.mean(1), torch.full((1000,), 0.5, dtype=torch.float64))


def test_means_and_bootstrap_leave_out_what_is_not_counted():
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [100.0, 5.0]])
    counted = torch.tensor([[True, False], [True, False], [False, False]])
    mean = metrics.means(values, counted)
    assert mean[0] == 2 and mean[1].isnan()
    resampled = metrics.bootstrap_means(values, counted, seed=0)
    assert resampled[:, 0].nan_to_num(2).max() <= 3 and resampled[:, 1].isnan().all()
    low, high = metrics.interval(resampled[:, 1])
    assert math.isnan(low) and math.isnan(high)


def test_a_slider_that_changes_nothing_is_not_monotonic():
    flat, rising = torch.full((9,), 0.5), torch.linspace(0.1, 0.9, 9)
    back = rising.clone()
    back[5] = back[4] - 0.02
    assert metrics.monotonic_share(torch.stack([flat, rising, back, rising.flip(0)])) == 0.25


def test_effective_range_is_where_the_middle_of_the_rise_lies():
    positions = [-2 + i / 2 for i in range(9)]
    straight = torch.linspace(0, 1, 9)
    assert metrics.effective_range(straight, positions) == pytest.approx((-1.6, 1.6))
    step = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert metrics.effective_range(step, positions) == pytest.approx((0.05, 0.45))
    assert all(math.isnan(end) for end in metrics.effective_range(torch.full((9,), 0.3), positions))


# --- distributions ---------------------------------------------------------------------------------------------------


def gaussian_features(records: int, width: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return scale * torch.randn(records, width, generator=generator, dtype=torch.float64) @ mix + shift


def test_frechet_distance_has_its_closed_form_for_gaussians():
    """Diagonal covariances: ‖μ₁-μ₂‖² + Σ (σ₁-σ₂)²."""
    a = metrics.Gaussian(torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 2.0, 0.0]).double()))
    b = metrics.Gaussian(torch.tensor([0.0, 2.0, 2.0]).double(), torch.diag(torch.tensor([3.0, 0.5, 1.0]).double()))
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 4 + 2.25 + 1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_agrees_with_the_matrix_root():
    from scipy.linalg import sqrtm

    a, b = gaussian_features(500, 16, 0), gaussian_features(300, 16, 1, shift=0.1, scale=1.3)
    first, second = (torch.cov(part.T).numpy() for part in (a, b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (first + second - 2 * sqrtm(first @ second).real).trace()
    found = metrics.frechet_distance(metrics.Gaussian.fit(a), metrics.Gaussian.fit(b))
    assert found == pytest.approx(float(expected), rel=1e-8)


class Identity(torch.nn.Module):
    """A feature network for torchmetrics that gives back features laid out as an image."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
def test_frechet_and_kernel_distance_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (part.float() for part in (gaussian_features(200, 12, 0), gaussian_features(150, 12, 1, 0.2, 1.2)))
    fid = FrechetInceptionDistance(feature=Identity(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=150).set_dtype(torch.float64)
    for metric, first in ((fid, a), (kid, a[:150])):
        metric.update(first.double().view(-1, 3, 2, 2), real=True)
        metric.update(b.double().view(-1, 3, 2, 2), real=False)
    found = metrics.frechet_distance(metrics.Gaussian.fit(a), metrics.Gaussian.fit(b))
    assert found == pytest.approx(float(fid.compute()), abs=1e-6)
    mean, std = metrics.kernel_distance(a[:150], b, seed=0, subsets=1, subset_size=150)
    assert mean == pytest.approx(float(kid.compute()[0]), abs=1e-6) and std == 0


def test_frechet_distance_of_fewer_records_than_features():
    """Singular covariances: the sum of singular values of the factors against eigenvalues clipped at 0."""
    a, b = gaussian_features(10, 64, 0), gaussian_features(12, 64, 1, shift=0.5)
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sort().values[-9:].sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    fitted = metrics.Gaussian.fit(a), metrics.Gaussian.fit(b)
    assert metrics.frechet_distance(*fitted) == pytest.approx(float(expected), rel=1e-6)
    assert metrics.frechet_distance(fitted[0], fitted[0]) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.Gaussian.fit(a[:1])


def test_kernel_distance_is_nothing_for_equal_distributions_and_repeats_by_seed():
    a, b, far = gaussian_features(600, 8, 0), gaussian_features(600, 8, 0), gaussian_features(600, 8, 0, shift=1)
    mean, std = metrics.kernel_distance(a[:300], b[300:], seed=0, subsets=20, subset_size=100)
    assert abs(mean) < 3 * std
    assert metrics.kernel_distance(a, far, seed=0, subsets=20, subset_size=100)[0] > 1
    assert metrics.kernel_distance(a, far, seed=0, subsets=5) == metrics.kernel_distance(a, far, seed=0, subsets=5)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.kernel_distance(a[:1], b, seed=0)


def test_inception_score_is_the_product_of_between_and_within():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 7):
        p = torch.softmax(3 * torch.randn(200, 5, generator=generator), 1)
        total, between, within = metrics.inception_scores(p, torch.randint(classes, (200,), generator=generator))
        assert total == pytest.approx(between * within, rel=1e-12) and between >= 1 and within >= 1


def test_inception_scores_by_hand():
    sure = torch.eye(2).repeat(50, 1)
    classes = torch.arange(100) % 2
    assert metrics.inception_scores(sure, classes) == pytest.approx((2, 2, 1))
    assert metrics.inception_scores(sure, torch.arange(100) // 2 % 2) == pytest.approx((2, 1, 2))
    assert metrics.inception_scores(torch.full((100, 2), 0.5), classes) == pytest.approx((1, 1, 1))


@pytest.mark.filterwarnings("ignore:.*will save all extracted features")
def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(feature=Identity(), splits=1)
    metric.update(logits.view(-1, 3, 2, 2))
    found = metrics.inception_scores(torch.softmax(logits.double(), 1), torch.zeros(60))
    assert found[0] == pytest.approx(float(metric.compute()[0]), abs=1e-6) and found[1] == pytest.approx(1.0)


def test_fid_is_at_most_between_plus_within_for_equal_classes():
    for seed in range(20):
        classes, width = 2 + seed % 3, 6 if seed % 2 else 40
        real = [gaussian_features(30, width, 100 * seed + c, shift=c * 0.3) for c in range(classes)]
        made = [gaussian_features(30, width, 5000 + 100 * seed + c, shift=c * 0.2, scale=1.2) for c in range(classes)]
        between, within = metrics.conditional_frechet(real, made, correction=0)
        whole = metrics.frechet_distance(*(metrics.Gaussian.fit(torch.cat(side), 0) for side in (real, made)))
        assert 0 <= whole <= between + within + 1e-9
        assert min(between, within) > 0


def test_conditional_frechet_sees_classes_that_changed_places():
    real = [gaussian_features(200, 4, 0), gaussian_features(200, 4, 1, shift=3)]
    between, within = metrics.conditional_frechet(real, real[::-1])
    assert between == pytest.approx(0, abs=1e-9) and within > 10
    assert metrics.conditional_frechet(real, real) == pytest.approx((0, 0), abs=1e-9)
    with pytest.raises(ValueError, match="2 and 1 classes"):
        metrics.conditional_frechet(real, real[:1])
