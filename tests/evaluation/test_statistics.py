import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from dcngen.evaluation.moments import FeatureStatistics
from dcngen.evaluation.statistics import (
    KernelSums,
    Reference,
    closed_frechet_distance,
    frechet_infinity,
    frechet_without_each_group,
    jackknife_error,
    mean_difference_interval,
    mean_half_width,
    stratified_groups,
    student_factor,
)


def textbook_frechet(x, y):
    """Heusel et al. 2017, equation 6, with a general matrix square root."""
    x, y = x.double().numpy(), y.double().numpy()
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return float(np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c1 + c2 - 2 * root))


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 20), (20, 300), (15, 20)])
def test_frechet_is_the_textbook_formula(gaussian_features, n, m):
    x, y = gaussian_features(n, 24, 0), gaussian_features(m, 24, 1, shift=0.3)
    expected = textbook_frechet(x, y)
    assert closed_frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert closed_frechet_distance(y, x) == pytest.approx(expected, rel=1e-5)
    assert closed_frechet_distance(FeatureStatistics.of(x), Reference(y)) == pytest.approx(expected, rel=1e-5)


def test_frechet_known_values():
    x = torch.tensor([[-1.0, 0], [1, 0], [0, -1], [0, 1]], dtype=torch.float64)
    assert closed_frechet_distance(x, x) == pytest.approx(0, abs=1e-7)
    assert closed_frechet_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25)
    # isotropic with variance s^2 against 9 s^2, each of two dimensions: 2 (3 s - s)^2
    assert closed_frechet_distance(x, 3 * x) == pytest.approx(2 * 4 * (2 / 3))


def test_frechet_with_an_outlying_mean_keeps_its_digits(gaussian_features):
    x, y = gaussian_features(400, 8, 0).double(), gaussian_features(400, 8, 1).double()
    shifted = closed_frechet_distance(FeatureStatistics.of(x + 1000), FeatureStatistics.of(y + 1000))
    assert shifted == pytest.approx(closed_frechet_distance(x, y), rel=1e-4)


def test_statistics_add_and_subtract(gaussian_features):
    x = gaussian_features(60, 5, 0)
    whole, part, rest = FeatureStatistics.of(x), FeatureStatistics.of(x[:25]), FeatureStatistics.of(x[25:])
    assert torch.allclose((part + rest).covariance, whole.covariance)
    assert torch.allclose((whole - part).mean, rest.mean) and (whole - part).count == 35
    again = FeatureStatistics.from_moments(whole.mean, whole.covariance, whole.count)
    assert torch.allclose(again.covariance, torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(x[:1]).covariance


def textbook_kid(x, y):
    """Binkowski et al. 2018, equation 4: all pairs, the diagonal left out."""
    x, y = x.double(), y.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    kxx, kyy = kernel(x, x), kernel(y, y)
    own = (kxx.sum() - kxx.trace()) / (n * (n - 1)) + (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(own - 2 * kernel(x, y).mean())


def test_kid_is_the_unbiased_estimate_with_and_without_groups(gaussian_features):
    x, y = gaussian_features(50, 6, 0, shift=0.2), gaussian_features(40, 6, 1)
    groups = np.arange(50) % 7
    sums = KernelSums(x, y, groups)
    assert sums.distance() == pytest.approx(textbook_kid(x, y), rel=1e-9)
    for group, value in enumerate(sums.without_each_group()):
        assert value == pytest.approx(textbook_kid(x[torch.from_numpy(groups != group)], y), rel=1e-9)


@pytest.mark.parametrize("n", [40, 400])
def test_frechet_without_each_group_is_the_distance_of_the_rest(gaussian_features, n):
    x, y = gaussian_features(n, 60, 0), gaussian_features(200, 60, 1)
    groups = stratified_groups(np.arange(n) % 3, 5)
    values = frechet_without_each_group(x, Reference(y), groups)
    for group in (0, 4):
        kept = x[torch.from_numpy(groups != group)]
        assert values[group] == pytest.approx(closed_frechet_distance(kept, y), rel=1e-6)


def test_groups_hold_every_class_evenly():
    labels = np.array([0] * 40 + [1] * 20 + [2] * 10)
    groups = stratified_groups(labels, 10)
    for label, count in ((0, 4), (1, 2), (2, 1)):
        assert np.bincount(groups[labels == label], minlength=10).tolist() == [count] * 10
    with pytest.raises(ValueError, match="at least 10 pictures, got 5"):
        stratified_groups(labels[:5], 10)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=20)
    without = (values.sum() - values) / 19
    assert jackknife_error(without) == pytest.approx(values.std(ddof=1) / 20**0.5)


def test_jackknife_error_covers_the_spread_over_fresh_samples(gaussian_features):
    reference = Reference(gaussian_features(2000, 8, 99))
    labels, distances, errors = np.zeros(200, dtype=int), [], []
    for seed in range(30):
        x = gaussian_features(200, 8, seed, shift=0.3)
        distances.append(closed_frechet_distance(x, reference))
        errors.append(jackknife_error(frechet_without_each_group(x, reference, stratified_groups(labels))))
    assert np.mean(errors) == pytest.approx(np.std(distances, ddof=1), rel=0.35)


def test_frechet_infinity_removes_most_of_the_bias(gaussian_features):
    n, d = 4100, 96
    x, y = gaussian_features(n, d, 0), gaussian_features(n, d, 1)
    labels = np.arange(n) % 4
    biased = closed_frechet_distance(x, y)
    assert abs(frechet_infinity(x, labels, y, labels)) < 0.25 * biased
    with pytest.raises(ValueError, match="at least 4096 pictures on each side, got 4000"):
        frechet_infinity(x[:4000], labels[:4000], y, labels)


@pytest.mark.parametrize("degrees", [1, 1.2, 2, 2.7, 3, 5, 8.5, 31, 200])
def test_student_factor_is_scipys(degrees):
    assert student_factor(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-5)


@pytest.mark.parametrize("second", [[12.0, 12.5], [9.0, 10.5, 13.0, 12.0], [10.4, 10.5, 10.6]])
def test_interval_of_a_difference_of_means_is_welchs(second):
    first = [10.0, 11.0, 10.4]
    expected = scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert mean_difference_interval(first, second) == pytest.approx((expected.low, expected.high), rel=1e-5)


def test_equal_runs_have_an_interval_without_width():
    assert mean_difference_interval([1.0, 1.0], [3.0, 3.0]) == (2.0, 2.0)


def test_a_side_of_one_run_takes_the_others_variance():
    first = [10.0, 11.0, 10.4]
    low, high = mean_difference_interval(first, [12.0])
    half_width = scipy.stats.t.ppf(0.975, 2) * np.std(first, ddof=1) * (1 + 1 / 3) ** 0.5
    assert (low, high) == pytest.approx((12 - np.mean(first) - half_width, 12 - np.mean(first) + half_width))
    with pytest.raises(ValueError, match="at least 2 runs on a side, got 1 and 1"):
        mean_difference_interval([1.0], [2.0])


def test_interval_of_a_mean():
    values = [3.0, 4.0, 6.5]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert mean_half_width(values) == pytest.approx((high - low) / 2)
    assert mean_half_width([3.0]) is None
