"""Pictures to features, each set once: the cache is keyed by the digests of pictures and network."""

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from dcngen.data.config import default_cache_dir
from dcngen.data.files import atomic_file
from dcngen.data.images import PREPROCESSING, ImageSet, LazyPixels, evenly_over_classes
from dcngen.data.sources import IMAGE_SUFFIXES, Source
from dcngen.evaluation.networks import FeatureNetwork

# The batch is fixed, and the last one filled up, because convolution algorithms (and so the last digits) follow it.
BATCH_SIZE = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class Provenance:
    """What a set of features or statistics was computed from; two sets are comparable if the network agrees.

    Attributes:
        data_digest: digest of the pictures.
        num_images: how many.
        image_size: their side in pixels, before the network's own resize.
        preprocessing: the crop and resize rule that made them.
        extractor_digest: digest of the network's weights.
        num_features: dimensions of a feature.
        described: the pictures, for people.
        network: name of the feature space; Inception in statistics written before there were others.
    """

    data_digest: str
    num_images: int
    image_size: int
    preprocessing: str
    extractor_digest: str
    num_features: int
    described: str
    network: str = "Inception"


@dataclass
class Features:
    """Features (N, d) float32 on the CPU, the pictures' labels (N,), and where they come from."""

    values: torch.Tensor
    labels: np.ndarray
    provenance: Provenance


def extract_features(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    indices: np.ndarray | None = None,
    described: str = "",
    cache_root: str | Path | None = None,
    progress: bool = True,
) -> Features:
    """Features of some pictures of a set (all by default), read from the cache if they were computed before.

    Args:
        network: from :func:`dcngen.evaluation.load_inception` or ``load_dinov2``; its device does the work.
        described: name for the progress bar and the provenance.
    """
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    chosen = hashlib.sha256(images.digest.encode() + indices.astype("<i8").tobytes()).hexdigest()
    described = described or f"{images.name} ({images.split})"
    provenance = Provenance(
        data_digest=chosen,
        num_images=len(indices),
        image_size=images.image_size,
        preprocessing=PREPROCESSING,
        extractor_digest=network.weights_digest,
        num_features=network.num_features,
        described=described,
        network=network.space.network,
    )
    device = next(network.parameters()).device
    key = [chosen, network.weights_digest, network.num_features, device.type, BATCH_SIZE[device.type]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = Path(cache_root or default_cache_dir()) / "features" / f"{name}.safetensors"
    if not path.is_file():
        values = _run_network(images, network, indices, device, described, progress)
        with atomic_file(path) as partial:
            save_file({"features": values}, partial, metadata={"provenance": json.dumps(asdict(provenance))})
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor("features")
    return Features(values, images.labels[indices], provenance)


@torch.inference_mode()
def _run_network(images, network, indices, device, described, progress) -> torch.Tensor:
    batch_size = BATCH_SIZE[device.type]
    values = torch.empty(len(indices), network.num_features)
    bar = tqdm(
        total=len(indices), desc=f"{network.space.network} features: {described}", unit="img", disable=not progress
    )
    with bar:
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            filled = np.resize(chunk, batch_size)
            values[start : start + len(chunk)] = network(images.batch(filled)[0])[: len(chunk)].cpu()
            bar.update(len(chunk))
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"{network.space.network} features of {described} are not finite; the weights file may be damaged"
        )
    return values


class _FlatFolder(Source):
    """Pictures that lie directly in a folder, in the order of their names; all of class 0."""

    def __init__(self, folder: Path):
        from PIL import Image

        self.paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.stem != "grid")
        self.labels = np.zeros(len(self.paths), dtype=np.int64)
        self.class_names = ["all"]
        self._open = Image.open

    def read(self, index: int):
        with self._open(self.paths[index]) as image:
            image.load()
            return image

    def describe(self, index: int) -> str:
        return str(self.paths[index])


