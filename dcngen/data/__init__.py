"""Data sets of labelled pictures, and the latent cache."""

from dcngen.data.config import DataConfig, default_cache_dir
from dcngen.data.images import ImageSet, open_images
from dcngen.data.latents import LatentSet, cache_latents, sample_moments

__all__ = [
    "DataConfig",
    "ImageSet",
    "LatentSet",
    "cache_latents",
    "default_cache_dir",
    "open_images",
    "sample_moments",
]
