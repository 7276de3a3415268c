"""The run folder: opening it for a new, resumed or repeated run.

runs/<name>/  config.yaml  run.json  metrics.jsonl  tensorboard/  checkpoints/  samples/  pipeline/
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dcngen.config import Command, TrainConfig, load_run_config
from dcngen.config.loader import LATEST, to_yaml
from dcngen.data.files import atomic_file
from dcngen.training.checkpoint import (
    clean_unfinished,
    latest_checkpoint,
    read_progress,
    remove_directory,
    remove_later_checkpoints,
)

# Keys that may change when a run continues: they say where and how it runs, not what it computes.
_FREE = ("name", "output_dir", "logging", "sampling", "checkpoint", "data.cache_dir", "data.source", "data.reference")
_FREE_TRAIN = ("max_train_steps", "gradient_checkpointing", "mixed_precision", "compile", "compile_mode", "allow_tf32")
_FREE += tuple(f"train.{name}" for name in (*_FREE_TRAIN, "latents_on_device", "train_batch_size"))
_FREE += ("train.gradient_accumulation_steps",)  # their product is compared instead, with the number of processes


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and where to continue it.

    Attributes:
        path: the folder.
        checkpoint: the checkpoint to resume from, or None to start at step 0.
        finished: the run is complete as configured: nothing is left to do.
    """

    path: Path
    checkpoint: Path | None = None
    finished: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def read_record(self) -> dict:
        """run.json, or {} before the first one was written."""
        return _read_json(self.path / "run.json")

    def write_record(self, record: dict) -> None:
        """Replace run.json."""
        with atomic_file(self.path / "run.json") as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")


def find_run(command: Command) -> RunFolder:
    """Look at the run's folder, writing nothing: is it new, to be continued, or finished?

    Raises:
        FileExistsError: the run exists, and neither --resume nor --overwrite was given.
        FileNotFoundError: --resume names a checkpoint that is not there, or not complete.
        ValueError: --resume with a configuration that would make it another run, or that ends before the checkpoint.
    """
    config = command.config
    run = RunFolder(config.run_folder)
    if command.overwrite:
        if command.resume:
            raise ValueError("--resume and --overwrite contradict each other; give one of them")
        return run
    if command.resume and command.resume != LATEST:
        checkpoint = Path(command.resume)
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"--resume {checkpoint}: no such checkpoint folder; --resume alone takes the newest"
            )
        if (run.path / "config.yaml").is_file():
            _require_same_run(config, load_run_config(run.path / "config.yaml"), run.path)
        _require_steps_left(checkpoint, config)
        return RunFolder(run.path, checkpoint)
    if not (run.path / "config.yaml").is_file():
        return run
    if not command.resume:
        raise FileExistsError(
            f"run {run.path} exists; continue it with --resume, start over with --overwrite, or give another --name"
        )
    _require_same_run(config, load_run_config(run.path / "config.yaml"), run.path)
    record = run.read_record()
    finished = record.get("status") == "finished" and record.get("step") == config.train.max_train_steps
    finished = finished and run.pipeline.is_dir()
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint and not finished:
        _require_steps_left(checkpoint, config)
    return RunFolder(run.path, checkpoint, finished)


def open_run(run: RunFolder, command: Command) -> None:
    """Make the folder ready: delete it (--overwrite), clean up after a crash, save the resolved configuration.

    A run that continues keeps its own configuration and pipeline until `continue_run`: its checkpoint may not load.

    Raises:
        FileExistsError: --overwrite on a folder that is no run.
    """
    if command.overwrite and run.path.exists():
        if any(run.path.iterdir()) and not (run.path / "config.yaml").is_file():
            raise FileExistsError(
                f"{run.path} has no config.yaml, so it is no run: it is not deleted; choose another --name"
            )
        shutil.rmtree(run.path)
    run.path.mkdir(parents=True, exist_ok=True)
    clean_unfinished(run.checkpoints)
    if not run.checkpoint:
        _begin(run, command.config)


def continue_run(run: RunFolder, config: TrainConfig, step: int) -> None:
    """Make the folder one of a run at `step`, once the checkpoint of that step is loaded and training goes on there.

    Later checkpoints, of a branch that is given up by naming an older one, are removed: by their step they would count
    as the newest ones, so that the next --resume returned to that branch.
    """
    later = remove_later_checkpoints(run.checkpoints, step)
    if later:
        names = ", ".join(path.name for path in later)
        print(f"continuing {run.path} at step {step:,}: removed its later checkpoints ({names})")
    _begin(run, config)


def _begin(run: RunFolder, config: TrainConfig) -> None:
    """No pipeline before the configuration: an older one would pass for what the configuration makes."""
    if run.pipeline.is_dir():
        remove_directory(run.pipeline)
    with atomic_file(run.path / "config.yaml") as partial:
        partial.write_text(to_yaml(config))


def _require_steps_left(checkpoint: Path, config: TrainConfig) -> None:
    step, total = read_progress(checkpoint).step, config.train.max_train_steps
    if step > total:
        raise ValueError(
            f"train.max_train_steps: expected at least {step}, where {checkpoint} continues, got {total}; raise it, "
            "name an older checkpoint with --resume PATH, or start over with --overwrite"
        )


def _require_same_run(config: TrainConfig, saved: TrainConfig, path: Path) -> None:
    now, before = _flatten(config.to_dict()), _flatten(saved.to_dict())
    changed = [
        f"{key}: {before.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and not any(key == free or key.startswith(free + ".") for free in _FREE)
    ]
    if changed:
        raise ValueError(
            f"run {path} was started with another recipe:\n  " + "\n  ".join(changed) + "\n"
            "continue it with the settings it has, start over with --overwrite, or give another --name"
        )


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
