"""Latent diffusion: objectives, samplers, the pipeline, and sampling to disk."""

from dcngen.diffusion.digests import module_digest, pipeline_digest
from dcngen.diffusion.export import export_self_contained
from dcngen.diffusion.images import image_grid
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
from dcngen.diffusion.plan import SamplePlan
from dcngen.diffusion.sampling import default_batch_size, sample_images
from dcngen.diffusion.schedulers import SAMPLERS, make_scheduler, model_evaluations

__all__ = [
    "IMAGE_RULE",
    "SAMPLERS",
    "LatentDiffusionPipeline",
    "Objective",
    "SamplePlan",
    "default_batch_size",
    "derive_seed",
    "drop_labels",
    "export_self_contained",
    "image_grid",
    "make_scheduler",
    "model_evaluations",
    "module_digest",
    "pipeline_digest",
    "sample_images",
    "scale_latents",
    "seeded_generator",
    "seeded_noise",
    "set_sampling_timesteps",
    "to_uint8",
    "unscale_latents",
]
