"""Training batches as a function of (seed, rank, step): to resume, nothing but the step must be known.

Which latents a step sees depends on (seed, step) and not on the number of processes; the noise depends on the rank too.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from dcngen.data import LatentSet, sample_moments
from dcngen.diffusion import Objective, derive_seed, drop_labels, seeded_generator


class EpochOrder:
    """Positions 0, 1, 2, ... of an endless stream, mapped to items: each epoch is a new permutation of all of them.

    Args:
        num_items: items in the set.
        seed, stream: which order.
        device: where the permutations are kept (drawn on the CPU, so that the order is the same on every device).
    """

    def __init__(self, num_items: int, seed: int, stream: str, device: str | torch.device = "cpu"):
        self.num_items, self.seed, self.stream, self.device = num_items, seed, stream, torch.device(device)
        self._permutations: dict[int, torch.Tensor] = {}

    def __call__(self, start: int, count: int) -> torch.Tensor:
        """Items (count,) int64 at positions start to start + count."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.num_items)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            generator = seeded_generator(self.seed, self.stream, epoch)
            self._permutations[epoch] = torch.randperm(self.num_items, generator=generator).to(self.device)
        return self._permutations[epoch]


@dataclass
class Batch:
    """What one forward pass needs: latents and noise (N, c, h, w) fp32, timesteps (N,), labels (N,) or None."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    labels: torch.Tensor | None


class LatentBatches:
    """The batch of any (step, accumulation index), drawn on the device without waiting for it.

    Args:
        latents: the cached posteriors.
        normalize: unscaled latents to what the U-Net sees.
        objective: draws the timesteps.
        seed, rank, world_size, batch_size, accumulation_steps: which part of the stream is this process's.
        null_class, label_dropout: labels are replaced by null_class that often; null_class None: no labels at all.
        device: where batches live.
        resident: keep all posteriors on the device; otherwise they are fetched one batch ahead.
    """

    def __init__(
        self,
        latents: LatentSet,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        objective: Objective,
        *,
        seed: int,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        null_class: int | None = None,
        label_dropout: float = 0.0,
        device: str | torch.device = "cpu",
        resident: bool = True,
    ):
        self.normalize, self.objective, self.seed = normalize, objective, seed
        self.batch_size, self.accumulation_steps, self.rank, self.world_size = (
            batch_size,
            accumulation_steps,
            rank,
            world_size,
        )
        self.null_class, self.label_dropout, self.device = null_class, label_dropout, torch.device(device)
        self.order = EpochOrder(len(latents), seed, "order", self.device if resident else "cpu")
        self._fetch = ResidentLatents(latents, self.device) if resident else FetchedLatents(latents, self.device)

    def __call__(self, step: int, micro_step: int = 0) -> Batch:
        key = step * self.accumulation_steps + micro_step
        moments, labels = self._fetch(self._indices, key)
        generator = seeded_generator(self.seed, "batch", self.rank, step, micro_step, device=self.device)
        latents = self.normalize(sample_moments(moments, generator))
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        timesteps = self.objective.sample_timesteps(len(latents), generator, self.device)
        if self.null_class is None:
            return Batch(latents, noise, timesteps, None)
        return Batch(latents, noise, timesteps, drop_labels(labels, self.null_class, self.label_dropout, generator))

    def _indices(self, key: int) -> torch.Tensor:
        """This process's items of batch `key`: the stream is dealt out in blocks, one for each rank in turn."""
        return self.order((key * self.world_size + self.rank) * self.batch_size, self.batch_size)

    def seed_dropout(self, step: int) -> None:
        """Reseed torch's global generators, which dropout draws from."""
        torch.manual_seed(derive_seed(self.seed, "dropout", self.rank, step))


class ResidentLatents:
    """All posteriors and labels in the device's memory (ImageNet-256 in fp16: 21 GB), gathered by an index tensor."""

    def __init__(self, latents: LatentSet, device: torch.device):
        self.moments, self.labels = latents.moments.to(device), latents.labels.to(device)

    def __call__(self, indices: Callable[[int], torch.Tensor], key: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = indices(key)
        return self.moments[chosen], self.labels[chosen]


class FetchedLatents:
    """Posteriors read from the cache by a thread, one batch ahead of the one that is asked for."""

    def __init__(self, latents: LatentSet, device: torch.device):
        self.latents, self.device = latents, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self._ahead: dict[int, Future] = {}

    def __call__(self, indices: Callable[[int], torch.Tensor], key: int) -> tuple[torch.Tensor, torch.Tensor]:
        now = self._ahead.get(key) or self._pool.submit(self._read, indices, key)
        self._ahead = {key + 1: self._pool.submit(self._read, indices, key + 1)}
        return tuple(part.to(self.device, non_blocking=True) for part in now.result())

    def _read(self, indices: Callable[[int], torch.Tensor], key: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = indices(key)
        parts = self.latents.gather(chosen), self.latents.labels[chosen]
        return tuple(part.pin_memory() for part in parts) if self.device.type == "cuda" else parts
