"""run.json: what the numbers of a run depend on."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch
from accelerate import Accelerator

import dcngen
from dcngen.config import TrainConfig
from dcngen.data import ImageSet, LatentSet
from dcngen.models import count_parameters
from dcngen.training.autoencoder import Autoencoder

_PACKAGES = ("torch", "diffusers", "accelerate", "safetensors", "numpy")


def describe_run(
    config: TrainConfig,
    accelerator: Accelerator,
    images: ImageSet,
    autoencoder: Autoencoder,
    latents: LatentSet,
    unet: torch.nn.Module,
) -> dict:
    """Digests, versions, parameter counts and the machine, as plain JSON."""
    device, vae = accelerator.device, autoencoder.vae
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "name": config.name,
        "command": sys.argv,
        "device": device.type,
        "device_name": name,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"dcngen": dcngen.__version__, "python": platform.python_version()}
        | {package: metadata.version(package) for package in _PACKAGES},
        "parameters": {"unet": count_parameters(unet), "autoencoder": count_parameters(vae)},
        "data": {
            "name": images.name,
            "digest": images.digest,
            "num_images": len(images),
            "class_names": images.class_names,
            "from": images.provenance,
        },
        "autoencoder": {"source": autoencoder.source, "digest": autoencoder.digest, **autoencoder.about},
        "latents": {
            "digest": latents.digest,
            "shape": list(latents.shape),
            "count": len(latents),
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.shift_factor,
        },
    }
