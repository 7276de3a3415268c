"""Scores of one set of generated pictures against a reference: both distances, error bars, caveats."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcngen.data.files import atomic_file
from dcngen.data.images import evenly_over_classes
from dcngen.evaluation.features import Features, Provenance
from dcngen.evaluation.metrics import frechet_distance, kernel_distance
from dcngen.evaluation.moments import FeatureStatistics
from dcngen.evaluation.spaces import INCEPTION, SPACES, FeatureSpace
from dcngen.evaluation.statistics import (
    EXTRAPOLATION_COUNT,
    FULL_RANK,
    KernelSums,
    Reference,
    frechet_infinity,
    frechet_without_each_group,
    jackknife_error,
    stratified_groups,
)

KERNEL_MAX_IMAGES = 10_000  # all pairs cost N^2 kernels; the error at 10,000 is far below the Frechet distance's
PUBLISHED_COUNT = 50_000


@dataclass
class Scores:
    """Both distances of one set, with the values the paired comparison needs.

    In Inception's features they are FID and KID, and ``to_dict`` writes them under these names.

    Attributes:
        num_images, num_reference: pictures on the two sides.
        frechet, frechet_error: the distance and its standard error over the generated pictures (jackknife).
        kernel, kernel_error: the same for the kernel distance; None against statistics, which hold no single pictures.
        frechet_infinity: extrapolation to infinitely many pictures; None below 4096 pictures.
        frechet_without, kernel_without: values with one group of pictures left out each, for paired differences.
        space: the feature space, and so the distances' names.
        notes: caveats in words.
    """

    num_images: int
    num_reference: int
    frechet: float
    frechet_error: float
    kernel: float | None
    kernel_error: float | None
    frechet_infinity: float | None
    frechet_without: list[float] = field(repr=False)
    kernel_without: list[float] | None = field(repr=False)
    space: FeatureSpace = INCEPTION
    notes: list[str] = field(default_factory=list)

    @property
    def is_biased(self) -> bool:
        return min(self.num_images, self.num_reference) < FULL_RANK

    def to_dict(self) -> dict:
        """Plain values for JSON, which has no NaN: an error that was not computed is None."""
        values = {f.name: _known(getattr(self, f.name)) for f in fields(self) if f.name != "space"}
        return {"features": self.space.network} | self.space.named(values)


def _on(statistics: FeatureStatistics, device) -> FeatureStatistics:
    return FeatureStatistics(statistics.count, statistics.total.to(device), statistics.outer.to(device))


def _known(value):
    if isinstance(value, list):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def score(
    features: Features,
    reference: Features | FeatureStatistics,
    *,
    device: str | torch.device = "cpu",
    errors: bool = True,
    progress: bool = False,
) -> Scores:
    """Score generated pictures against reference pictures or statistics.

    Args:
        features: of the generated pictures.
        reference: features of as many real pictures, or statistics of them.
        device: where the linear algebra runs (float64).
        errors: whether to compute error bars; the jackknife repeats every distance 20 times.
        progress: show a bar meanwhile (with 2048 pictures or more it takes a minute on two CPU cores).

    Raises:
        ValueError: the two sides come from different networks.
    """
    if isinstance(reference, Features):
        require_same_network(features.provenance, reference.provenance)
    values = features.values.to(device)
    real = reference.values.to(device) if isinstance(reference, Features) else _on(reference, device)
    fixed = Reference(real) if errors else None
    groups = stratified_groups(features.labels) if errors else None
    without = frechet_without_each_group(values, fixed, groups, progress) if errors else np.array([np.nan])
    result = Scores(
        num_images=len(values),
        num_reference=reference.count if isinstance(reference, FeatureStatistics) else len(reference.values),
        frechet=frechet_distance(values, real),
        frechet_error=jackknife_error(without),
        kernel=None,
        kernel_error=None,
        frechet_infinity=None,
        frechet_without=without.tolist(),
        kernel_without=None,
        space=SPACES[features.provenance.network],
    )
    if isinstance(reference, Features):
        _add_kernel_distance(result, features, reference, errors, device)
        if errors and min(result.num_images, result.num_reference) >= EXTRAPOLATION_COUNT:
            result.frechet_infinity = frechet_infinity(values, features.labels, real, reference.labels)
    result.notes = caveats(result, values.shape[1])
    return result


def _add_kernel_distance(result: Scores, features: Features, reference: Features, errors: bool, device) -> None:
    chosen = evenly_over_classes(features.labels, KERNEL_MAX_IMAGES)
    values = features.values[chosen].to(device)
    real = reference.values[evenly_over_classes(reference.labels, KERNEL_MAX_IMAGES)].to(device)
    sums = None
    if errors or len(values) != len(real):
        # Dealt among the chosen: groups of all pictures would have lost whole classes by the choice.
        groups = stratified_groups(features.labels[chosen]) if errors else np.zeros(len(values), dtype=np.int64)
        sums = KernelSums(values, real, groups)
    # torchmetrics compares equally many; the sums are the same estimate for any two numbers
    result.kernel = kernel_distance(values, real) if len(values) == len(real) else sums.distance()
    if errors:
        without = sums.without_each_group()
        result.kernel_without, result.kernel_error = without.tolist(), jackknife_error(without)


def caveats(result: Scores, num_features: int) -> list[str]:
    """What a reader must know before quoting the numbers."""
    notes, space = [], result.space
    if result.num_images != result.num_reference:
        notes.append(f"{result.num_images:,} generated against {result.num_reference:,} reference pictures: N differs")
    fewest = min(result.num_images, result.num_reference)
    if result.is_biased:
        singular = "the covariance is singular and " if fewest <= num_features else ""
        notes.append(
            f"fewer than {FULL_RANK:,} pictures on a side: {singular}{space.frechet} is far too high; it ranks "
            f"models at this N only. {space.kernel} is unbiased"
        )
    if fewest < PUBLISHED_COUNT or not space.published_by_default:
        notes.append(f"not comparable with published {space.frechet}, which uses {space.published}")
    return notes


def require_same_network(first: Provenance, second: Provenance) -> None:
    """Raise ValueError unless both were computed by the same network at the same picture size."""
    parts = {
        "feature networks": "network",
        f"{first.network} weights": "extractor_digest",
        "feature layers": "num_features",
    }
    for what, key in parts.items():
        if getattr(first, key) != getattr(second, key):
            raise ValueError(
                f"{first.described} and {second.described} were computed with different {what} "
                f"({getattr(first, key)} and {getattr(second, key)}); compute both with the same --features and weights"
            )
    if first.image_size != second.image_size:
        raise ValueError(
            f"{first.described} has pictures of {first.image_size} pixels, {second.described} of {second.image_size}; "
            f"prepare the reference at the size of the generated pictures"
        )


def save_statistics(features: Features, path: str | Path) -> None:
    """Write mean, covariance and provenance as one safetensors file."""
    statistics = FeatureStatistics.of(features.values)
    tensors = {"mean": statistics.mean, "covariance": statistics.covariance}
    metadata = {"provenance": json.dumps(asdict(features.provenance)), "format": "dcngen feature statistics 1"}
    with atomic_file(Path(path)) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_statistics(path: str | Path, expected: Provenance) -> tuple[FeatureStatistics, Provenance | None]:
    """Read statistics written by :func:`save_statistics`, or an ``.npz`` with ``mu`` and ``sigma``.

    Args:
        expected: provenance of the pictures they will be compared with.

    Returns:
        the statistics and their provenance; an ``.npz`` has none, and is taken to be of 50,000 pictures.

    Raises:
        ValueError: another network, number of features or picture size, or no statistics in the file.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                raise ValueError(f"{path} holds no statistics: expected arrays mu and sigma, got {archive.files}")
            mean, covariance = torch.from_numpy(archive["mu"]), torch.from_numpy(archive["sigma"])
        if mean.shape != (expected.num_features,):
            raise ValueError(
                f"{path} expected mu of {expected.num_features} {expected.network} features, got {tuple(mean.shape)}; "
                f"it was computed with another network"
            )
        return FeatureStatistics.from_moments(mean, covariance, PUBLISHED_COUNT), None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "provenance" not in metadata or not {"mean", "covariance"} <= set(file.keys()):
            raise ValueError(f"{path} holds no feature statistics; write them with evaluate --save-statistics")
        mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    provenance = Provenance(**json.loads(metadata["provenance"]))
    require_same_network(expected, provenance)
    return FeatureStatistics.from_moments(mean, covariance, provenance.num_images), provenance
