"""Sets of labelled pictures, cropped and resized once and kept as one memory-mapped array.

Layout of a prepared set, under ``<cache>/images/<name>-<size>-<part>-<key>/``:
``images.npy`` (N, 3, size, size) uint8, ``labels.npy`` (N,) int64, ``meta.json``.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from dcngen.data.config import DataConfig
from dcngen.data.files import atomic_directory
from dcngen.data.sources import Source, folder_source, hub_source

PREPROCESSING = "upright by EXIF, alpha over white, RGB, centre square, Pillow Lanczos (antialiased), uint8; rule 1"
PRESETS = ("earth", "fashion-mnist")
CHUNK = 64


class ImageSet(Dataset):
    """Labelled square RGB pictures; item ``i`` is (uint8 tensor (3, H, W), int label).

    Attributes:
        pixels: (N, 3, H, W) uint8: a memory-mapped array, or a :class:`LazyPixels` for very large sets.
        labels: (N,) int64 array.
        class_names: names by label.
        digest: SHA-256 (hexadecimal) over pictures, labels, class names and the preprocessing rule; for a set too
            large to keep as pixels (beyond ``$DCNGEN_PIXEL_CACHE_GB``, 32 by default) over its place and its
            list of files instead.
        name, split, provenance: what the set is, which part of it (``train`` or ``held-out``), where it is from.
        horizontal_flip: whether training should see mirrored pictures too; the items themselves are never mirrored.
    """

    def __init__(
        self, pixels, labels, class_names, *, digest, name, split, provenance="", horizontal_flip=False, folder=None
    ):
        self.pixels = pixels
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = list(class_names)
        self.digest = digest
        self.name = name
        self.split = split
        self.provenance = provenance
        self.horizontal_flip = horizontal_flip
        self.folder = folder

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.pixels[index])), int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Several items at once: uint8 (B, 3, H, W) and int64 (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        return torch.from_numpy(np.array(self.pixels[indices])), torch.from_numpy(self.labels[indices])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def class_counts(self) -> list[int]:
        return np.bincount(self.labels, minlength=self.num_classes).tolist()

    def __getstate__(self):
        # A memory map would be pickled with all its pixels; a worker process opens the file instead.
        state = self.__dict__.copy()
        if self.folder is not None:
            state["pixels"] = None
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.folder is not None:
            self.pixels = np.load(self.folder / "images.npy", mmap_mode="r")


class LazyPixels:
    """Pictures decoded when they are asked for, for sets too large to keep as pixels; indexes like an array."""

    def __init__(self, source: Source, indices: np.ndarray, image_size: int):
        self.source, self.indices = source, indices
        self.shape = (len(indices), 3, image_size, image_size)

    def __getitem__(self, index) -> np.ndarray:
        if np.ndim(index) == 0:
            return read_square(self.source, int(self.indices[index]), self.shape[-1])
        with ThreadPoolExecutor(_num_threads()) as pool:
            return np.stack(list(pool.map(self.__getitem__, index)))


def open_images(config: DataConfig, split: str = "train", progress: bool = True) -> ImageSet:
    """Open a data set, preparing it in the cache the first time.

    Args:
        config: which data set, at which size.
        split: ``train``, or ``reference``: the pictures FID compares against (see ``DataConfig.reference``).
        progress: whether to show a progress bar while preparing.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or empty, or a picture is corrupt; the message names it.
        RuntimeError: a preset or hub data set could not be fetched; the message says what else can be done.
    """
    if split not in ("train", "reference"):
        raise ValueError(f"split must be 'train' or 'reference', got {split!r}")
    part = "train" if split == "train" or config.reference == "train" else "held-out"
    source = _open_source(config, part)
    if source is None:
        if config.reference == "held-out":
            raise ValueError(
                f"data set {config.name!r} has no held-out part (a test or validation split); "
                f"set data.reference to train or auto to compare against the training pictures"
            )
        part, source = "train", _open_source(config, "train")
    return _prepare(source, config, part, progress)


def _open_source(config: DataConfig, part: str) -> Source | None:
    if config.name == "earth":
        from dcngen.data.earth import EarthSource, blue_marble_path

        return EarthSource(blue_marble_path(config.cache_root, config.source), config.image_size, part)
    if config.name == "fashion-mnist":
        from dcngen.data.fashion_mnist import FashionMnistSource, fashion_mnist_folder

        return FashionMnistSource(fashion_mnist_folder(config.cache_root, config.source), config.image_size, part)
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return folder_source(folder, part)
    if folder.is_absolute() or config.name.startswith((".", "~")) or config.name.count("/") > 1:
        raise FileNotFoundError(
            f"data.name {config.name!r} is not a folder here; expected a preset ({', '.join(PRESETS)}), "
            f"a folder of class subfolders, or a hub data set"
        )
    return hub_source(config.name, part, config.image_column, config.label_column)


def _prepare(source: Source, config: DataConfig, part: str, progress: bool) -> ImageSet:
    size, limit = config.image_size, config.limit if part == "train" else None
    key = hashlib.sha256(f"{source.fingerprint}\n{PREPROCESSING}\n{size}\n{limit}".encode()).hexdigest()
    common = {
        "name": config.name,
        "split": part,
        "provenance": source.provenance,
        "horizontal_flip": config.horizontal_flip,
    }
    label = Path(config.name).name.replace(":", "-")
    folder = config.cache_root / "images" / f"{label}-{size}-{part}-{key[:16]}"
    if not (folder / "meta.json").is_file():
        indices = evenly_over_classes(source.labels, limit)
        if len(indices) * 3 * size * size > 1e9 * float(os.environ.get("DCNGEN_PIXEL_CACHE_GB", 32)):
            pixels = LazyPixels(source, indices, size)
            return ImageSet(pixels, source.labels[indices], source.class_names, digest=key, **common)
        with atomic_directory(folder) as scratch:
            _write_pixels(source, indices, size, scratch / "images.npy", f"preparing {label} ({part})", progress)
            np.save(scratch / "labels.npy", source.labels[indices])
            meta = {**common, "class_names": source.class_names, "preprocessing": PREPROCESSING, "image_size": size}
            del meta["horizontal_flip"]
            meta["digest"] = _content_digest(scratch, source.class_names)
            (scratch / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    meta = json.loads((folder / "meta.json").read_text())
    pixels = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.load(folder / "labels.npy")
    return ImageSet(pixels, labels, meta["class_names"], digest=meta["digest"], folder=folder, **common)


def evenly_over_classes(labels: np.ndarray, count: int | None) -> np.ndarray:
    """Ascending indices of ``count`` pictures, spread evenly over every class and in the set's mixture of classes.

    Plain every-k-th picking would miss classes that take turns in the order of the set.
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")
    # The middles of `count` equal parts: classes whose sizes `count` divides alike are picked alike.
    middles = (2 * np.arange(count) + 1) * len(order) // (2 * count)
    return np.sort(order[middles])


