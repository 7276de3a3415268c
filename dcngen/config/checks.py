"""What the groups of a configuration ask of each other."""

from __future__ import annotations

from dcngen.config.options import TrainConfig
from dcngen.diffusion.pipeline import NUM_SEEDS, set_sampling_timesteps
from dcngen.diffusion.schedulers import make_scheduler


def check_sampling(config: TrainConfig) -> None:
    """Whether the grids can be drawn, before anything is trained.

    No part of the dataclasses: a run that was saved with such settings must open, to be resumed with others.

    Raises:
        ValueError: no picture, a seed out of range, a sampler that cannot follow the objective or not in so many steps.
    """
    options = config.sampling
    if options.num_images < 1:
        raise ValueError(f"sampling.num_images: expected at least 1 picture, got {options.num_images}; 16 is usual")
    if not 0 <= options.seed <= NUM_SEEDS - options.num_images:
        raise ValueError(
            f"sampling.seed: expected 0 to {NUM_SEEDS - options.num_images} (2**32 less sampling.num_images), got "
            f"{options.seed}"
        )
    try:
        scheduler = make_scheduler(options.sampler, config.objective.scheduler_config())
        set_sampling_timesteps(scheduler, options.num_inference_steps)
    except ValueError as error:
        steps = options.num_inference_steps
        raise ValueError(
            f"sampling.sampler {options.sampler} with sampling.num_inference_steps {steps}: {error}"
        ) from error
