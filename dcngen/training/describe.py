"""A run in words: the dry run, and the banner above the progress bar."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dcngen.config import TrainConfig
from dcngen.config.loader import to_yaml
from dcngen.models import count_parameters
from dcngen.training.autoencoder import build_autoencoder
from dcngen.training.build import build_unet, has_classes, shrink_factor

# stabilityai/sd-vae-ft-*: assumed where a hub autoencoder's configuration is not on this machine.
_USUAL_PRETRAINED = (4, 8)


def describe(config: TrainConfig, num_processes: int = 1) -> str:
    """The resolved configuration, shapes, parameter counts and steps of a run.

    Reads nothing but folders named in the configuration; models are built without memory for their weights.
    """
    channels, factor, vae_line = _autoencoder(config)
    size = config.data.image_size
    if size % factor:
        raise ValueError(f"data.image_size: expected a multiple of {factor}, the autoencoder's factor, got {size}")
    latent_shape = (channels, size // factor, size // factor)
    num_classes = known_num_classes(config)
    with torch.device("meta"):
        unet = build_unet(
            config.model,
            latent_shape=latent_shape,
            num_classes=num_classes or 1,
            num_train_timesteps=config.objective.num_train_timesteps,
            seed=config.seed,
        )
    classes = f"{num_classes} classes" if num_classes else "classes are counted when the data is opened"
    lines = [
        to_yaml(config).rstrip(),
        "",
        f"run          {config.run_folder}",
        f"data         {config.data.name}, pictures 3x{size}x{size}, {classes}",
        f"autoencoder  {vae_line}",
        f"latents      {'x'.join(map(str, latent_shape))}",
        f"U-Net        {count_parameters(unet):,} parameters{_embedding_note(config, num_classes)}",
        *steps_lines(config, num_processes),
    ]
    return "\n".join(lines)


def steps_lines(
    config: TrainConfig, num_processes: int, first_step: int = 0, num_images: int | None = None
) -> list[str]:
    """Batch, steps, pictures seen (and epochs, where the number of pictures is known), checkpoints."""
    options = config.train
    total = total_batch_size(config, num_processes)
    seen = total * options.max_train_steps
    epochs = f", {seen / num_images:,.1f} epochs of {num_images:,}" if num_images else ""
    every = config.checkpoint.checkpointing_steps
    parts = (
        f"{options.train_batch_size} x {num_processes} processes x {options.gradient_accumulation_steps} accumulated"
    )
    return [
        f"batch        {total} ({parts})",
        f"steps        {first_step:,} to {options.max_train_steps:,}: {seen:,} pictures seen{epochs}",
        f"learning     {config.optimizer.learning_rate:g} {config.schedule.lr_scheduler}, warm-up "
        f"{config.schedule.lr_warmup_steps:,} steps, EMA {config.ema.decay:g}",
        f"checkpoints  {f'every {every:,} steps' if every else 'at the end'}, "
        f"the newest {config.checkpoint.checkpoints_total_limit} kept",
    ]


def total_batch_size(config: TrainConfig, num_processes: int) -> int:
    """Pictures an optimizer step over all processes."""
    return config.train.train_batch_size * config.train.gradient_accumulation_steps * num_processes


def known_num_classes(config: TrainConfig) -> int | None:
    """The number of classes as far as it can be told without fetching or preparing the data."""
    if config.data.name == "earth":
        from dcngen.data.earth import CLASS_NAMES

        return len(CLASS_NAMES)
    if config.data.name == "fashion-mnist":
        return 10
    folder = Path(config.data.name).expanduser()
    if folder.is_dir():
        from dcngen.data.sources import folder_source

        return len(folder_source(folder, "train").class_names)
    return None


def _autoencoder(config: TrainConfig) -> tuple[int, int, str]:
    """Latent channels, factor by which the picture shrinks, and a line about it."""
    options = config.autoencoder
    if not options.pretrained:
        with torch.device("meta"):
            parameters = count_parameters(build_autoencoder(options, config.data.image_size))
        factor = shrink_factor(options)
        return (
            options.latent_channels,
            factor,
            f"trained here, {parameters:,} parameters, {options.max_train_steps:,} steps",
        )
    folder = Path(options.pretrained) / (options.subfolder or "")
    if not folder.is_dir():
        return *_USUAL_PRETRAINED, f"{options.pretrained} (not read: assumed to be Stable Diffusion's, 4 channels, 1/8)"
    saved = AutoencoderKL.load_config(folder)
    return saved["latent_channels"], 2 ** (len(saved["block_out_channels"]) - 1), str(folder)


def _embedding_note(config: TrainConfig, num_classes: int | None) -> str:
    if num_classes is None and config.model.class_conditional:
        return ", plus one embedding a class"
    return "" if num_classes and has_classes(config.model, num_classes) else ", unconditional"