def open_generated(path: str | Path) -> ImageSet:
    """Open generated pictures: a folder written by ``sample.py``, any flat folder of pictures, or an ``.npz``.

    An ``.npz`` holds a uint8 array (N, H, W, 3), and its labels if it has an integer array (N,).

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: no pictures there, or pictures of several sizes.
    """
    path = Path(path)
    if path.is_dir() and (path / "samples.npz").is_file():
        path = path / "samples.npz"
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder of pictures nor an .npz file")
    source = _FlatFolder(path)
    if not len(source):
        raise ValueError(f"{path} holds no pictures; expected files such as 000000.png, or samples.npz")
    sizes = {source.read(index).size for index in (0, len(source) // 2, len(source) - 1)}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ValueError(f"{path}: expected square pictures of one size, got {sorted(sizes)}")
    digest = hashlib.sha256()
    for file in source.paths:
        digest.update(file.read_bytes())
    pixels = LazyPixels(source, np.arange(len(source)), next(iter(sizes))[0])
    return ImageSet(
        pixels, source.labels, source.class_names, digest=digest.hexdigest(), name=str(path), split="generated"
    )


def _open_npz(path: Path) -> ImageSet:
    with zipfile.ZipFile(path) as archive:
        arrays = {info.filename.removesuffix(".npy"): _npz_member(path, archive, info) for info in archive.infolist()}
    pictures = [a for a in arrays.values() if a.ndim == 4 and a.dtype == np.uint8 and a.shape[-1] == 3]
    if not pictures:
        shapes = {name: (str(a.dtype), a.shape) for name, a in arrays.items()}
        raise ValueError(f"{path} holds no pictures: expected a uint8 array (N, H, W, 3), got {shapes}")
    pixels = pictures[0]
    labels = [a for a in arrays.values() if a.shape == (len(pixels),) and np.issubdtype(a.dtype, np.integer)]
    known = bool(labels)
    labels = np.asarray(labels[0], dtype=np.int64) if known else np.zeros(len(pixels), dtype=np.int64)
    digest = hashlib.sha256(labels.tobytes())
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).tobytes())
    names = [str(label) for label in range(int(labels.max(initial=0)) + 1)] if known else ["all"]
    channels_first = rearrange(pixels, "n h w c -> n c h w")
    return ImageSet(channels_first, labels, names, digest=digest.hexdigest(), name=str(path), split="generated")


def _npz_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array of an .npz; mapped, not read, where it is stored without compression."""
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        header_size = member.tell()
    if dtype.hasobject or fortran_order or 0 in shape:
        raise ValueError(f"{path}: array {info.filename} is not a plain C-ordered, non-empty array")
    with open(path, "rb") as file:
        # local file header (ZIP specification, 4.3.7): 30 bytes, then name and extra field, whose lengths it ends with
        file.seek(info.header_offset + 26)
        name_and_extra = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    offset = info.header_offset + 30 + name_and_extra + header_size
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def matching_reference(images: ImageSet, labels: np.ndarray | None, count: int) -> tuple[np.ndarray, str]:
    """Indices of ``count`` reference pictures spread evenly over the set, and how they were chosen, in words.

    FID compares whole distributions, so the mixture of classes must agree with the labels (N,) of the generated
    pictures. Without labels, or where the reference has too few pictures of a class, it is the data set's own.
    """
    if labels is not None:
        wanted = np.bincount(labels, minlength=images.num_classes)
        have = np.asarray(images.class_counts)
        if len(wanted) == len(have) and (wanted <= have).all():
            order = np.argsort(images.labels, kind="stable")
            starts = np.cumsum(have) - have
            chosen = [
                order[start + np.linspace(0, total - 1, number).round().astype(np.int64)]
                for start, total, number in zip(starts, have, wanted, strict=True)
                if number
            ]
            return np.sort(np.concatenate(chosen)), f"{len(labels):,} pictures, of each class as many as generated"
    indices = evenly_over_classes(images.labels, count)
    return indices, f"{len(indices):,} pictures in the data set's own mixture of classes"
