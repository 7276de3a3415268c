"""FID and its company: feature networks, distances with error bars, comparisons of runs, reports."""

from dcngen.evaluation.dinov2 import DINOv2Features, load_dinov2
from dcngen.evaluation.features import Features, extract_features, matching_reference, open_generated
from dcngen.evaluation.inception import InceptionFeatures
from dcngen.evaluation.inception_weights import export_weights, find_weights, load_inception
from dcngen.evaluation.metrics import frechet_distance, frechet_metric, kernel_distance
from dcngen.evaluation.moments import FeatureStatistics
from dcngen.evaluation.scores import Scores, load_statistics, save_statistics, score
from dcngen.evaluation.spaces import DINOV2, INCEPTION, FeatureSpace
from dcngen.evaluation.verdict import Verdict, judge

__all__ = [
    "DINOV2",
    "INCEPTION",
    "DINOv2Features",
    "FeatureSpace",
    "FeatureStatistics",
    "Features",
    "InceptionFeatures",
    "Scores",
    "Verdict",
    "export_weights",
    "extract_features",
    "find_weights",
    "frechet_distance",
    "frechet_metric",
    "judge",
    "kernel_distance",
    "load_dinov2",
    "load_inception",
    "load_statistics",
    "matching_reference",
    "open_generated",
    "save_statistics",
    "score",
]
