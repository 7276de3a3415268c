"""Runs of one recipe with several training seeds: which belong together, and what they say as one."""

from dataclasses import asdict, dataclass

import numpy as np

from dcngen.evaluation.runs import Run, recipe
from dcngen.evaluation.statistics import mean_half_width
from dcngen.evaluation.verdict import Verdict, judge_repeats


@dataclass
class Repeats:
    """The runs of one recipe.

    Attributes:
        arms: one a training seed (:class:`dcngen.evaluation.comparison.Arm`).
        verdict: of their mean against the first recipe's; None for the first.
    """

    arms: list
    verdict: Verdict | None = None

    @property
    def name(self) -> str:
        """The first run's name, and how many there are."""
        count = len(self.arms)
        return f"{self.arms[0].run.name}, {count} training seeds" if count > 1 else self.arms[0].run.name

    def mean(self, distance: str) -> tuple[float, float | None]:
        """Mean of ``frechet`` or ``kernel`` over the runs, and half of its 95 % interval (None of one run)."""
        values = [getattr(arm.scores, distance) for arm in self.arms]
        return float(np.mean(values)), mean_half_width(values)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        space = self.arms[0].scores.space
        frechet, kernel = self.mean("frechet"), self.mean("kernel")
        values = {"frechet_mean": frechet[0], "frechet_half_width": frechet[1]}
        values |= {"kernel_mean": kernel[0], "kernel_half_width": kernel[1]}
        verdict = space.named(asdict(self.verdict)) if self.verdict else None
        return {"runs": [arm.run.name for arm in self.arms], **space.named(values), "verdict": verdict}

    def takes(self, run: Run) -> bool:
        """Whether a run differs from these in nothing but bookkeeping and a training seed of its own."""
        first = self.arms[0].run
        seeds = {arm.run.config.get("seed") for arm in self.arms}
        return recipe(first) == recipe(run) and run.config.get("seed") not in seeds


def group_repeats(arms: list) -> list[Repeats]:
    """The arms by recipe, in the order in which recipes appear, each judged against the first.

    Empty where no recipe has several training seeds. Of two recipes trained once each, their runs are judged.
    """
    groups: list[Repeats] = []
    for arm in arms:
        group = next((g for g in groups if g.takes(arm.run)), None)
        if group is None:
            groups.append(Repeats([arm]))
        else:
            group.arms.append(arm)
    if len(groups) == len(arms):
        return []
    baseline = [arm.scores for arm in groups[0].arms]
    for group in groups[1:]:
        single = len(baseline) == len(group.arms) == 1
        group.verdict = group.arms[0].verdict if single else judge_repeats(baseline, [arm.scores for arm in group.arms])
    return groups
