"""The configuration of a training run: nested dataclasses, read from preset < YAML file < command line.

accelerate launch train_ldm.py --config configs/earth_dcn.yaml --train.max_train_steps 500
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from dcngen.data.config import DataConfig
from dcngen.diffusion.objectives import Objective
from dcngen.diffusion.schedulers import SAMPLERS
from dcngen.models.unet import DCNUNet2DModel

# One source for the defaults of the operator keys: the model's own signature.
_MODEL_DEFAULTS = {name: p.default for name, p in inspect.signature(DCNUNet2DModel.__init__).parameters.items()}


@dataclass
class AutoencoderConfig:
    """The autoencoder whose latents are learned: a pretrained one, or one trained here first and kept in the cache.

    Args:
        pretrained: an AutoencoderKL of the hub (stabilityai/sd-vae-ft-mse) or a folder; null: train one here.
        subfolder: where the autoencoder lies inside ``pretrained``.
        block_out_channels: channels by level; n levels shrink the picture 2^(n-1) times.
        layers_per_block: residual blocks a level.
        latent_channels: channels of a latent.
        norm_num_groups: groups of every group norm; divides all block_out_channels.
        mid_block_add_attention: self-attention in the middle of encoder and decoder.
        train_batch_size: pictures a step.
        max_train_steps: optimizer steps.
        learning_rate: peak of the cosine schedule.
        lr_warmup_steps: linear warm-up to it.
        kl_weight: weight of the posterior's KL divergence (per element) beside the reconstruction.
        edge_weight: weight of the multi-scale gradient loss, which keeps coasts and textures sharp.
        mse_weight: weight of the squared error beside the absolute one; higher favours PSNR over sharpness.
        max_grad_norm: gradient clipping.
        seed: of its weights and batches, apart from the run's: runs of several seeds share one autoencoder.
    """

    pretrained: str | None = None
    subfolder: str | None = None
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 64])
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 16
    mid_block_add_attention: bool = False
    train_batch_size: int = 32
    max_train_steps: int = 1000
    learning_rate: float = 1e-3
    lr_warmup_steps: int = 50
    kl_weight: float = 1e-4
    edge_weight: float = 1.0
    mse_weight: float = 1.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _positive("autoencoder", self, "train_batch_size", "max_train_steps", "learning_rate", "latent_channels")
        wrong = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if wrong or not self.block_out_channels:
            raise ValueError(
                f"autoencoder.block_out_channels: expected multiples of norm_num_groups={self.norm_num_groups}, "
                f"got {self.block_out_channels}"
            )


@dataclass
class ModelConfig:
    """The U-Net, by the names of diffusers' UNet2DModel and of DCNUNet2DModel.

    Args:
        block_out_channels: channels by level, full resolution first.
        layers_per_block: residual blocks a level.
        down_block_types: DownBlock2D or AttnDownBlock2D by level; null: attention on all levels but the first.
        up_block_types: null: the mirror of down_block_types.
        attention_head_dim: channels of one attention head.
        norm_num_groups: groups of every group norm.
        dropout: inside residual blocks.
        resnet_time_scale_shift: how the time embedding enters: default (added) or scale_shift.
        class_conditional: learn the classes of the data (with a null class for guidance) or none.
        conv_operator: conv or dcnv4, one for all levels or a list by level.
        attention_operator: attention or dcnv4, one or a list.
        resample_operator: conv or dcnv4, one or a list.
        dcn_group_channels: channels of one DCNv4 group.
        dcn_kernel_size: odd size of the sampling window.
        dcn_offset_scale: multiplies grid and offsets.
        dcn_mask_init: initial bias of the masks.
        dcn_center_mask_init: that of the middle tap; null: dcn_mask_init.
        dcn_dw_kernel_size: depthwise convolution before offsets and masks, or null.
        zero_init: start every residual branch and the output at 0.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 384, 512])
    layers_per_block: int = 2
    down_block_types: list[str] | None = None
    up_block_types: list[str] | None = None
    attention_head_dim: int | None = 32
    norm_num_groups: int = 32
    dropout: float = 0.0
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    class_conditional: bool = True
    conv_operator: str | list[str] = _MODEL_DEFAULTS["conv_operator"]
    attention_operator: str | list[str] = _MODEL_DEFAULTS["attention_operator"]
    resample_operator: str | list[str] = _MODEL_DEFAULTS["resample_operator"]
    dcn_group_channels: int | list[int] = _MODEL_DEFAULTS["dcn_group_channels"]
    dcn_kernel_size: int | list[int] = _MODEL_DEFAULTS["dcn_kernel_size"]
    dcn_offset_scale: float | list[float] = _MODEL_DEFAULTS["dcn_offset_scale"]
    dcn_mask_init: float | list[float] = _MODEL_DEFAULTS["dcn_mask_init"]
    dcn_center_mask_init: float | list[float | None] | None = _MODEL_DEFAULTS["dcn_center_mask_init"]
    dcn_dw_kernel_size: int | list[int] | None = _MODEL_DEFAULTS["dcn_dw_kernel_size"]
    zero_init: bool = _MODEL_DEFAULTS["zero_init"]

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            types = getattr(self, name)
            if types is not None and len(types) != levels:
                raise ValueError(
                    f"model.{name}: expected {levels} (one a level of block_out_channels), got {len(types)}"
                )


