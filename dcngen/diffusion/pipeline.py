"""LatentDiffusionPipeline: class-conditional latent diffusion in the manner of diffusers.

This file imports nothing from its own package: the self-contained export ships it as it stands.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image

# The one rule by which a decoded image becomes bytes; the inverse of the x = u / 127.5 - 1 that pictures enter with.
IMAGE_RULE = "uint8 = clamp(round_half_even((x + 1) * 127.5), 0, 255)"
OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")
# The CPU generator keeps the low 32 bits of its seed: seeds i and i + 2**32 would silently draw the same noise.
NUM_SEEDS = 2**32


def seeded_noise(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, one independent sample a seed, (len(seeds), *shape) fp32 on the CPU.

    Sample i is the first draw of a CPU generator seeded with seeds[i], so it depends on that seed alone: not on the
    device, the batch it is drawn in, or the number of processes.

    Raises:
        ValueError: a seed outside [0, 2**32).
    """
    noise = torch.empty(len(seeds), *shape)
    for sample, seed in zip(noise, seeds, strict=True):
        if not 0 <= seed < NUM_SEEDS:
            raise ValueError(f"seeds expected integers in [0, 2**32), got {seed}; larger ones repeat smaller ones")
        torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)), out=sample)
    return noise


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], any floating dtype, to uint8 by `IMAGE_RULE`; the shape is kept."""
    return images.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def scale_latents(latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """The autoencoder's latents as the diffusion model sees them: (latents - shift_factor) * scaling_factor, fp32."""
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscale_latents(latents: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Inverse of `scale_latents`, fp32."""
    return latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def set_sampling_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Give `scheduler` a correct grid of `num_inference_steps` steps; prefer this to its own `set_timesteps`.

    Four things go wrong with the plain call (diffusers 0.42):
    - trailing spacing comes from `arange` with a floating step, which for 61, 103, 121, ... of 1000 steps yields one
      step too many, at timestep -1; here the grid round((n - i) * T / n) - 1 is computed in integers and passed in;
    - DDIM steps by T // n whatever its grid, so that n not dividing T leaves noise behind (40 % of it at 600 of 1000):
      refused;
    - the flow schedulers space from a smallest sigma that is already shifted and shift it again, ending with a step of
      no length; here sigma = 1, (n - 1)/n, ..., 1/n, 0, shifted once;
    - DPM-Solver truncates flow timesteps to integers, so the model is told another noise level than it is given.
    The scheduler's own state stays on the CPU: its arithmetic with one-element tensors never waits for a GPU.

    Raises:
        ValueError: a number of steps that the scheduler cannot do right.
    """
    n, total = num_inference_steps, scheduler.config.num_train_timesteps
    if not 1 <= n <= total:
        raise ValueError(f"num_inference_steps expected 1 to {total} (the model's num_train_timesteps), got {n}")
    name, arguments = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    own_grid = any(
        scheduler.config.get(f"use_{kind}")
        for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "dynamic_shifting")
    )
    if name.startswith("FlowMatchEuler") and not own_grid:
        scheduler.set_timesteps(sigmas=[(n - i) / n for i in range(n)])
    elif name.startswith("FlowMatchHeun"):
        scheduler.sigma_max, scheduler.sigma_min = 1.0, 1.0 / n
        scheduler.set_timesteps(n)
    elif scheduler.config.get("use_flow_sigmas"):
        scheduler.set_timesteps(n)
        scheduler.timesteps = scheduler.sigmas[:-1] * total
    elif name.startswith("DDIM"):
        if total % n:
            divisors = [d for d in range(1, total + 1) if total % d == 0]
            below, above = max(d for d in divisors if d < n), min(d for d in divisors if d > n)
            raise ValueError(
                f"DDIM expected a number of steps that divides {total}, got {n}; use {below} or {above} "
                "steps, or the Euler sampler, which is the same solver for any number of steps"
            )
        scheduler.set_timesteps(n)
    elif scheduler.config.get("timestep_spacing") == "trailing" and "timesteps" in arguments and not own_grid:
        # (2*a + b) // (2*b) is a / b rounded half up, without a float.
        scheduler.set_timesteps(timesteps=[(2 * (n - i) * total + n) // (2 * n) - 1 for i in range(n)])
    else:
        scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise the first step looks its index up by value and takes the second of two equal timesteps.
        scheduler.set_begin_index(0)


class LatentDiffusionPipeline(DiffusionPipeline):
    """Class-conditional (or unconditional) latent diffusion: noise, guided denoising, decoding.

    Args:
        unet: a UNet2DModel or subclass. When class-conditional, its last class embedding (num_class_embeds - 1) is the
            null class used for guidance.
        vae: the AutoencoderKL that decodes; the U-Net's latents are (vae latents - shift_factor) * scaling_factor.
        scheduler: carries the training objective (prediction type, noise schedule) and is the default sampler. A call
            works on a copy and never changes it.
        class_names: one name a class, without the null class; saved in model_index.json.

    Raises:
        ValueError: the U-Net's channels, the autoencoder's latent channels or the class names do not fit each other.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        class_names: list[str] | None = None,
    ):
        super().__init__()
        channels = (unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels)
        if len(set(channels)) != 1:
            raise ValueError(
                "expected the U-Net's in_channels and out_channels to equal the autoencoder's "
                f"latent_channels, got {channels[0]}, {channels[1]} and {channels[2]}"
            )
        if class_names is not None and len(class_names) != (unet.config.num_class_embeds or 1) - 1:
            raise ValueError(
                f"class_names expected {(unet.config.num_class_embeds or 1) - 1} names (the U-Net's class "
                f"embeddings without the null class), got {len(class_names)}"
            )
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names) if class_names is not None else None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a saved pipeline (a folder or a hub id). As diffusers' own, and besides:

        - a U-Net class of the package that this class lives in is imported first: diffusers looks such classes up among
          the modules already imported, and refuses the folder otherwise;
        - a folder whose U-Net was saved by another class than the one that loads it is an error: diffusers warns, and
          leaves the weights that it cannot place random.
        """
        config = cls.load_config(pretrained_model_name_or_path, **_hub_arguments(kwargs))
        package = __name__.split(".")[0]
        for value in config.values():
            if isinstance(value, (list, tuple)) and value and str(value[0]).startswith(package + "."):
                importlib.import_module(value[0])
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "unet" not in kwargs:
            _check_saved_class(pipeline.unet, pretrained_model_name_or_path)
        return pipeline

    @property
    def num_classes(self) -> int:
        """Number of real classes: 0 for an unconditional model; the null class is not counted."""
        return (self.unet.config.num_class_embeds or 1) - 1

    @property
    def null_class(self) -> int | None:
        """Index of the "no class" embedding, the last one; None for an unconditional model."""
        return self.num_classes if self.unet.config.num_class_embeds else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        decode_batch_size: int = 16,
        callback_on_step_end: Callable | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images, all in one batch.

        Args:
            class_labels: one label, (N,) labels, or None: the null class of a conditional model, or no class at all.
            seeds: one seed an image, in [0, 2**32). Image i then depends on seeds[i] and its label alone.
            generator: instead of seeds, one generator for the batch or a list with one an image.
            latents: instead of either, the initial noise (N, C, H, W) of unit variance.
                Without any of the three, noise is drawn from torch's global CPU generator.
            num_images_per_label: repeats each label (and is the number of images when there is neither label nor seed).
            num_inference_steps: solver steps, from noise to image. Heun evaluates the model 2n - 1 times in n steps.
            guidance_scale: g in uncond + g * (cond - uncond) (Ho & Salimans 2022, eq. 6 with g = 1 + w); 1 turns
                guidance off, and halves the work.
            output_type: "pil" images, "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], "uint8" (N, 3, H, W)
                tensor by `IMAGE_RULE`, or "latent" (N, C, h, w) fp32 as the diffusion model sees them.
            decode_batch_size: images decoded at a time.
            callback_on_step_end: f(pipeline, i, timestep, {"latents": ...}), called after model evaluation i; returns a
                dictionary, in which other "latents" replace these.
            return_dict: an ImagePipelineOutput when True, a one-element tuple when False.

        Raises:
            ValueError: labels out of range, counts that do not agree, two sources of noise, guidance without labels.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        labels = self._labels(class_labels, num_images_per_label)
        if guidance_scale != 1.0 and labels is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} expected class_labels of a class-conditional model, got "
                "none; pass class_labels, or guidance_scale=1.0"
            )
        noise = self._noise(labels, num_images_per_label, seeds, generator, latents)
        device = self._execution_device
        labels = labels.to(device) if labels is not None else self._null_labels(len(noise), device)
        samples = self.denoise(noise.to(device), labels, num_inference_steps, guidance_scale, callback_on_step_end)
        images = (
            samples if output_type == "latent" else self._output(self.decode(samples, decode_batch_size), output_type)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def denoise(
        self,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        num_inference_steps: int,
        guidance_scale: float,
        callback_on_step_end: Callable | None = None,
    ) -> torch.Tensor:
        """From unit-variance noise (N, C, H, W) to latents of the same shape; the solver's state is fp32 throughout."""
        scheduler = copy.deepcopy(self.scheduler)
        set_sampling_timesteps(scheduler, num_inference_steps)
        model_timesteps = scheduler.timesteps.to(noise.device)
        scales_input = hasattr(scheduler, "scale_model_input")
        # The flow schedulers have neither an initial scale nor an input scale: 1 and 1.
        sample = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            model_input = scheduler.scale_model_input(sample, timestep) if scales_input else sample
            prediction = self._predict(model_input, model_timesteps[i], labels, guidance_scale)
            sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
            if callback_on_step_end is not None:
                sample = callback_on_step_end(self, i, timestep, {"latents": sample}).get("latents", sample)
        return sample

    def _predict(
        self, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """The model's output, guided: uncond + g * (cond - uncond), both halves in one batch, combined in fp32."""
        model_input = model_input.to(self.unet.dtype)
        if guidance_scale == 1.0:
            timesteps = timestep.expand(len(model_input))
            return self.unet(model_input, timesteps, class_labels=labels, return_dict=False)[0].float()
        both_labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        timesteps = timestep.expand(2 * len(model_input))
        both = self.unet(torch.cat([model_input] * 2), timesteps, class_labels=both_labels, return_dict=False)[0]
        uncond, cond = both.float().chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
        """Latents (N, C, h, w) as the diffusion model sees them to images (N, 3, H, W) in about [-1, 1], fp32.

        Always in fp32, outside autocast: KL autoencoders overflow in fp16 and band in bf16. Weights held in a smaller
        dtype are widened in place, once. Slices bound the memory, which peaks here and not in the U-Net.
        """
        if self.vae.dtype != torch.float32:
            self.vae.to(torch.float32)
        latents = unscale_latents(latents, self.vae)
        with torch.autocast(latents.device.type, enabled=False):
            slices = [self.vae.decode(part, return_dict=False)[0] for part in latents.split(batch_size)]
        return torch.cat(slices)

    def _labels(self, class_labels, num_images_per_label: int) -> torch.Tensor | None:
        """Validated (N,) int64 labels on the CPU, each repeated, or None where no class was asked for."""
        if class_labels is None:
            return None
        if self.null_class is None:
            raise ValueError("class_labels expected None for a U-Net without classes, got labels; leave them out")
        labels = torch.as_tensor(class_labels).cpu()
        if labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"class_labels expected one integer or a list of them, got {class_labels!r}")
        labels = labels.reshape(-1).long()
        wrong = sorted({label for label in labels.tolist() if not 0 <= label <= self.null_class})
        if wrong:
            raise ValueError(
                f"class_labels expected 0 to {self.num_classes - 1}, or {self.null_class} for no class, got "
                f"{wrong}; count from 0"
            )
        return labels.repeat_interleave(num_images_per_label)

    def _null_labels(self, num_images: int, device: torch.device) -> torch.Tensor | None:
        return None if self.null_class is None else torch.full((num_images,), self.null_class, device=device)

    def _noise(self, labels, num_images_per_label: int, seeds, generator, latents) -> torch.Tensor:
        """Initial noise of unit variance, (N, C, H, W) fp32, on the CPU unless the caller brought it elsewhere."""
        given = [
            name
            for name, value in (("seeds", seeds), ("generator", generator), ("latents", latents))
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"expected one source of noise, got {' and '.join(given)}; pass one of them")
        counted = seeds if seeds is not None else generator if isinstance(generator, list) else latents
        count = len(counted) if counted is not None else len(labels) if labels is not None else num_images_per_label
        if count < 1 or (labels is not None and count != len(labels)):
            wanted = "at least one" if labels is None else str(len(labels))
            source = given[0] if given else "number of images"
            raise ValueError(f"{source} expected {wanted} (one an image), got {count}; give one an image")
        shape = self.latent_shape
        if latents is not None:
            if tuple(latents.shape) != (count, *shape):
                raise ValueError(f"latents expected shape {(count, *shape)}, got {tuple(latents.shape)}")
            return latents.float()
        if seeds is not None:
            return seeded_noise(shape, seeds)
        if isinstance(generator, list):
            return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generator])
        drawn_on = generator.device if generator is not None else "cpu"
        return torch.randn((count, *shape), generator=generator, device=drawn_on)

    @staticmethod
    def _output(images: torch.Tensor, output_type: str):
        if output_type == "uint8":
            return to_uint8(images)
        if output_type == "pil":
            pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels]
        images = images.add(1.0).div(2.0).clamp(0.0, 1.0)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _hub_arguments(kwargs: dict) -> dict:
    names = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    return {name: kwargs[name] for name in names if name in kwargs}


def _check_saved_class(unet: UNet2DModel, folder: str | os.PathLike) -> None:
    path = os.path.join(folder, "unet", "config.json")
    if not os.path.isfile(path):  # a hub id: diffusers resolved the class from the same snapshot's model_index.json
        return
    with open(path, encoding="utf-8") as file:
        saved = json.load(file).get("_class_name")
    if saved != type(unet).__name__:
        raise ValueError(
            f"{path} was saved by {saved}, but model_index.json loads it as {type(unet).__name__}, which "
            'would leave some weights random; correct the "unet" entry of model_index.json'
        )
