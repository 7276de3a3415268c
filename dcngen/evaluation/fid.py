"""Scores of one set of generated pictures against a reference: FID and KID with error bars, and their caveats."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcngen.data.files import atomic_file
from dcngen.data.images import evenly_over_classes
from dcngen.evaluation.features import Features, Provenance
from dcngen.evaluation.statistics import (
    FULL_RANK,
    NUM_GROUPS,
    FeatureStatistics,
    KernelSums,
    Reference,
    frechet_distance,
    frechet_infinity,
    frechet_without_each_group,
    jackknife_error,
    stratified_groups,
)

KID_MAX_IMAGES = 10_000  # the estimate over all pairs costs N^2 kernels; its error at 10,000 is far below FID's
PUBLISHED_COUNT = 50_000


@dataclass
class Scores:
    """FID and KID of one set, with the values the paired comparison needs.

    Attributes:
        num_images, num_reference: pictures on the two sides.
        fid, fid_error: the distance and its standard error over the generated pictures (jackknife).
        kid, kid_error: the same for KID; None against statistics, which hold no single pictures.
        fid_infinity: extrapolation to infinitely many pictures; None below 2048 pictures.
        fid_without, kid_without: values with one group of pictures left out each, for paired differences.
        notes: caveats in words.
    """

    num_images: int
    num_reference: int
    fid: float
    fid_error: float
    kid: float | None
    kid_error: float | None
    fid_infinity: float | None
    fid_without: list[float] = field(repr=False)
    kid_without: list[float] | None = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def is_biased(self) -> bool:
        return min(self.num_images, self.num_reference) < FULL_RANK

    def to_dict(self) -> dict:
        """Plain values for JSON, which has no NaN: an error that was not computed is None."""
        return {name: _known(value) for name, value in asdict(self).items()}


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
    real = reference.values.to(device) if isinstance(reference, Features) else None
    fixed = Reference(reference if real is None else real)
    groups = stratified_groups(features.labels, NUM_GROUPS if errors else 1)
    fid_without = frechet_without_each_group(values, fixed, groups, progress) if errors else np.array([np.nan])
    result = Scores(
        num_images=len(values),
        num_reference=fixed.count,
        fid=frechet_distance(values, fixed),
        fid_error=jackknife_error(fid_without),
        kid=None,
        kid_error=None,
        fid_infinity=None,
        fid_without=fid_without.tolist(),
        kid_without=None,
    )
    if real is not None:
        _add_kernel_distance(result, features, reference, groups, device)
        if not result.is_biased and errors:
            result.fid_infinity = frechet_infinity(values, features.labels, real, reference.labels)
    result.notes = caveats(result)
    return result


def _add_kernel_distance(result: Scores, features: Features, reference: Features, groups: np.ndarray, device) -> None:
    chosen = evenly_over_classes(features.labels, KID_MAX_IMAGES)
    real = reference.values[evenly_over_classes(reference.labels, KID_MAX_IMAGES)]
    sums = KernelSums(features.values[chosen].to(device), real.to(device), groups[chosen])
    result.kid = sums.distance()
    if len(sums.sizes) > 1:
        without = sums.without_each_group()
        result.kid_without, result.kid_error = without.tolist(), jackknife_error(without)


def caveats(result: Scores) -> list[str]:
    """What a reader must know before quoting the numbers."""
    notes = []
    if result.num_images != result.num_reference:
        notes.append(f"{result.num_images:,} generated against {result.num_reference:,} reference pictures: N differs")
    if result.is_biased:
        notes.append(
            f"fewer than {FULL_RANK:,} pictures on a side: the covariance is singular and FID far too high; it ranks "
            f"models at this N only. KID is unbiased"
        )
    if min(result.num_images, result.num_reference) < PUBLISHED_COUNT:
        notes.append(f"not comparable with published FID, which uses {PUBLISHED_COUNT:,} pictures")
    return notes


def require_same_network(first: Provenance, second: Provenance) -> None:
    """Raise ValueError unless both were computed by the same network at the same picture size."""
    for what, key in (("Inception weights", "extractor_digest"), ("feature layer", "num_features")):
        if getattr(first, key) != getattr(second, key):
            raise ValueError(
                f"{first.described} and {second.described} were computed with different {what} "
                f"({getattr(first, key)} and {getattr(second, key)}); compute both with the same --inception-weights"
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
        ValueError: another network or picture size, or no statistics in the file.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                raise ValueError(f"{path} holds no statistics: expected arrays mu and sigma, got {archive.files}")
            mean, covariance = torch.from_numpy(archive["mu"]), torch.from_numpy(archive["sigma"])
        return FeatureStatistics.from_moments(mean, covariance, PUBLISHED_COUNT), None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "provenance" not in metadata or not {"mean", "covariance"} <= set(file.keys()):
            raise ValueError(f"{path} holds no feature statistics; write them with evaluate --save-statistics")
        mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
    provenance = Provenance(**json.loads(metadata["provenance"]))
    require_same_network(expected, provenance)
    return FeatureStatistics.from_moments(mean, covariance, provenance.num_images), provenance
