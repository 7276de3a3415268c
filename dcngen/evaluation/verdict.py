"""Is one model better than another? The rule, and the reason in words.

Both are sampled under one plan, so picture i of either comes from the same seed and label, and leaving out the same
group of seeds on both sides gives paired values whose difference has a far smaller error than each alone. What that
error does not cover is training itself: a second training run with another seed moves FID about three times more than
resampling its pictures does, so that gaps below about 1.3 % stay undecided however many pictures are drawn.
"""

from dataclasses import dataclass

import numpy as np

from dcngen.evaluation.fid import Scores
from dcngen.evaluation.statistics import Z95, jackknife_error

RETRAINING_SPREAD = 0.013  # relative


@dataclass
class Verdict:
    """A candidate against the baseline; differences are candidate minus baseline, so negative is better.

    Attributes:
        outcome: ``better``, ``worse`` or ``inconclusive``.
        reason: one or two sentences.
        fid_difference, fid_interval: and its 95 % interval over seeds.
        fid_relative: the difference as a fraction of the baseline's FID.
        kid_difference, kid_interval: the same for KID.
    """

    outcome: str
    reason: str
    fid_difference: float
    fid_interval: tuple[float, float]
    fid_relative: float
    kid_difference: float
    kid_interval: tuple[float, float]


def paired_interval(difference: float, first: list[float], second: list[float]) -> tuple[float, float]:
    """95 % interval of a difference from the two sides' values with the same group left out each."""
    half_width = Z95 * jackknife_error(np.asarray(second) - np.asarray(first))
    return difference - half_width, difference + half_width


def judge(baseline: Scores, candidate: Scores) -> Verdict:
    """Judge a candidate against a baseline scored under the same plan and reference."""
    fid = candidate.fid - baseline.fid
    kid = candidate.kid - baseline.kid
    fid_interval = paired_interval(fid, baseline.fid_without, candidate.fid_without)
    kid_interval = paired_interval(kid, baseline.kid_without, candidate.kid_without)
    relative = fid / baseline.fid
    outcome, reason = _decide(fid_interval, kid_interval, relative, baseline.is_biased or candidate.is_biased)
    return Verdict(outcome, reason, fid, fid_interval, relative, kid, kid_interval)


def _decide(fid_interval, kid_interval, relative: float, biased: bool) -> tuple[str, str]:
    fid_sign, kid_sign = _sign(fid_interval), _sign(kid_interval)
    gap = f"FID is {abs(relative):.1%} {'lower' if relative < 0 else 'higher'}"
    if fid_sign == 0:
        return "inconclusive", f"{gap}, but the 95 % interval of the difference includes 0: draw more pictures"
    if abs(relative) < RETRAINING_SPREAD:
        return "inconclusive", (
            f"{gap}, less than the {RETRAINING_SPREAD:.1%} by which training again with another seed moves it"
        )
    if kid_sign == -fid_sign:
        return "inconclusive", f"{gap}, but KID says the opposite, also beyond its error"
    if biased and kid_sign == 0:
        return "inconclusive", (
            f"{gap}, but FID is biased at this number of pictures and KID's 95 % interval includes 0: draw more"
        )
    agreement = "and KID agrees" if kid_sign == fid_sign else "while the interval of KID's difference includes 0"
    return ("better" if fid_sign < 0 else "worse"), (
        f"{gap}, beyond the 95 % interval over seeds, {agreement}. This is one training run a side: repeat with "
        f"other training seeds before calling it general"
    )


def _sign(interval: tuple[float, float]) -> int:
    low, high = interval
    return 1 if low > 0 else -1 if high < 0 else 0
