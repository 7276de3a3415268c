"""Distances between two sets of Inception features: Frechet distance, kernel distance, and their error bars.

All sums are float64. Frechet distance: Heusel et al. 2017, equation 6; kernel distance (KID): Binkowski et al.,
"Demystifying MMD GANs", 2018, section 3.
"""

from dataclasses import dataclass

import numpy as np
import torch

NUM_GROUPS = 20
FULL_RANK = 2048  # below this many pictures the covariance of 2048 features is singular
Z95 = 1.96


@dataclass
class FeatureStatistics:
    """Number of pictures, sum of features and sum of outer products, from which mean and covariance follow.

    Attributes:
        count: pictures seen.
        total: (d,) float64.
        outer: (d, d) float64.
    """

    count: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureStatistics":
        """Statistics of features (N, d)."""
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    @classmethod
    def from_moments(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int) -> "FeatureStatistics":
        """From a mean (d,) and the unbiased covariance (d, d) of ``count`` pictures."""
        mean, covariance = mean.double(), covariance.double()
        return cls(count, mean * count, covariance * (count - 1) + torch.outer(mean, mean) * count)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        return FeatureStatistics(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (d, d)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


class Reference:
    """The side that stays fixed: its moments, and a square root of its covariance, computed once.

    The root is any matrix R with R^T R = covariance: the centred features themselves when they are fewer than their
    dimensions, which makes every distance cheap, else the symmetric root.
    """

    def __init__(self, source: torch.Tensor | FeatureStatistics):
        if isinstance(source, FeatureStatistics):
            self.count, self.mean = source.count, source.mean
            self.root, self.trace = _symmetric_root(source.covariance), source.covariance.trace()
            return
        features = source.double()
        self.count, self.mean = len(features), features.mean(dim=0)
        if self.count < 2:
            raise ValueError(f"FID needs at least 2 pictures on each side, got {self.count}")
        centred = (features - self.mean) / (self.count - 1) ** 0.5
        self.trace = centred.square().sum()
        self.root = centred if len(centred) <= centred.shape[1] else _symmetric_root(centred.T @ centred)


def frechet_distance(first, second) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets.

    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``. With C = R^T R the last trace is the sum of the singular
    values of R1 R2^T, which needs no square root of a matrix that is not symmetric and stays real when C is singular.

    Args:
        first, second: features (N, d), :class:`FeatureStatistics`, or a :class:`Reference`.
    """
    first, second = (side if isinstance(side, Reference) else Reference(side) for side in (first, second))
    cross = torch.linalg.svdvals(first.root @ second.root.T).sum()
    return float((first.mean - second.mean).square().sum() + first.trace + second.trace - 2 * cross)


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


def frechet_without_each_group(features: torch.Tensor, reference: Reference, groups: np.ndarray) -> np.ndarray:
    """Frechet distance with one group left out at a time, (num_groups,): what the jackknife is made of."""
    num_groups = int(groups.max()) + 1
    if len(features) <= features.shape[1]:
        kept = (torch.from_numpy(groups != group) for group in range(num_groups))
        return np.array([frechet_distance(features[mask], reference) for mask in kept])
    parts = [FeatureStatistics.of(features[torch.from_numpy(groups == group)]) for group in range(num_groups)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return np.array([frechet_distance(whole - part, reference) for part in parts])


class KernelSums:
    """Sums of the cubic kernel between groups of features, from which KID follows with or without any group.

    The kernel is k(x, y) = (x.y / d + 1)^3, the estimator the unbiased one over all pairs: the same expectation as the
    customary mean over random subsets of 1000, with less variance.
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
                total = _kernel_sum(x[rows], x[members[h]])
                if g == h:
                    total -= float((x[rows].square().sum(dim=1) / x.shape[1] + 1).pow(3).sum())
                self.within[g, h] = self.within[h, g] = total

    def distance(self, without: int | None = None) -> float:
        """KID of all features against the reference, or of all but one group."""
        keep = np.arange(len(self.sizes)) != (-1 if without is None else without)
        count = self.sizes[keep].sum()
        own = self.within[np.ix_(keep, keep)].sum() / (count * (count - 1))
        return float(own + self.reference_term - 2 * self.across[keep].sum() / (count * self.reference_count))

    def without_each_group(self) -> np.ndarray:
        return np.array([self.distance(group) for group in range(len(self.sizes))])


def kernel_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """KID of two sets of features (N, d): the unbiased estimate over all pairs."""
    return KernelSums(first, second, np.zeros(len(first), dtype=np.int64)).distance()


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, chunk: int = 4096) -> float:
    return sum(float((part @ y.T / x.shape[1] + 1).pow(3).sum()) for part in x.split(chunk))


def _mean_off_diagonal(y: torch.Tensor) -> float:
    diagonal = float((y.square().sum(dim=1) / y.shape[1] + 1).pow(3).sum())
    return (_kernel_sum(y, y) - diagonal) / (len(y) * (len(y) - 1))


def jackknife_error(values_without: np.ndarray) -> float:
    """Standard error from the values with one group left out each (delete-a-group jackknife)."""
    count = len(values_without)
    return float(np.sqrt((count - 1) / count * np.square(values_without - values_without.mean()).sum()))


def frechet_infinity(
    features: torch.Tensor, labels: np.ndarray, reference: torch.Tensor, reference_labels: np.ndarray, points: int = 5
) -> float:
    """FID extrapolated to infinitely many pictures (Chong and Forsyth, "Effectively Unbiased FID", 2020).

    The bias of FID is linear in 1/N to leading order; both sides are thinned together, class by class, from N down to
    N/2, and the line through the distances over 1/N is read at 0.

    Raises:
        ValueError: fewer than 2048 pictures on a side, where the bias is not linear.
    """
    count = min(len(features), len(reference))
    if count < FULL_RANK:
        raise ValueError(f"FID-infinity needs at least {FULL_RANK} pictures on each side, got {count}")
    sizes = np.linspace(count / 2, count, points).round().astype(int)
    distances = [
        frechet_distance(features[thinned(labels, size)], reference[thinned(reference_labels, size)]) for size in sizes
    ]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def thinned(labels: np.ndarray, size: int) -> np.ndarray:
    """Indices of ``size`` pictures taken evenly from every class, in the order of the classes."""
    order = np.argsort(labels, kind="stable")
    return order[np.linspace(0, len(order) - 1, size).round().astype(np.int64)]
