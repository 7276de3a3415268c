"""The ``fashion-mnist`` preset: 60,000 + 10,000 grey pictures of clothes, 28 x 28, ten classes.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
Licence: MIT. The files are the originals (IDX format, gzip), as packaged by Debian.
"""

import gzip
from functools import cached_property
from pathlib import Path

import numpy as np

from dcngen.data.files import atomic_directory, files_from_debian_package, sha256_of
from dcngen.data.sources import Source

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
PARTS = {"train": "train", "held-out": "t10k"}
REMEDY = (
    f"remedy: `apt-get install {PACKAGE}`, or point data.source (`--source`) at a folder with the four *-ubyte.gz "
    f"files, or name a hub data set: `zalando-datasets/fashion_mnist`"
)


class FashionMnistSource(Source):
    """One part of Fashion-MNIST; at ``image_size`` 32 the pictures get the customary 2-pixel black border.

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and the three files beside it.
        split: ``train`` or ``held-out``.
    """

    def __init__(self, folder: Path, image_size: int, split: str):
        self.image_path = folder / f"{PARTS[split]}-images-idx3-ubyte.gz"
        self.label_path = folder / f"{PARTS[split]}-labels-idx1-ubyte.gz"
        for path in (self.image_path, self.label_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing\n{REMEDY}")
        self.border = 2 if image_size == 32 else 0
        self.class_names = list(CLASS_NAMES)
        self.fingerprint = f"fashion-mnist:{sha256_of(self.image_path)}:border {self.border}"
        self.provenance = "Fashion-MNIST, Zalando SE (MIT licence)"

    @cached_property
    def images(self) -> np.ndarray:
        images = read_idx(self.image_path, dimensions=3)
        if len(images) != len(self.labels):
            raise ValueError(
                f"{self.image_path} has {len(images)} pictures, {self.label_path} {len(self.labels)} labels"
            )
        return np.pad(images, ((0, 0), (self.border, self.border), (self.border, self.border)))

    @cached_property
    def labels(self) -> np.ndarray:
        return read_idx(self.label_path, dimensions=1).astype(np.int64)

    def read(self, index: int) -> np.ndarray:
        return np.repeat(self.images[index][..., None], 3, axis=2)

    def describe(self, index: int) -> str:
        return f"Fashion-MNIST picture {index}"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist, "the IDX file format").

    Raises:
        ValueError: the file is no such file or is cut short; the message names it.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}\n{REMEDY}") from error
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(data[4:header], dtype=">u4").tolist())
    expected_magic = bytes([0, 0, 8, dimensions])
    if data[:4] != expected_magic or len(data) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is damaged: expected an IDX file of {dimensions}-dimensional bytes\n{REMEDY}")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def fashion_mnist_folder(cache_root: Path, source: str | None = None) -> Path:
    """The folder with the four files: the given one, the Debian package's, the cache, or a download into the cache."""
    if source is not None:
        return Path(source).expanduser()
    cached = cache_root / "sources" / "fashion-mnist"
    for folder in (INSTALLED, cached):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    files = files_from_debian_package(PACKAGE, REMEDY)
    with atomic_directory(cached) as scratch:
        for name, content in files.items():
            if name.endswith("-ubyte.gz"):
                (scratch / Path(name).name).write_bytes(content)
    return cached
