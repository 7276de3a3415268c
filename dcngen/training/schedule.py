"""The learning rate as a function of the step alone, so that a resumed run needs nothing but its step."""

import math


def learning_rate_factor(step: int, name: str, warmup_steps: int, total_steps: int) -> float:
    """Multiplier of the peak learning rate at optimizer step `step` (0 is the first).

    Linear warm-up (step + 1) / warmup_steps, so that the first step already learns; then 1 ("constant"), or
    (1 + cos(pi * progress)) / 2 ("cosine", Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5 without restarts), which
    reaches 0 right after the last step.

    Raises:
        ValueError: an unknown schedule.
    """
    if name not in ("constant", "cosine"):
        raise ValueError(f"lr_scheduler: expected constant or cosine, got {name!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
