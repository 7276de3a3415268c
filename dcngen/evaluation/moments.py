"""The sums that mean and covariance of features follow from: they add and subtract, and torchmetrics keeps the same."""

from dataclasses import dataclass

import torch


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
