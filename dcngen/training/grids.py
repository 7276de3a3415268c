"""Pictures from the averaged weights: the grids along the way, and the pipeline that a run leaves."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dcngen.config import SamplingConfig
from dcngen.diffusion import LatentDiffusionPipeline, Objective, image_grid, make_scheduler
from dcngen.training.checkpoint import replaced_directory

IMAGES_A_BATCH = 64


def build_pipeline(unet, vae, objective: Objective, class_names: list[str] | None) -> LatentDiffusionPipeline:
    """The pipeline of an averaged U-Net, on the device it is on; class_names None where it has no classes."""
    return LatentDiffusionPipeline(unet, vae, objective.scheduler_config(), class_names=class_names)


def sample_grid(pipeline: LatentDiffusionPipeline, config: SamplingConfig, mixed_precision: str = "no") -> torch.Tensor:
    """config.num_images pictures (N, 3, H, W) uint8 on the CPU: label i modulo the classes, noise of seed + i."""
    sampler = make_scheduler(config.sampler, pipeline.scheduler)
    pipeline = LatentDiffusionPipeline(pipeline.unet, pipeline.vae, sampler)
    pipeline.set_progress_bar_config(desc="sampling a grid", leave=False)
    parts = []
    for start in range(0, config.num_images, IMAGES_A_BATCH):
        indices = range(start, min(start + IMAGES_A_BATCH, config.num_images))
        labels = [i % pipeline.num_classes for i in indices] if pipeline.num_classes else None
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            images = pipeline(
                labels,
                seeds=[config.seed + i for i in indices],
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale if labels else 1.0,
                output_type="uint8",
            ).images
        parts.append(images.cpu())
    return torch.cat(parts)


def arrange_grid(images: torch.Tensor, num_classes: int = 0) -> Image.Image:
    """Pictures (N, 3, H, W) uint8 in rows, one column a class where they are few."""
    return image_grid(images, num_classes if 1 < num_classes <= 10 and len(images) > num_classes else None)


def save_pipeline(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline folder, whole or not at all, replacing an older one."""
    with replaced_directory(Path(folder)) as scratch:
        pipeline.save_pretrained(scratch)
