"""The Accelerator of a run, and what cannot be trained with it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from dcngen.config import TrainConfig

# Other processes wait while the first one trains the autoencoder, encodes the data set or samples a grid.
_LONGEST_WAIT = timedelta(hours=12)
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def start_accelerator(config: TrainConfig, run_folder: Path) -> Accelerator:
    """accelerate's view of this process, with the trackers and precision of the configuration.

    Raises:
        ValueError: fp16 (weights in fp32 under bf16 need no loss scaling), or weights sharded over processes.
    """
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        log_with=None if config.logging.report_to == "none" else config.logging.report_to,
        project_config=ProjectConfiguration(project_dir=str(run_folder), logging_dir=str(run_folder)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision: expected no or bf16, got {accelerator.mixed_precision} from accelerate; pass "
            f"--train.mixed_precision bf16, or `accelerate launch --mixed_precision bf16`"
        )
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(
            f"accelerate was launched with {accelerator.distributed_type.value}; the weights, their average and the "
            f"optimizer are whole on every process here: launch with --multi_gpu (DDP), on any number of machines"
        )
    torch.set_float32_matmul_precision("high" if config.train.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.train.allow_tf32
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all shapes are static
    return accelerator
