"""Latent diffusion: objectives, samplers, the pipeline, and sampling to disk."""

from dcngen.diffusion.noise import derive_seed, seeded_generator
from dcngen.diffusion.objectives import Objective, drop_labels
from dcngen.diffusion.pipeline import (
    IMAGE_RULE,
    LatentDiffusionPipeline,
    scale_latents,
    seeded_noise,
    set_sampling_timesteps,
    to_uint8,
    unscale_latents,
)
from dcngen.diffusion.schedulers import SAMPLERS, make_scheduler, model_evaluations

__all__ = [
    "IMAGE_RULE",
    "SAMPLERS",
    "LatentDiffusionPipeline",
    "Objective",
    "derive_seed",
    "drop_labels",
    "make_scheduler",
    "model_evaluations",
    "scale_latents",
    "seeded_generator",
    "seeded_noise",
    "set_sampling_timesteps",
    "to_uint8",
    "unscale_latents",
]
