"""Train a latent diffusion model, from pictures to a pipeline folder.

    accelerate launch train_ldm.py --config configs/earth_dcn.yaml
    accelerate launch train_ldm.py --config configs/earth_dcn.yaml --resume
    python train_ldm.py --preset small --data.name path/to/class/folders --name mine
    python train_ldm.py --config configs/imagenet256_dcn.yaml --dry-run

This file is the table of contents; each line's room is in dcngen/training. The run folder runs/<name>/ holds
config.yaml, run.json, metrics.jsonl, tensorboard/, checkpoints/, samples/ and, in the end, pipeline/.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator

from dcngen import training
from dcngen.config import Command, TrainConfig, parse_command_line
from dcngen.config.loader import to_yaml
from dcngen.data import ImageSet, LatentSet, cache_latents, open_images
from dcngen.diffusion import scale_latents


def train(command: Command) -> training.RunFolder:
    """Train as commanded; returns the run folder, with pipeline/ in it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, FloatingPointError, training.Interrupted: with what to do.
    """
    config = command.config
    run = training.find_run(command)
    accelerator = training.start_accelerator(config, run.path)
    if run.finished:
        accelerator.print(f"{run.path} is finished ({config.train.max_train_steps:,} steps); nothing to do")
        return run
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if accelerator.is_main_process:
        training.open_run(run, command)
    accelerator.print(to_yaml(config))

    images, autoencoder, latents = prepare_latents(config, accelerator)
    state = build_state(config, accelerator, latents.shape, images.num_classes)
    if run.checkpoint:
        training.resume(state, run.checkpoint)
        if accelerator.is_main_process:
            training.continue_run(run, config, state.progress.step)
    class_names = images.class_names if training.has_classes(config.model, images.num_classes) else None
    pipeline = training.build_pipeline(state.ema.model, autoencoder.vae, config.objective, class_names)

    record = training.describe_run(config, accelerator, images, autoencoder, latents, state.unet)
    log = training.RunLog(run, accelerator, config, record, first_step=state.progress.step)
    log.print_banner(num_latents=len(latents))

    def sample(step: int) -> None:
        pictures = training.sample_grid(pipeline, config.sampling, accelerator.mixed_precision)
        log.write_grid(training.arrange_grid(pictures, pipeline.num_classes), step)

    batches = build_batches(config, accelerator, latents, autoencoder, pipeline.null_class)
    trainer = training.Trainer(accelerator, config, state, batches, run.checkpoints, log, sample)
    try:
        trainer.fit()
        if accelerator.is_main_process:
            training.save_pipeline(pipeline, run.pipeline)  # before the grid: a grid that fails must not cost it
            sample(state.progress.step)
            log.finish(state.progress)
        accelerator.wait_for_everyone()
    finally:
        accelerator.end_training()
    accelerator.print(f"{run.path}: finished; draw pictures with `python sample.py --run {run.path} --num-images 16`")
    return run


def prepare_latents(config: TrainConfig, accelerator: Accelerator) -> tuple[ImageSet, training.Autoencoder, LatentSet]:
    """Pictures, autoencoder and latents: each is made once, kept in the cache, and shared by all runs of this data."""
    device, cache, shown = accelerator.device, config.data.cache_root, accelerator.is_main_process
    with accelerator.main_process_first():
        images = open_images(config.data, "train", progress=shown)
        autoencoder = training.load_or_train_autoencoder(
            config.autoencoder,
            images,
            cache,
            device=device,
            mixed_precision=accelerator.mixed_precision,
            compile=config.train.compile,
            progress=shown,
        )
        # About the memory of 256 pictures of 64 pixels, whatever their size.
        batch_size = max(1, min(256, 2**20 // config.data.image_size**2))
        latents = cache_latents(
            images,
            autoencoder.vae,
            cache,
            vae_digest=autoencoder.digest,
            batch_size=batch_size,
            device=device,
            progress=shown,
        )
    if not config.autoencoder.pretrained:
        training.set_latent_statistics(autoencoder.vae, latents)
    return images, autoencoder, latents


def build_state(
    config: TrainConfig, accelerator: Accelerator, latent_shape: tuple[int, int, int], num_classes: int
) -> training.TrainState:
    """The U-Net, its average and its optimizer, at step 0."""
    unet = training.build_unet(
        config.model,
        latent_shape=latent_shape,
        num_classes=num_classes,
        num_train_timesteps=config.objective.num_train_timesteps,
        seed=config.seed,
    ).to(accelerator.device, memory_format=torch.channels_last)
    return training.TrainState(
        unet=unet,
        ema=training.EMA(unet, config.ema.decay, config.ema.warmup),
        optimizer=training.build_optimizer(unet, config.optimizer, accelerator.device),
        progress=training.Progress(
            total_batch_size=training.total_batch_size(config, accelerator.num_processes),
            num_processes=accelerator.num_processes,
        ),
    )


def build_batches(
    config: TrainConfig,
    accelerator: Accelerator,
    latents: LatentSet,
    autoencoder: training.Autoencoder,
    null_class: int | None,
) -> training.LatentBatches:
    """The batch of any step, as a function of (seed, rank, step)."""
    return training.LatentBatches(
        latents,
        lambda sampled: scale_latents(sampled, autoencoder.vae),
        config.objective,
        seed=config.seed,
        batch_size=config.train.train_batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        null_class=null_class,
        label_dropout=config.train.label_dropout,
        device=accelerator.device,
        resident=config.train.latents_on_device,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; exit status 0: done, 1: an error that the user can mend, 130: interrupted."""
    try:
        command = parse_command_line(argv)
        if command.dry_run:
            print(training.describe(command.config, int(os.environ.get("WORLD_SIZE", 1))))
        else:
            train(command)
    except (training.Interrupted, KeyboardInterrupt) as stop:
        print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("DCNGEN_TRACEBACK") or not str(error):
            raise
        print(f"{type(error).__name__}: {error}\n(DCNGEN_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
