"""What a configuration describes, built: the U-Net, its optimizer, and the shapes between pictures and latents."""

from __future__ import annotations

from dataclasses import asdict

import torch

from dcngen.config import AutoencoderConfig, ModelConfig, OptimizerConfig
from dcngen.diffusion import derive_seed
from dcngen.models import DCNUNet2DModel

_OTHER_BLOCK = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
_NOT_OF_THE_MODEL = ("class_conditional", "down_block_types", "up_block_types")


def build_unet(
    config: ModelConfig, *, latent_shape: tuple[int, int, int], num_classes: int, num_train_timesteps: int, seed: int
) -> DCNUNet2DModel:
    """An untrained U-Net on latents (c, h, w); its weights are a function of the seed and the configuration.

    Class-conditional over `num_classes` > 1 classes, it has one embedding more, the null class of guidance.

    Raises:
        ValueError: latents that cannot be halved once a level, or what DCNUNet2DModel refuses.
    """
    channels, height, width = latent_shape
    factor = 2 ** (len(config.block_out_channels) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"model.block_out_channels: expected latents that can be halved {len(config.block_out_channels) - 1} times "
            f"(multiples of {factor}), got {height}x{width}; use fewer levels or another data.image_size"
        )
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_OF_THE_MODEL}
    down_blocks, up_blocks = block_types(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return DCNUNet2DModel(
            **options,
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            down_block_types=down_blocks,
            up_block_types=up_blocks,
            num_class_embeds=num_classes + 1 if has_classes(config, num_classes) else None,
            num_train_timesteps=num_train_timesteps,
        )


def has_classes(config: ModelConfig, num_classes: int) -> bool:
    """Whether the U-Net is told the class: a single class says nothing."""
    return config.class_conditional and num_classes > 1


def block_types(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Down blocks (attention on all levels but the first, unless said otherwise) and up blocks (their mirror)."""
    levels = len(config.block_out_channels)
    down = config.down_block_types or ["DownBlock2D"] + ["AttnDownBlock2D"] * (levels - 1)
    if config.up_block_types:
        return down, config.up_block_types
    unknown = [name for name in down if name not in _OTHER_BLOCK]
    if unknown:
        raise ValueError(
            f"model.down_block_types: no mirror is known for {unknown[0]} (known: {', '.join(_OTHER_BLOCK)}); give "
            f"model.up_block_types too"
        )
    return down, [_OTHER_BLOCK[name] for name in reversed(down)]


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all parameters, in one kernel where the device has one (CUDA), else over lists of tensors."""
    fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **fast,
    )


def shrink_factor(config: AutoencoderConfig) -> int:
    """How many times smaller than a picture its latent is, for an autoencoder trained here."""
    return 2 ** (len(config.block_out_channels) - 1)
