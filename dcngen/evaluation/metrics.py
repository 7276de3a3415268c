"""The distances that are printed: torchmetrics' metrics, on features that are already there.

A metric of torchmetrics runs its ``feature`` network on every picture it is given. Here the network has run before,
once for each set, and its features are cached; so the network that a metric gets hands features on as they come, in
float64, and sums, covariances and result stay float64. (``set_dtype`` would add nothing: the sums are float64 anyway.)

Every process that calls these has all features, so nothing is summed over processes (``sync_on_compute=False``): each
computes the same number, and one process alone may ask for it without waiting for the others.
"""

import functools
import warnings

import torch
from torch import nn

from dcngen.evaluation.moments import FeatureStatistics

CHUNK = 4096


@functools.cache
def torchmetrics_image():
    """torchmetrics' modules of FID and of KID. Imported late: it takes seconds, and only scoring needs them.

    Raises:
        RuntimeError: torchmetrics is not there, or something that it imports is broken.
    """
    try:
        from torchmetrics.image import fid, kid
    except Exception as error:  # a torchvision that does not fit this torch raises all kinds
        if isinstance(error, ModuleNotFoundError) and error.name == "torchmetrics":
            raise RuntimeError("FID and KID need torchmetrics: `pip install torchmetrics`") from error
        raise RuntimeError(
            f"torchmetrics cannot be imported ({type(error).__name__}: {error}). Where torch-fidelity or torchvision "
            f"is installed it imports them too, though FID and KID here need neither. Remedies: install the "
            f"torchvision that belongs to torch {torch.__version__}, or `pip uninstall torch-fidelity torchvision`"
        ) from error
    return fid, kid


class AsGiven(nn.Module):
    """The ``feature`` network of a metric that is given features (N, d) instead of pictures."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.double()


def frechet_metric(reference: torch.Tensor | FeatureStatistics) -> nn.Module:
    """A ``FrechetInceptionDistance`` that takes features, its real side filled; ``reset()`` keeps that side.

    Args:
        reference: features (N, d) or stored statistics; the metric is on their device.
    """
    fid, _ = torchmetrics_image()
    statistics = reference if isinstance(reference, FeatureStatistics) else FeatureStatistics.of(reference)
    network = AsGiven(len(statistics.total))
    metric = fid.FrechetInceptionDistance(network, reset_real_features=False, sync_on_compute=False)
    metric.to(statistics.total.device)
    metric.real_features_sum = statistics.total.clone()  # a later update adds in place
    metric.real_features_cov_sum = statistics.outer.clone()
    metric.real_features_num_samples = torch.tensor(statistics.count, device=statistics.total.device)
    return metric


def frechet_distance(features: torch.Tensor, reference: torch.Tensor | FeatureStatistics) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets: FID, if the features are Inception's.

    The general eigenvalues inside ``compute()`` are found on the CPU wherever the features are: they are no work for a
    GPU, and the number has the same digits on every machine.

    Args:
        features: (N, d), N at least 2.
        reference: features (M, d) or statistics, on the same device.

    Raises:
        ValueError: fewer than 2 pictures on a side.
    """
    metric = frechet_metric(reference)
    count = min(len(features), int(metric.real_features_num_samples))
    if count < 2:
        raise ValueError(f"a Frechet distance needs at least 2 pictures on each side, got {count}")
    for part in features.split(CHUNK):
        metric.update(part, real=False)
    return float(metric.cpu().compute())


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Squared maximum mean discrepancy under the cubic kernel: KID, if the features are Inception's.

    One subset that holds everything instead of the customary 100 random ones of 1000: the same expectation with less
    variance, and nothing random.

    Args:
        features, reference: (N, d), on one device; equally many, as torchmetrics' subsets are.

    Raises:
        ValueError: not equally many, or fewer than 2.
    """
    count = len(features)
    if len(reference) != count or count < 2:
        raise ValueError(f"torchmetrics' KID needs equally many pictures, 2 or more, got {count} and {len(reference)}")
    _, kid = torchmetrics_image()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # compute() shuffles with the CPU's global generator, and the order moves the last digit
        torch.default_generator.manual_seed(0)
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        metric = kid.KernelInceptionDistance(
            AsGiven(features.shape[1]), subsets=1, subset_size=count, sync_on_compute=False
        )
        metric.to(features.device)
        metric.update(reference, real=True)
        metric.update(features, real=False)
        return float(metric.compute()[0])


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KID's kernel (x.y / d + 1)^3 between features (N, d) and (M, d): (N, M)."""
    _, kid = torchmetrics_image()
    return kid.poly_kernel(x, y)
