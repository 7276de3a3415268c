"""The exponential moving average of a model's weights, in fp32."""

from __future__ import annotations

import copy

import torch


class EMA:
    """A second model whose parameters follow the trained one's: ema <- decay * ema + (1 - decay) * weight.

    diffusers' EMAModel keeps bare tensors and builds a full-size temporary at each step; this is a whole model, ready
    to sample and to save, updated in one pass over memory, and its decay is a function of the step alone.

    Attributes:
        model: the averaged model, in evaluation mode, without gradients, fp32 (in bf16 an update by 1e-4 of the
            difference is lost to rounding and the average stands still).

    Args:
        model: the model to follow, in fp32.
        decay: after warm-up.
        warmup: use min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, model: torch.nn.Module, decay: float, warmup: bool = True):
        wrong = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
        if wrong:
            raise TypeError(
                f"EMA expected fp32 weights, got {', '.join(sorted(wrong))}; keep weights fp32 under autocast"
            )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimizer step `step` (0 is the first)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Follow `model` after its optimizer step `step`; queues work on the device and waits for none of it."""
        averages, weights = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay_at(step))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
