"""The sample folder: what lies in it, what is missing from it, and whose pictures it may hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from dcngen.data.files import atomic_file
from dcngen.diffusion.images import image_grid, png_path, read_png, write_npz, write_png

PLAN_FILE = "plan.json"
GRID_IMAGES = 64


@dataclass(frozen=True)
class SampleFolder:
    """The files of one plan: PNGs by index or, where none are wanted, one .npy piece a batch until they are joined.

    Args:
        path: the folder. batches: the indices of each batch, which together are 0 to N - 1.
        save_png: keep PNGs; otherwise only samples.npz is left in the end.
        labels: one an image, or None.
    """

    path: Path
    batches: list[range]
    save_png: bool
    labels: list[int] | None

    def read_record(self) -> dict[str, Any]:
        """The contents of plan.json; empty when there is none."""
        path = self.path / PLAN_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace plan.json."""
        with atomic_file(self.path / PLAN_FILE) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def refuse_mix(self, record: dict[str, Any]) -> None:
        """Raise ValueError if the folder holds anything but pictures of this very plan and model."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} expected a folder, got a file; choose another folder")
        found = self.read_record()
        if not found:
            if any(self.path.glob("*.png")) or any(self.path.glob("*.npz")):
                raise ValueError(
                    f"{self.path} expected a new folder or one with a {PLAN_FILE}, got pictures of unknown origin; "
                    "choose another folder"
                )
            return
        if found.get("plan_digest") != record["plan_digest"]:
            old, new = found.get("plan", {}), record["plan"]
            changed = ", ".join(f"{key} {old.get(key)!r}, now {new[key]!r}" for key in new if old.get(key) != new[key])
            raise ValueError(
                f"{self.path} holds pictures of another plan ({changed}); choose another folder, or delete this one"
            )
        if found.get("model_digest") != record["model_digest"]:
            raise ValueError(
                f"{self.path} holds pictures of another model (digest {str(found.get('model_digest'))[:12]}, now "
                f"{record['model_digest'][:12]}); choose another folder, or delete this one"
            )

    def holds(self, batch: range) -> bool:
        """Whether every picture of the batch is there."""
        if self.save_png:
            return all(png_path(self.path, i).is_file() for i in batch)
        return self._npz.is_file() or self._piece(batch).is_file()

    def write(self, writers: ThreadPoolExecutor, batch: range, images: torch.Tensor) -> list[Future]:
        """Start writing a batch of (n, 3, H, W) uint8 images; each file appears whole."""
        if self.save_png:
            paths = [png_path(self.path, i) for i in batch]
            return [writers.submit(write_png, path, image) for path, image in zip(paths, images, strict=True)]
        return [writers.submit(self._write_piece, batch, images)]

    def assemble(self, save_npz: bool) -> None:
        """Write grid.png and, if asked, samples.npz, from what all processes have left."""
        if save_npz and not self._npz.is_file():
            write_npz(self._npz, self._images(), self.batches[-1].stop, self.labels)
        grid = self.path / "grid.png"
        if not grid.is_file():
            first = [image for _, image in zip(range(GRID_IMAGES), self._images(), strict=False)]
            with atomic_file(grid) as partial:
                image_grid(first).save(partial, format="png")
        shutil.rmtree(self._pieces, ignore_errors=True)

    def _images(self) -> Iterator[torch.Tensor]:
        """All images in order, (3, H, W) uint8."""
        if self.save_png:
            yield from (read_png(png_path(self.path, i)) for batch in self.batches for i in batch)
        elif self._npz.is_file():
            with np.load(self._npz) as archive:
                yield from torch.from_numpy(rearrange(archive["arr_0"], "n h w c -> n c h w"))
        else:
            for batch in self.batches:
                yield from torch.from_numpy(np.load(self._piece(batch)))

    def _write_piece(self, batch: range, images: torch.Tensor) -> None:
        with atomic_file(self._piece(batch)) as partial:
            np.save(partial, images.numpy())

    def _piece(self, batch: range) -> Path:
        return self._pieces / f"{batch.start:09d}-{batch.stop:09d}.npy"

    @property
    def _pieces(self) -> Path:
        return self.path / "pieces"

    @property
    def _npz(self) -> Path:
        return self.path / "samples.npz"
