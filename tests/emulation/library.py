"""The CUDA kernels as a library of the CPU: translated, compiled by the machine's C++ compiler, loaded."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .translate import translate

_MACHINE, _MACHINE_TEST = Path(__file__).parent / "machine", Path(__file__).parent / "machine_test.cu"
_KERNELS = Path(__file__).parents[2] / "kernels"
# Warpgroups are not emulated. (The answer that these do not apply is in machine/left_out.cpp.)
_LEFT_OUT = ("linear", "warpgroup", "forward_projected_", "forward_projected.cuh")
# Sizes that only choose between kernels, made small: the emulation is slow.
_SMALLER = {"backward_launch.cuh": {"kLarge = 20000000;": "kLarge = 20000;", "kFewUnits = 8192;": "kFewUnits = 64;"}}
# Signed numbers wrap and types alias as nvcc lets them; fortified code takes jumps from stack to stack for a mistake.
_FLAGS = [
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-w", "-fwrapv", "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
]  # fmt: skip


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(folder: Path, architecture: int) -> Path:
    """The library of an architecture such as 90, for sm_90: compiled where it is not there yet.

    In a folder below `folder` that is named by all it is made of; what others are there is removed.
    """
    flags = [*_FLAGS, f"-D__CUDA_ARCH__={10 * architecture}"]
    sources = [path for path in sorted((_KERNELS / "cuda").iterdir()) if path.suffix in (".cu", ".cuh", ".h")]
    sources.append(_MACHINE_TEST)
    texts = {path.name: _translated(path) for path in sources if not path.name.startswith(_LEFT_OUT)}
    headers = [_KERNELS / "include" / "dcngen_kernels.h", *sorted(_MACHINE.iterdir())]
    version = subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    everything = [version, *flags, *texts.values(), *(path.read_text() for path in headers)]
    made = folder / hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, others wait for it
        if not (made / "libemulated.so").exists():
            for before in folder.glob("*/"):
                shutil.rmtree(before)
            made.mkdir()
            for name, text in texts.items():
                (made / name).write_text(text)
            kernels = [made / name for name in texts if name.endswith(".cu")]
            _compile(made, flags, [*kernels, *sorted(_MACHINE.glob("*.cpp"))])
    return made / "libemulated.so"


def _translated(path: Path) -> str:
    text = path.read_text()
    for large, small in _SMALLER.get(path.name, {}).items():
        assert text.count(large) == 1, f"{path.name} has changed: {large} is not there once"
        text = text.replace(large, small)
    return translate(text, str(path))


def _compile(folder: Path, flags: list[str], sources: list[Path]) -> None:
    def one(source: Path) -> Path:
        to = folder / f"{source.name}.o"
        level = "-O1" if source.suffix == ".cu" else "-O3"
        paths = [f"-I{_MACHINE}", f"-I{folder}", f"-I{_KERNELS / 'include'}"]
        _run([compiler(), "-x", "c++", *flags, level, *paths, "-c", str(source), "-o", str(to)])
        return to

    # Those that take longest first.
    sources = sorted(sources, key=lambda source: ("_window" not in source.name, source.name))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(one, sources))
    made = folder / "unfinished.so"
    _run([compiler(), "-shared", *map(str, objects), "-Wl,--no-undefined", "-o", str(made)])
    made.rename(folder / "libemulated.so")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:6000]}")


def load(path: Path) -> ctypes.CDLL:
    """The loaded library: the operator's C interface, and a few functions of the emulation."""
    from dcngen.ops import native

    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in native._SIGNATURES["cuda"].items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    for name, arguments in (("announce", [ctypes.c_void_p, ctypes.c_int64]), ("forget", []), ("order", [ctypes.c_int])):
        function = getattr(library, f"emulation_{name}")
        function.restype, function.argtypes = None, arguments
    return library
