"""Finding and loading the compiled kernels: two C libraries that know neither torch nor Python.

Importing this module never fails. A library is looked for at the first call that needs it, in $DCNGEN_LIBRARY_DIR and
then in the installed package; a failure is kept and raised, whole, at every call that needs that library.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

import dcngen

ABI_VERSION = 3  # DCNGEN_ABI_VERSION of kernels/include/dcngen_kernels.h
LIBRARY_DIR_VARIABLE = "DCNGEN_LIBRARY_DIR"

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_LINEAR = [_INT64, _INT32, _INT32, _INT32, ctypes.c_int]  # rows, in_features, out_features, dtype, device


class NativeLibraryError(RuntimeError):
    """A compiled library is missing, cannot be loaded, or does not fit this version of the package."""


class DCNv4Params(ctypes.Structure):
    """dcngen_dcnv4_params, field by field."""

    _fields_ = [
        ("batch", _INT64),
        ("height_in", _INT64),
        ("width_in", _INT64),
        ("height_out", _INT64),
        ("width_out", _INT64),
        ("input_pixel_stride", _INT64),
        ("offset_mask_pixel_stride", _INT64),
        ("output_pixel_stride", _INT64),
        ("grad_input_pixel_stride", _INT64),
        ("grad_offset_mask_pixel_stride", _INT64),
        ("offset_mask_channels", _INT32),
        ("groups", _INT32),
        ("group_channels", _INT32),
        ("kernel_h", _INT32),
        ("kernel_w", _INT32),
        ("stride_h", _INT32),
        ("stride_w", _INT32),
        ("pad_h", _INT32),
        ("pad_w", _INT32),
        ("dilation_h", _INT32),
        ("dilation_w", _INT32),
        ("offset_scale", ctypes.c_float),
        ("remove_center", _INT32),
        ("softmax", _INT32),
        ("dtype", _INT32),
        ("deterministic", _INT32),
    ]


# name -> (result type, argument types). DCNv4Params goes by address: the caller keeps it alive.
_SIGNATURES = {
    "cpu": {
        "dcngen_cpu_abi_version": (ctypes.c_int, []),
        "dcngen_cpu_last_error": (ctypes.c_char_p, []),
        "dcngen_cpu_isa": (ctypes.c_char_p, []),
        "dcngen_cpu_dcnv4_forward": (ctypes.c_int, [_POINTER] * 4 + [ctypes.c_int]),
        "dcngen_cpu_dcnv4_backward": (ctypes.c_int, [_POINTER] * 6 + [ctypes.c_int]),
    },
    "cuda": {
        "dcngen_cuda_abi_version": (ctypes.c_int, []),
        "dcngen_cuda_last_error": (ctypes.c_char_p, []),
        "dcngen_cuda_architectures": (ctypes.c_char_p, []),
        "dcngen_cuda_device_count": (ctypes.c_int, []),
        "dcngen_cuda_dcnv4_forward": (ctypes.c_int, [_POINTER] * 4 + [ctypes.c_int, _POINTER]),
        "dcngen_cuda_dcnv4_projected_applies": (ctypes.c_int, [_POINTER, ctypes.c_int]),
        "dcngen_cuda_dcnv4_forward_projected": (ctypes.c_int, [_POINTER] * 7 + [ctypes.c_int, _POINTER]),
        "dcngen_cuda_dcnv4_backward_has_sums": (ctypes.c_int, [_POINTER]),
        "dcngen_cuda_dcnv4_backward_workspace_size": (_INT64, [_POINTER, ctypes.c_int]),
        "dcngen_cuda_dcnv4_backward": (ctypes.c_int, [_POINTER] * 8 + [ctypes.c_int, _POINTER]),
        "dcngen_cuda_linear_parts": (ctypes.c_int, _LINEAR),
        "dcngen_cuda_linear_forward": (ctypes.c_int, [*[_POINTER] * 4, *_LINEAR, _POINTER]),
        "dcngen_cuda_linear_backward": (ctypes.c_int, [*[_POINTER] * 4, *_LINEAR, _POINTER]),
    },
}

_REMEDIES = {
    "cpu": "reinstall dcngen where a C++ compiler is found (with DCNGEN_REQUIRE=cpu the build fails and says why)",
    "cuda": "reinstall dcngen where nvcc is found (with DCNGEN_REQUIRE=cuda the build fails and says why)",
}


class LibraryStatus(NamedTuple):
    """What became of one library; `error` is None where it is usable."""

    kind: str
    path: str | None
    details: str | None
    error: str | None


_loaded: dict[str, ctypes.CDLL | NativeLibraryError] = {}


def cpu_library() -> ctypes.CDLL:
    """The CPU kernels. Raises NativeLibraryError with the original cause where they cannot be used."""
    return _library("cpu")


def cuda_library() -> ctypes.CDLL:
    """The CUDA kernels. Raises NativeLibraryError with the original cause where they cannot be used.

    Loading needs no GPU and no driver.
    """
    return _library("cuda")


def status() -> list[LibraryStatus]:
    """What was found of each library, loading them if that has not happened yet."""
    return [_status(kind) for kind in _SIGNATURES]


def forget() -> None:
    """Forgets what was loaded or failed, so that the next call searches again."""
    _loaded.clear()


def search_path() -> list[Path]:
    """The folders looked through, in order."""
    named = os.environ.get(LIBRARY_DIR_VARIABLE)
    # An editable install has two package folders: the sources, and site-packages with what was compiled.
    installed = [Path(folder) / "lib" for folder in dcngen.__path__]
    return [Path(named), *installed] if named else installed


def _library(kind: str) -> ctypes.CDLL:
    found = _loaded.get(kind)
    if found is None:
        try:
            found = _load(kind)
        except NativeLibraryError as error:
            found = error
        _loaded[kind] = found
    if isinstance(found, NativeLibraryError):
        raise found.with_traceback(None)
    return found


def _file_name(kind: str) -> str:
    prefix, suffix = {"darwin": ("lib", ".dylib"), "win32": ("", ".dll")}.get(sys.platform, ("lib", ".so"))
    return f"{prefix}dcngen_{kind}{suffix}"


def _load(kind: str) -> ctypes.CDLL:
    name = _file_name(kind)
    folders = search_path()
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise NativeLibraryError(
            f"the compiled {kind.upper()} kernels were not found: no {name} in {looked}; {_REMEDIES[kind]}, "
            f"or name the folder that holds it in {LIBRARY_DIR_VARIABLE}"
        )
    try:
        library = ctypes.CDLL(str(path))
        _declare(library, kind)
    except (OSError, AttributeError) as error:  # AttributeError: a symbol is missing
        raise NativeLibraryError(f"{path} was found but cannot be used: {error}; {_REMEDIES[kind]}") from error
    version = getattr(library, f"dcngen_{kind}_abi_version")()
    if version != ABI_VERSION:
        raise NativeLibraryError(
            f"{path}: expected ABI version {ABI_VERSION}, got {version}; it was built for another version of dcngen: "
            f"{_REMEDIES[kind]}"
        )
    return library


def _declare(library: ctypes.CDLL, kind: str) -> None:
    for name, (result, arguments) in _SIGNATURES[kind].items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _status(kind: str) -> LibraryStatus:
    try:
        library = _library(kind)
    except NativeLibraryError as error:
        return LibraryStatus(kind, None, None, str(error))
    if kind == "cpu":
        details = f"instruction set {library.dcngen_cpu_isa().decode()}"
    else:
        details = f"architectures {library.dcngen_cuda_architectures().decode() or 'unknown'}"
    return LibraryStatus(kind, library._name, details, None)
