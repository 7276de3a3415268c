"""Error bars and extrapolation of the two distances, which torchmetrics has not.

They need each distance 20 times and more, with parts of the pictures left out, so they stand on forms that cost a
fraction of torchmetrics' and agree with it (the tests hold the two together to 1e-6); the printed distances themselves
are torchmetrics' (:mod:`dcngen.evaluation.metrics`). All sums are float64. Frechet distance: Heusel et al. 2017,
equation 6; kernel distance (KID): Binkowski et al., "Demystifying MMD GANs", 2018, section 3.
"""

import functools
import math
import operator

import numpy as np
import torch
from tqdm.auto import tqdm

from dcngen.data.images import evenly_over_classes
from dcngen.evaluation.metrics import cubic_kernel
from dcngen.evaluation.moments import FeatureStatistics

NUM_GROUPS = 20
FULL_RANK = 2048  # below this many pictures the covariance of Inception's 2048 features is singular
EXTRAPOLATION_COUNT = 2 * FULL_RANK  # the extrapolation thins by half, and below full rank the bias is not linear
Z95 = 1.96


class Reference:
    """The side that stays fixed: its moments, and a root R of its covariance (R^T R), found once.

    Any root serves: the centred features themselves where they are fewer than their dimensions, else the symmetric one.
    """

    def __init__(self, source: torch.Tensor | FeatureStatistics):
        few = isinstance(source, torch.Tensor) and len(source) <= source.shape[1]
        statistics = source if isinstance(source, FeatureStatistics) else FeatureStatistics.of(source)
        self.count, self.mean = statistics.count, statistics.mean
        if few:
            self.root = _centred(source)
            self.trace = self.root.square().sum()
        else:
            covariance = statistics.covariance
            self.root, self.trace = _symmetric_root(covariance), covariance.trace()


def closed_frechet_distance(first: torch.Tensor | FeatureStatistics, second) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets.

    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``. With C2 = R^T R, the matrix C1 C2 has the eigenvalues of
    R C1 R^T, which is symmetric: real and not negative also where the covariances are singular, and far cheaper than
    general eigenvalues or a matrix root. Features fewer than their dimensions need a matrix of their number only.

    Args:
        first: features (N, d) or :class:`FeatureStatistics`.
        second: the same, or a :class:`Reference`, which saves work when it is used again.
    """
    fixed = second if isinstance(second, Reference) else Reference(second)
    if isinstance(first, FeatureStatistics):
        mean, covariance = first.mean, first.covariance
        trace, product = covariance.trace(), fixed.root @ covariance @ fixed.root.T
    else:
        centred, mean = _centred(first), first.double().mean(dim=0)
        trace, cross = centred.square().sum(), centred @ fixed.root.T
        product = cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross
    root_trace = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().sum()
    return float((mean - fixed.mean).square().sum() + trace + fixed.trace - 2 * root_trace)


def _centred(features: torch.Tensor) -> torch.Tensor:
    """A root of the features' unbiased covariance, (N, d) float64."""
    if len(features) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 pictures on each side, got {len(features)}")
    features = features.double()
    return (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5


def _symmetric_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def stratified_groups(labels: np.ndarray, num_groups: int = NUM_GROUPS) -> np.ndarray:
    """Deal every class evenly into groups: (N,) group numbers, the same for every set with the same labels.

    Raises:
        ValueError: fewer pictures than groups.
    """
    if len(labels) < num_groups:
        raise ValueError(f"error bars need at least {num_groups} pictures, got {len(labels)}")
    order = np.argsort(labels, kind="stable")
    groups = np.empty(len(labels), dtype=np.int64)
    groups[order] = np.arange(len(labels)) % num_groups
    return groups


def frechet_without_each_group(
    features: torch.Tensor, reference: Reference, groups: np.ndarray, progress: bool = False
) -> np.ndarray:
    """Frechet distance with one group left out at a time, (num_groups,): what the jackknife is made of."""
    num_groups = int(groups.max()) + 1
    groups = torch.from_numpy(groups).to(features.device)
    if len(features) <= features.shape[1]:
        remaining = (features[groups != group] for group in range(num_groups))
    else:
        parts = [FeatureStatistics.of(features[groups == group]) for group in range(num_groups)]
        whole = functools.reduce(operator.add, parts)
        remaining = (whole - part for part in parts)
    bar = tqdm(remaining, total=num_groups, desc="error bars", unit="group", leave=False, disable=not progress)
    return np.array([closed_frechet_distance(rest, reference) for rest in bar])


class KernelSums:
    """Sums of the kernel between groups of features, from which KID follows with or without any group.

    The estimator is the unbiased one over all pairs, as in :func:`dcngen.evaluation.metrics.kernel_distance`, and takes
    unequal numbers.
    """

    def __init__(self, features: torch.Tensor, reference: torch.Tensor, groups: np.ndarray):
        num_groups = int(groups.max()) + 1
        x = features.double()
        members = [torch.from_numpy(np.flatnonzero(groups == group)).to(x.device) for group in range(num_groups)]
        self.sizes = np.array([len(m) for m in members])
        self.within = np.zeros((num_groups, num_groups))
        self.across = np.zeros(num_groups)
        self.reference_term = _mean_off_diagonal(reference.double())
        self.reference_count = len(reference)
        for g, rows in enumerate(members):
            self.across[g] = _kernel_sum(x[rows], reference.double())
            for h in range(g + 1):
                total = _kernel_sum(x[rows], x[members[h]], without_diagonal=g == h)
                self.within[g, h] = self.within[h, g] = total

    def distance(self, without: int | None = None) -> float:
        """KID of all features against the reference, or of all but one group."""
        keep = np.arange(len(self.sizes)) != (-1 if without is None else without)
        count = self.sizes[keep].sum()
        own = self.within[np.ix_(keep, keep)].sum() / (count * (count - 1))
        return float(own + self.reference_term - 2 * self.across[keep].sum() / (count * self.reference_count))

    def without_each_group(self) -> np.ndarray:
        return np.array([self.distance(group) for group in range(len(self.sizes))])


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, without_diagonal: bool = False, chunk: int = 4096) -> float:
    total = 0.0
    for start in range(0, len(x), chunk):
        kernel = cubic_kernel(x[start : start + chunk], y)
        total += float(kernel.sum())
        if without_diagonal:
            total -= float(kernel.diagonal(start).sum())
    return total


