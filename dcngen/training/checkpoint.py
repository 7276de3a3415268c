"""Checkpoints: whole or absent, in safetensors and JSON alone, and enough to continue bit for bit.

checkpoints/step-00001000/
  unet/       the weights as trained, a folder for from_pretrained
  unet_ema/   the averaged weights, another
  optimizer.safetensors   "<parameter>/<state>" such as "conv_in.weight/exp_avg"
  trainer_state.json      step, images seen, seconds; its presence marks a complete checkpoint
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from dcngen.training.ema import EMA

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{8,})")
_ONE_FILE = "1000GB"  # shard size: never split the weights over files


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        num_images_seen: over all processes.
        train_seconds: time in the loop, without sampling and checkpoints, over all sessions of the run.
        total_batch_size: pictures an optimizer step, over all processes.
        num_processes: of the session that wrote it.
    """

    step: int = 0
    num_images_seen: int = 0
    train_seconds: float = 0.0
    total_batch_size: int = 0
    num_processes: int = 1


def save_checkpoint(folder: Path, model, ema: EMA, optimizer, progress: Progress, keep: int) -> Path:
    """Write checkpoints/step-N under a temporary name, force it to the disk, rename it; keep it and the newest others.

    A crash at any moment leaves either the whole checkpoint or a hidden folder that the next `clean` removes.

    Args:
        keep: how many checkpoints may stay, at least 1: the one written here, whatever its step, among them.
    """
    target = checkpoint_path(folder, progress.step)
    with replaced_directory(target) as scratch:
        model.save_pretrained(scratch / "unet", max_shard_size=_ONE_FILE)
        ema.model.save_pretrained(scratch / "unet_ema", max_shard_size=_ONE_FILE)
        save_file(_optimizer_tensors(model, optimizer), scratch / "optimizer.safetensors")
        (scratch / STATE_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
    others = [path for path in list_checkpoints(folder) if path != target]
    for old in others[: max(0, len(others) - (keep - 1))]:
        remove_directory(old)
    return target


def load_checkpoint(folder: Path, model, ema: EMA, optimizer) -> Progress:
    """Restore what `save_checkpoint` wrote into freshly built objects, keeping their devices and memory layouts.

    Raises:
        FileNotFoundError: not a complete checkpoint.
        ValueError: of another model, or with another optimizer's state.
    """
    folder = Path(folder)
    progress = read_progress(folder)
    for module, name in ((model, "unet"), (ema.model, "unet_ema")):
        _load_weights(module, folder / name / SAFETENSORS_WEIGHTS_NAME)
    _load_optimizer(model, optimizer, folder / "optimizer.safetensors")
    return progress


def read_progress(folder: Path) -> Progress:
    """How far the run was when this checkpoint was written.

    Raises:
        FileNotFoundError: not a complete checkpoint.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: no {STATE_FILE} in it; name a step-* folder")
    return Progress(**json.loads(file.read_text()))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the folder of checkpoints."""
    return Path(folder) / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=_step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; None where there is none."""
    return next(reversed(list_checkpoints(folder)), None)


def remove_later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Remove the checkpoints beyond `step`; returns what they were, oldest first."""
    later = [path for path in list_checkpoints(folder) if _step_of(path) > step]
    for path in reversed(later):
        remove_directory(path)
    return later


def remove_directory(path: Path) -> None:
    """Delete a folder that must be whole or absent: a crash half-way leaves a hidden one, which nobody reads."""
    hidden = path.with_name(f".{path.name}-removed")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def clean_unfinished(folder: Path) -> None:
    """Remove what interrupted writes left behind."""
    for scratch in Path(folder).glob(".step-*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replaced_directory(target: Path):
    """Give a scratch folder that takes the place of `target`, on the disk, if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        _flush_to_disk(scratch)
        if target.exists():
            # A folder cannot be replaced in one step; the old one goes first, under a name that nobody reads.
            os.rename(target, Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)) / "old")
        os.rename(scratch, target)
        _flush(target.parent)
    finally:
        for rest in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(rest, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _flush_to_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state by parameter name; group settings come from the configuration instead."""
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    tensors = {}
    for index, values in state.items():
        for key, value in values.items():
            tensors[f"{names[index]}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def _load_weights(module: torch.nn.Module, path: Path) -> None:
    stored, own = load_file(path), module.state_dict()
    wrong = sorted(set(stored) ^ set(own)) or [n for n, t in own.items() if t.shape != stored[n].shape]
    if wrong:
        raise ValueError(
            f"{path} holds another model than the one configured: {len(wrong)} weights differ in name or shape (as "
            f"{wrong[0]}); resume with the configuration that the run was started with"
        )
    module.load_state_dict(stored)


def _load_optimizer(model, optimizer, path: Path) -> None:
    stored, state = load_file(path), {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        prefix = name + "/"
        values = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        # The moments take the layout of their weight: fused kernels walk both in memory order.
        state[index] = {
            key: torch.empty_like(parameter, device="cpu").copy_(value) if value.shape == parameter.shape else value
            for key, value in values.items()
        }
    missing = [index for index, values in state.items() if "exp_avg" not in values]
    if missing and stored:
        raise ValueError(
            f"{path} lacks the state of {len(missing)} parameters; it belongs to another model or optimizer"
        )
    optimizer.load_state_dict(
        {"state": state if stored else {}, "param_groups": optimizer.state_dict()["param_groups"]}
    )