@dataclass
class TrainOptions:
    """The loop.

    Args:
        train_batch_size: latents a step on each process (before accumulation).
        max_train_steps: optimizer steps of the whole run.
        gradient_accumulation_steps: batches that make one optimizer step.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        mixed_precision: no or bf16 (weights stay fp32); null: what accelerate was launched with.
        max_grad_norm: gradient clipping by the global norm; 0 turns it off.
        label_dropout: how often a label is replaced by the null class, for classifier-free guidance.
        compile: torch.compile the U-Net, with static shapes.
        compile_mode: default, reduce-overhead (CUDA graphs) or max-autotune.
        allow_tf32: TF32 matrix products where fp32 remains.
        latents_on_device: keep all latents in the device's memory; false: fetch them one step ahead.
    """

    train_batch_size: int = 64
    max_train_steps: int = 10_000
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] | None = None
    max_grad_norm: float = 1.0
    label_dropout: float = 0.1
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    allow_tf32: bool = True
    latents_on_device: bool = True

    def __post_init__(self):
        _positive("train", self, "train_batch_size", "max_train_steps", "gradient_accumulation_steps")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"train.label_dropout: expected a probability in [0, 1], got {self.label_dropout}")
        if self.max_grad_norm < 0:
            raise ValueError(f"train.max_grad_norm: expected 0 (off) or more, got {self.max_grad_norm}")
        graphs = self.compile and self.compile_mode in ("reduce-overhead", "max-autotune")
        if graphs and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"train.compile_mode: {self.compile_mode} replays CUDA graphs, which cannot accumulate gradients over "
                f"{self.gradient_accumulation_steps} steps; use compile_mode default or max-autotune-no-cudagraphs"
            )


@dataclass
class OptimizerConfig:
    """AdamW (fused where the device has it).

    Args:
        learning_rate: peak, after warm-up.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_weight_decay: decoupled weight decay.
        adam_epsilon: added to the root of the second moment.
    """

    learning_rate: float = 2e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8

    def __post_init__(self):
        _positive("optimizer", self, "learning_rate", "adam_epsilon")


@dataclass
class ScheduleConfig:
    """The learning rate over the steps.

    Args:
        lr_scheduler: constant, or cosine down to 0 at max_train_steps; both after warm-up.
        lr_warmup_steps: linear warm-up, in optimizer steps.
    """

    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 500


@dataclass
class EMAConfig:
    """The exponential moving average of the weights, in fp32; what is sampled and exported.

    Args:
        decay: per optimizer step.
        warmup: use min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: expected a number in [0, 1), got {self.decay}; 0.9999 is usual")


@dataclass
class SamplingConfig:
    """The grids sampled while training, from the EMA weights and always from the same noise.

    Args:
        sample_steps: optimizer steps between grids; 0: none but the last.
        num_images: pictures of a grid, classes in turn.
        sampler: ddim, dpm-solver++, euler or heun.
        num_inference_steps: solver steps.
        guidance_scale: 1 is unguided.
        seed: picture i starts from seed + i.
    """

    sample_steps: int = 0
    num_images: int = 16
    sampler: Literal[SAMPLERS] = "dpm-solver++"
    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    seed: int = 0


@dataclass
class CheckpointConfig:
    """What is written to resume from.

    Args:
        checkpointing_steps: optimizer steps between checkpoints; 0: only the last (and on Ctrl-C).
        checkpoints_total_limit: how many of the newest are kept.
    """

    checkpointing_steps: int = 0
    checkpoints_total_limit: int = 2

    def __post_init__(self):
        _positive("checkpoint", self, "checkpoints_total_limit")


@dataclass
class LoggingConfig:
    """What is written down.

    Args:
        logging_steps: optimizer steps between entries of metrics.jsonl; nothing waits for the device in between.
        report_to: an accelerate tracker (tensorboard, wandb, ...), all, or none.
    """

    logging_steps: int = 50
    report_to: str = "tensorboard"

    def __post_init__(self):
        _positive("logging", self, "logging_steps")


@dataclass
class TrainConfig:
    """A training run. Each group is a section of the YAML file; keys are dotted on the command line.

    Args:
        name: the run's folder under output_dir; null: the name of the configuration file.
        output_dir: where run folders lie.
        seed: of weights, order, noise, timesteps and label dropout.
        data: the pictures.
        autoencoder: pictures to latents.
        model: the U-Net.
        objective: what the U-Net learns.
        train: the loop.
        optimizer: AdamW.
        schedule: the learning rate.
        ema: the averaged weights.
        sampling: grids while training.
        checkpoint: checkpoints.
        logging: metrics.
    """

    name: str | None = None
    output_dir: str = "runs"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Objective = field(default_factory=Objective)
    train: TrainOptions = field(default_factory=TrainOptions)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir) / (self.name or "run")

    def to_dict(self) -> dict:
        """Plain nested dict, as saved in config.yaml."""
        return asdict(self)


def _positive(group: str, config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{group}.{name}: expected a positive number, got {getattr(config, name)}")