def _mean_off_diagonal(y: torch.Tensor) -> float:
    return _kernel_sum(y, y, without_diagonal=True) / (len(y) * (len(y) - 1))


def jackknife_error(values_without: np.ndarray) -> float:
    """Standard error from the values with one group left out each (delete-a-group jackknife)."""
    count = len(values_without)
    return float(np.sqrt((count - 1) / count * np.square(values_without - values_without.mean()).sum()))


def student_factor(degrees: float) -> float:
    """How many standard errors hold 95 % of Student's t on either side of 0: 12.7 for 1 degree of freedom, 2.0 for 60.

    With t = sqrt(degrees) tan(a) the density is cos(a)^(degrees - 1) over an integral that is known.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2))
    low, high = 0.0, math.pi / 2
    while high - low > 1e-12:
        middle = (low + high) / 2
        within = middle / 2 * float(weights @ np.cos(middle / 2 * (nodes + 1)) ** (degrees - 1)) / whole
        low, high = (middle, high) if within < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(high)


def mean_difference_interval(first: list[float], second: list[float]) -> tuple[float, float]:
    """95 % interval of mean(second) - mean(first), each side with a variance of its own (Welch, 1947).

    A side of one value, whose variance nobody knows, takes the other's.

    Raises:
        ValueError: one value on both sides.
    """
    sides = (first, second)
    known = [float(np.var(values, ddof=1)) for values in sides if len(values) > 1]
    if not known:
        raise ValueError("an interval over runs needs at least 2 runs on a side, got 1 and 1")
    difference = float(np.mean(second) - np.mean(first))
    if len(known) == 1:
        degrees, squared_error = len(first) + len(second) - 2, known[0] * (1 / len(first) + 1 / len(second))
    else:
        squares = [variance / len(values) for variance, values in zip(known, sides, strict=True)]
        squared_error = sum(squares)
        if squared_error == 0:
            return difference, difference
        freedom = sum(square**2 / (len(values) - 1) for square, values in zip(squares, sides, strict=True))
        degrees = squared_error**2 / freedom
    half_width = student_factor(degrees) * math.sqrt(squared_error)
    return difference - half_width, difference + half_width


def mean_half_width(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of a mean (Student's); None of a single value."""
    if len(values) < 2:
        return None
    return student_factor(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def frechet_infinity(
    features: torch.Tensor, labels: np.ndarray, reference: torch.Tensor, reference_labels: np.ndarray, points: int = 5
) -> float:
    """The Frechet distance at infinitely many pictures (Chong and Forsyth, "Effectively Unbiased FID", 2020).

    Its bias is linear in 1/N to leading order; both sides are thinned together, class by class, from N down to N/2, and
    the line through the distances over 1/N is read at 0.

    Raises:
        ValueError: fewer than 4096 pictures on a side; half of them would have a singular covariance.
    """
    count = min(len(features), len(reference))
    if count < EXTRAPOLATION_COUNT:
        raise ValueError(f"extrapolation needs at least {EXTRAPOLATION_COUNT} pictures on each side, got {count}")
    sizes = np.linspace(count / 2, count, points).round().astype(int)
    distances = [
        closed_frechet_distance(
            features[evenly_over_classes(labels, size)], reference[evenly_over_classes(reference_labels, size)]
        )
        for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])
