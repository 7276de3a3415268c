"""Pictures on disk: PNGs by index, grids, and the .npz of uint8 that evaluation suites read."""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from dcngen.data.files import atomic_file


def png_path(folder: Path, index: int) -> Path:
    """Where picture `index` of a sample folder lies."""
    return folder / f"{index:06d}.png"


def write_png(path: Path, image: torch.Tensor) -> None:
    """Write one (3, H, W) uint8 image, whole or not at all."""
    with atomic_file(path) as partial:
        _to_pil(image).save(partial, format="png")


def read_png(path: Path) -> torch.Tensor:
    """Read one image as (3, H, W) uint8.

    Raises:
        ValueError: the file is no readable picture.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} expected a readable picture, got: {error}; delete it and sample again") from error
    return torch.from_numpy(rearrange(pixels, "h w c -> c h w"))


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(rearrange(image, "c h w -> h w c").contiguous().cpu().numpy())


def image_grid(
    images: torch.Tensor | Sequence[torch.Tensor], columns: int | None = None, padding: int = 2
) -> Image.Image:
    """Lay (N, 3, H, W) uint8 images out row by row on white.

    Args:
        images: one tensor, or a sequence of (3, H, W), all of one size. columns: default ceil(sqrt(N)).
        padding: pixels between and around them.

    Raises:
        ValueError: no image, or images that are not (3, H, W) uint8 of one size.
    """
    shapes = {(tuple(image.shape), image.dtype) for image in images}
    if len(shapes) != 1 or next(iter(shapes))[1] != torch.uint8 or next(iter(shapes))[0][0] != 3:
        raise ValueError(f"image_grid expected uint8 images (3, H, W) of one size, got {sorted(map(str, shapes))}")
    columns = columns or math.ceil(math.sqrt(len(images)))
    cells = [F.pad(image.cpu(), (padding, 0, padding, 0), value=255) for image in images]  # white above and to the left
    cells += [torch.full_like(cells[0], 255)] * (-len(cells) % columns)
    canvas = rearrange(cells, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    return _to_pil(F.pad(canvas, (0, padding, 0, padding), value=255))


def write_npz(path: Path, images: Iterable[torch.Tensor], num_images: int, labels: Sequence[int] | None) -> None:
    """Write `arr_0` (N, H, W, 3) uint8 and, with labels, `arr_1` (N,) int64: the layout of guided-diffusion's suite.

    Images (3, H, W) stream through a file beside the target, so 50,000 of them need no memory; whole or not at all.
    """
    with atomic_file(path) as partial, tempfile.TemporaryDirectory(prefix=".pixels-", dir=path.parent) as scratch:
        pixels_path = Path(scratch) / "arr_0.npy"
        _stream_pixels(pixels_path, images, num_images)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            archive.write(pixels_path, pixels_path.name)
            if labels is not None:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))


def _stream_pixels(path: Path, images: Iterable[torch.Tensor], num_images: int) -> None:
    pixels = None
    for i, image in enumerate(images):
        if pixels is None:
            shape = (num_images, *image.shape[1:], 3)
            pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        pixels[i] = rearrange(image, "c h w -> h w c").numpy()
    pixels.flush()