def _write_pixels(source: Source, indices, size: int, path: Path, title: str, progress: bool) -> None:
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(indices), 3, size, size))

    def write(start: int) -> int:
        chunk = indices[start : start + CHUNK]
        for offset, index in enumerate(chunk):
            pixels[start + offset] = read_square(source, int(index), size)
        return len(chunk)

    bar = tqdm(total=len(indices), desc=title, unit="img", disable=not progress)
    with bar, ThreadPoolExecutor(_num_threads()) as pool:
        futures = [pool.submit(write, start) for start in range(0, len(indices), CHUNK)]
        try:
            for future in futures:
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pixels.flush()


def _num_threads() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _content_digest(folder: Path, class_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([PREPROCESSING, class_names]).encode())
    for name in ("images.npy", "labels.npy"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_square(source: Source, index: int, size: int) -> np.ndarray:
    """Picture ``index`` as (3, size, size) uint8.

    Raises:
        ValueError: the picture cannot be decoded; the message names the file.
    """
    try:
        square = to_square(source.read(index), size)
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{source.describe(index)} cannot be read as a picture ({type(error).__name__}: {error}); "
            f"replace or remove it, then run again"
        ) from error
    return np.ascontiguousarray(np.moveaxis(square, 2, 0))


def to_square(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """Centre square of a picture at ``size`` pixels: (size, size, 3) uint8, by the rule ``PREPROCESSING``."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image = _to_rgb(ImageOps.exif_transpose(image))
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
