import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dcngen.config import AutoencoderConfig, parse_command_line
from dcngen.data import DataConfig, cache_latents, open_images
from dcngen.training.autoencoder import autoencoder_digest, build_autoencoder

REPOSITORY = Path(__file__).parents[2]
TINY = {
    "data": {"image_size": 16},
    "autoencoder": {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "train_batch_size": 8,
        "max_train_steps": 3,
        "lr_warmup_steps": 1,
    },
    "model": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "dcn_group_channels": 8,
        "dropout": 0.1,
    },
    "train": {"train_batch_size": 4, "max_train_steps": 6, "gradient_accumulation_steps": 2, "mixed_precision": "no"},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "ema": {"decay": 0.9},
    "sampling": {"num_images": 2, "num_inference_steps": 2},
    "checkpoint": {"checkpointing_steps": 4, "checkpoints_total_limit": 5},
    "logging": {"logging_steps": 3, "report_to": "none"},
}


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Two classes of 20 real little pictures: horizontal and vertical waves in random colours."""
    root, generator = tmp_path_factory.mktemp("waves"), np.random.default_rng(0)
    for name in ("horizontal", "vertical"):
        (root / name).mkdir()
        for index in range(20):
            wave = 0.5 + 0.5 * np.sin(np.linspace(0, generator.uniform(3, 12), 16) + generator.uniform(0, 6))
            plane = np.tile(wave, (16, 1)) if name == "vertical" else np.tile(wave[:, None], (1, 16))
            colours = generator.uniform(80, 255, 3)
            Image.fromarray((plane[..., None] * colours).astype(np.uint8)).save(root / name / f"{index:02d}.png")
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def images(picture_folder, cache):
    config = DataConfig(str(picture_folder), image_size=16, cache_dir=str(cache))
    return open_images(config, progress=False)


@pytest.fixture(scope="session")
def latents(images, cache):
    torch.manual_seed(0)
    vae = build_autoencoder(AutoencoderConfig(block_out_channels=[8, 16], norm_num_groups=4), 16)
    return cache_latents(images, vae, cache, vae_digest=autoencoder_digest(vae), progress=False)


@pytest.fixture(scope="session")
def script():
    """train_ldm.py as a module."""
    spec = importlib.util.spec_from_file_location("train_ldm", REPOSITORY / "train_ldm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def command_in(tmp_path_factory, picture_folder, cache):
    """Make a Command of the tiny recipe: command_in(output_dir, "--name", "x", "--resume")."""
    file = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    fixed = ["--config", str(file), "--data.name", str(picture_folder), "--data.cache_dir", str(cache)]
    return lambda output_dir, *arguments: parse_command_line([*fixed, "--output_dir", str(output_dir), *arguments])


@pytest.fixture
def command(command_in, tmp_path):
    """The same, with run folders in tmp_path."""
    return lambda *arguments: command_in(tmp_path, *arguments)
