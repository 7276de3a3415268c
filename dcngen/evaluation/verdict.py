"""Is one model better than another? The rule, and the reason in words.

Both are sampled under one plan, so picture i of either comes from the same seed and label, and leaving out the same
group of seeds on both sides gives paired values whose difference has a far smaller error than each alone. What that
error does not cover is training itself: a second training run with another seed moves FID about three times more than
resampling its pictures does, so that gaps below about 1.3 % stay undecided however many pictures are drawn. (The figure
was measured for FID and models trained to the end; it serves other feature spaces for want of their own, and after
short training the scatter is larger.) Where both were trained several times, the scatter between the runs is known and
takes its place.
"""

from dataclasses import dataclass, replace

import numpy as np

from dcngen.evaluation.scores import Scores
from dcngen.evaluation.spaces import FeatureSpace
from dcngen.evaluation.statistics import Z95, jackknife_error, mean_difference_interval

RETRAINING_SPREAD = 0.013  # relative


@dataclass
class Verdict:
    """A candidate against the baseline; differences are candidate minus baseline, so negative is better.

    Attributes:
        outcome: ``better``, ``worse`` or ``inconclusive``.
        reason: one or two sentences.
        frechet_difference, frechet_interval: and its 95 % interval over seeds, of sampling or of training.
        frechet_relative: the difference as a fraction of the baseline's distance.
        kernel_difference, kernel_interval: the same for the kernel distance.
        intervals: what the intervals are taken over, in words.
    """

    outcome: str
    reason: str
    frechet_difference: float
    frechet_interval: tuple[float, float]
    frechet_relative: float
    kernel_difference: float
    kernel_interval: tuple[float, float]
    intervals: str


def paired_interval(difference: float, first: list[float], second: list[float]) -> tuple[float, float]:
    """95 % interval of a difference from the two sides' values with the same group left out each."""
    half_width = Z95 * jackknife_error(np.asarray(second) - np.asarray(first))
    return difference - half_width, difference + half_width


def judge(baseline: Scores, candidate: Scores) -> Verdict:
    """Judge a candidate against a baseline scored under the same plan and reference."""
    frechet = candidate.frechet - baseline.frechet
    kernel = candidate.kernel - baseline.kernel
    return _verdict(
        [baseline],
        [candidate],
        paired_interval(frechet, baseline.frechet_without, candidate.frechet_without),
        paired_interval(kernel, baseline.kernel_without, candidate.kernel_without),
        ONE_RUN,
    )


def judge_repeats(baseline: list[Scores], candidate: list[Scores]) -> Verdict:
    """Judge a candidate trained several times against a baseline trained several times, with other seeds each.

    The intervals are Welch's for the difference of two means: two kinds of model need not scatter alike. They cover
    training and sampling together. Where one side was trained once, the verdict is inconclusive.

    Raises:
        ValueError: one run on both sides.
    """
    runs = f"{len(baseline)} and {len(candidate)} training runs"
    verdict = _verdict(
        baseline,
        candidate,
        mean_difference_interval([s.frechet for s in baseline], [s.frechet for s in candidate]),
        mean_difference_interval([s.kernel for s in baseline], [s.kernel for s in candidate]),
        Evidence("training seeds", "over training seeds", "train with more seeds", 0.0, f"These are means of {runs}"),
    )
    if verdict.outcome != "inconclusive" and min(len(baseline), len(candidate)) == 1:
        gap = _gap(baseline[0].space, verdict.frechet_relative)
        reason = f"{gap} in the mean, but one side was trained once and its scatter is unknown: train it again"
        return replace(verdict, outcome="inconclusive", reason=reason)
    return verdict


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on, in words, and the relative gap below which it decides nothing."""

    over: str
    intervals: str
    remedy: str
    least_gap: float
    closing: str


ONE_RUN = Evidence(
    "seeds",
    "paired by seed",
    "draw more pictures",
    RETRAINING_SPREAD,
    "This is one training run a side: repeat with other training seeds before calling it general",
)


def _verdict(baseline: list[Scores], candidate: list[Scores], frechet_interval, kernel_interval, evidence) -> Verdict:
    means = [np.mean([[s.frechet, s.kernel] for s in side], axis=0) for side in (baseline, candidate)]
    frechet, kernel = (float(value) for value in means[1] - means[0])
    relative = frechet / float(means[0][0])
    biased = any(scores.is_biased for scores in [*baseline, *candidate])
    outcome, reason = _decide(baseline[0].space, frechet_interval, kernel_interval, relative, biased, evidence)
    return Verdict(outcome, reason, frechet, frechet_interval, relative, kernel, kernel_interval, evidence.intervals)


def _decide(
    space: FeatureSpace, frechet_interval, kernel_interval, relative: float, biased: bool, evidence: Evidence
) -> tuple[str, str]:
    frechet_sign, kernel_sign = _sign(frechet_interval), _sign(kernel_interval)
    gap = _gap(space, relative)
    if frechet_sign == 0:
        return "inconclusive", f"{gap}, but the 95 % interval of the difference includes 0: {evidence.remedy}"
    if abs(relative) < evidence.least_gap:
        return "inconclusive", (
            f"{gap}, less than the {evidence.least_gap:.1%} by which training again with another seed moves FID"
        )
    if kernel_sign == -frechet_sign:
        return "inconclusive", f"{gap}, but {space.kernel} says the opposite, also beyond its error"
    if biased and kernel_sign == 0:
        return "inconclusive", (
            f"{gap}, but {space.frechet} is biased at this number of pictures and the 95 % interval of "
            f"{space.kernel} includes 0: draw more"
        )
    agrees = kernel_sign == frechet_sign
    agreement = (
        f"and {space.kernel} agrees" if agrees else f"while the interval of {space.kernel}'s difference includes 0"
    )
    return ("better" if frechet_sign < 0 else "worse"), (
        f"{gap}, beyond the 95 % interval over {evidence.over}, {agreement}. {evidence.closing}"
    )


def _gap(space: FeatureSpace, relative: float) -> str:
    return f"{space.frechet} is {abs(relative):.1%} {'lower' if relative < 0 else 'higher'}"


def _sign(interval: tuple[float, float]) -> int:
    low, high = interval
    return 1 if low > 0 else -1 if high < 0 else 0
