"""`python -m dcngen info`: what was found on this machine, what is used, and why not the rest.

Nothing here fails because a part is missing: its line says so instead. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator

import dcngen

PACKAGES = (
    "torch",
    "diffusers",
    "accelerate",
    "einops",
    "datasets",
    "safetensors",
    "jsonargparse",
    "tensorboard",
    "torchmetrics",
    "transformers",
    "torchvision",
    "torch-fidelity",
)
VARIABLES = ("DCNGEN_LIBRARY_DIR", "DCNGEN_BACKEND", "DCNGEN_CPU_ISA", "DCNGEN_CACHE", "OMP_NUM_THREADS")

Line = tuple[str, str]


def main(argv: list[str] | None = None) -> int:
    """Prints the diagnostics; returns 0."""
    argparse.ArgumentParser(prog="python -m dcngen info", description=__doc__).parse_args(argv)
    sections: dict[str, Callable[[], Iterator[Line]]] = {
        "dcngen": _package,
        "operator": _operator,
        "devices": _devices,
        "packages": _packages,
        "evaluation": _evaluation,
    }
    for title, lines in sections.items():
        print(title)
        for name, text in _guarded(lines):
            print(f"  {name:<20}{text}")
    return 0


def _guarded(lines: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    try:
        yield from lines()
    except Exception as error:  # a broken part is what this command is asked about
        yield "not available", f"{type(error).__name__}: {error}"


def _package() -> Iterator[Line]:
    yield "version", f"{dcngen.__version__} at {os.path.dirname(dcngen.__file__)}"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    yield "machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _operator() -> Iterator[Line]:
    from dcngen.ops import current_backend, native

    chosen = current_backend()
    yield "backend", chosen
    for library in native.status():
        if library.error:
            yield f"{library.kind} kernels", f"not found or not usable: {library.error}"
        else:
            yield f"{library.kind} kernels", f"{library.path} ({library.details})"
        yield f"{library.kind} tensors", _path_taken(chosen, library)
    yield "float64", "computed in plain torch"


def _path_taken(chosen: str, library) -> str:
    if chosen == "reference":
        return "computed in plain torch: the backend is forced to reference"
    if library.error is None:
        return "computed by the compiled kernels"
    if chosen == "native":
        return "an error: the backend is forced to native and its library is missing"
    return "computed in plain torch: the same values, more slowly"


def _devices() -> Iterator[Line]:
    import torch

    yield "threads", str(torch.get_num_threads())
    yield "torch's CUDA", torch.version.cuda or "none: this torch is built for the CPU alone"
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
        return
    compiled = _compiled_architectures()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}{properties.minor}"
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}", f"{properties.name}, sm_{capability}, {memory:.0f} GiB{_fit(capability, compiled)}"


def _compiled_architectures() -> list[str] | None:
    from dcngen.ops import native

    try:
        return native.cuda_library().dcngen_cuda_architectures().decode().split()
    except native.NativeLibraryError:
        return None


def _fit(capability: str, compiled: list[str] | None) -> str:
    """Whether the CUDA library holds code for a GPU: its generation's machine code, or older virtual code."""
    if compiled is None:
        return ""
    for name in compiled:
        number = int(name.split("+")[0].rstrip("af"))
        same_generation = number // 10 == int(capability) // 10 and number <= int(capability)
        if same_generation or ("+PTX" in name and number <= int(capability)):
            return ", supported by the compiled kernels"
    return f", NOT supported by the compiled kernels: rebuild with DCNGEN_CUDA_ARCHITECTURES={capability}"


def _packages() -> Iterator[Line]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _evaluation() -> Iterator[Line]:
    from dcngen.data.config import default_cache_dir
    from dcngen.evaluation.inception_weights import CACHE_NAME, HELPER

    cache = default_cache_dir()
    yield "cache", f"{cache}{'' if cache.is_dir() else ' (not created yet)'}"
    weights = cache / "sources" / CACHE_NAME
    if weights.is_file():
        yield "Inception", str(weights)
        return
    try:
        yield "Inception", f"from the installed {HELPER} {importlib.metadata.version(HELPER)}"
    except importlib.metadata.PackageNotFoundError:
        yield "Inception", f"neither in the cache nor from {HELPER}: evaluation downloads it when it is needed"
