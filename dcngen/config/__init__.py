"""Configuration of a training run: dataclasses, and how they are read from preset, file and command line."""

from dcngen.config.loader import Command, load_config, load_run_config, parse_command_line
from dcngen.config.options import (
    AutoencoderConfig,
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainConfig,
    TrainOptions,
)
from dcngen.config.presets import PRESETS

__all__ = [
    "PRESETS",
    "AutoencoderConfig",
    "CheckpointConfig",
    "Command",
    "DataConfig",
    "EMAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "TrainConfig",
    "TrainOptions",
    "load_config",
    "load_run_config",
    "parse_command_line",
]
