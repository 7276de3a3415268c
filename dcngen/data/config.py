"""What to open, at which size: the configuration of a data set."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Reference = Literal["auto", "held-out", "train"]
REFERENCE_CHOICES = get_args(Reference)


def default_cache_dir() -> Path:
    """The root of everything dcngen keeps between runs: ``$DCNGEN_CACHE`` or ``~/.cache/dcngen``."""
    return Path(os.environ.get("DCNGEN_CACHE") or "~/.cache/dcngen").expanduser()


@dataclass
class DataConfig:
    """A data set and the rule that turns its pictures into squares of ``image_size`` pixels.

    Args:
        name: a preset (``earth``, ``fashion-mnist``), a folder of class subfolders (``root/<class>/*.png``, or
            ``root/train/<class>``, ``root/test/<class>``), or a data set of the Hugging Face hub (``user/name``, with
            a configuration as ``user/name:config``).
        image_size: side of the pictures in pixels. Other sizes are centre-cropped to a square and resampled
            (Lanczos, antialiased).
        horizontal_flip: whether training sees every picture mirrored too; the latent cache then holds both.
        limit: use at most this many training pictures, taken evenly over the set.
        reference: which pictures FID compares against: ``held-out`` (the test or validation split), ``train``, or
            ``auto``: the held-out split where the data set has one, else the training pictures.
        source: a local copy of what a preset would fetch: the Blue Marble JPEG, or the folder with the
            Fashion-MNIST ``*-ubyte.gz`` files.
        image_column: hub data sets: the column of pictures; found by its type when left out.
        label_column: hub data sets: the column of class labels; found by its type when left out.
        cache_dir: root of the cache; ``$DCNGEN_CACHE`` or ``~/.cache/dcngen`` when left out.
    """

    name: str = "earth"
    image_size: int = 32
    horizontal_flip: bool = False
    limit: int | None = None
    reference: Reference = "auto"
    source: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if not self.name:
            raise ValueError("data.name is empty; give a preset (earth, fashion-mnist), a folder or a hub data set")
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1 pixel, got {self.image_size}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit must be at least 1 picture or null, got {self.limit}")
        if self.reference not in REFERENCE_CHOICES:
            raise ValueError(f"data.reference must be one of {', '.join(REFERENCE_CHOICES)}, got {self.reference!r}")

    @property
    def cache_root(self) -> Path:
        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()
