"""What a run writes down while it trains: run.json, metrics.jsonl, trackers, grids, and the time it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from accelerate import Accelerator
from PIL import Image

from dcngen.config import TrainConfig
from dcngen.data.files import atomic_file
from dcngen.training.checkpoint import Progress
from dcngen.training.describe import steps_lines
from dcngen.training.run_folder import RunFolder


class MetricsLog:
    """metrics.jsonl: one JSON object a line and logging event, in the order of steps.

    Args:
        path: the file.
        resume_step: entries after this step are dropped (their steps will be done again); 0 starts an empty file.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        self.path = Path(path)
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= resume_step] if resume_step else []
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: dict) -> None:
        """Append one entry; on the disk's side of Python when the call returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def images_per_second(self) -> float | None:
        """Median over the entries but the first, which holds warm-up and compilation."""
        rates = [entry["images_per_second"] for entry in read_metrics(self.path)]
        return round(median(rates[1:] or rates), 2) if rates else None


def read_metrics(path: Path) -> list[dict]:
    """The entries of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class LoopClock:
    """Seconds spent training, without the pauses (sampling, checkpoints)."""

    def __init__(self):
        self._started, self._paused = time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in the block does not count. Work queued on a GPU must be waited for before."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin


class RunLog:
    """Everything a run tells: banner, run.json, metrics.jsonl, trackers, grids. Files are the main process's alone.

    Args:
        run: where to write.
        accelerator: its trackers are started here.
        config: of the run; its flat form goes to the trackers.
        record: what run.json says, before status and speed.
        first_step: where the run continues; later entries of an earlier session are dropped.
    """

    def __init__(
        self, run: RunFolder, accelerator: Accelerator, config: TrainConfig, record: dict, first_step: int = 0
    ):
        self.run, self.accelerator, self.config, self.record = run, accelerator, config, record
        self.first_step = first_step
        self.metrics = None
        if accelerator.is_main_process:
            run.write_record(record | {"status": "training", "step": first_step})
            self.metrics = MetricsLog(run.metrics, first_step)
        report_to = config.logging.report_to
        if report_to != "none":
            # Without purging, tensorboard would show the steps that are done again twice.
            arguments = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}
            project = "tensorboard" if report_to == "tensorboard" else "dcngen"
            accelerator.init_trackers(project, _tracker_values(config.to_dict()), init_kwargs=arguments)

    def print_banner(self, num_latents: int) -> None:
        """What is about to be trained, in a few lines."""
        data, autoencoder, latents = (self.record[key] for key in ("data", "autoencoder", "latents"))
        quality = f", PSNR {autoencoder['psnr']} dB" if "psnr" in autoencoder else ""
        lines = [
            f"data         {data['name']}, {data['num_images']:,} pictures, digest {data['digest'][:12]}: "
            f"{', '.join(data['class_names'][:10])}{', ...' if len(data['class_names']) > 10 else ''}",
            f"autoencoder  {autoencoder['source']}, digest {autoencoder['digest'][:12]}{quality}",
            f"latents      {'x'.join(map(str, latents['shape']))}, scaled by {latents['scaling_factor']:.4f}",
            f"U-Net        {self.record['parameters']['unet']:,} parameters, on {self.record['device_name']}, "
            f"mixed precision {self.record['mixed_precision']}",
            *steps_lines(self.config, self.accelerator.num_processes, self.first_step, num_latents),
        ]
        self.accelerator.print("\n".join(lines))

    def write(self, entry: dict) -> None:
        """One logging event: to metrics.jsonl and to the trackers."""
        if self.metrics is not None:
            self.metrics.write(entry)
        self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=entry["step"])

    def write_grid(self, grid: Image.Image, step: int) -> None:
        """samples/step-N.png, and to the trackers that take pictures."""
        with atomic_file(self.run.samples / f"step-{step:08d}.png") as partial:
            grid.save(partial, format="png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)

    def finish(self, progress: Progress) -> None:
        """The last run.json: how far, how long, how fast."""
        speed = self.metrics.images_per_second()
        totals = {"step": progress.step, "num_images_seen": progress.num_images_seen, "images_per_second": speed}
        seconds = {"train_seconds": round(progress.train_seconds, 2)}
        self.run.write_record(self.record | {"status": "finished"} | totals | seconds)


def _tracker_values(config: dict) -> dict[str, bool | int | float | str]:
    """Flat and of the types that every tracker takes."""
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in _flat(config)}


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
