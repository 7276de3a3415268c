"""The choice between the compiled kernels and plain torch."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import native

BACKENDS = ("auto", "native", "reference")
BACKEND_VARIABLE = "DCNGEN_BACKEND"

CPU_TAPS = 144  # kMaxSamples of kernels/cpu: what a vector of pixels may have in its local arrays
_LIBRARIES = {"cpu": native.cpu_library, "cuda": native.cuda_library}

# Of the process, not of the thread: autograd runs CUDA backwards in a thread of its own.
_chosen: str | None = None
_said: set[str] = set()


class FallbackWarning(UserWarning):
    """The same function is computed by a slower path; said once a reason."""


def current_backend() -> str:
    """The backend in force: the innermost `backend(...)`, else $DCNGEN_BACKEND, else "auto"."""
    global _chosen
    if _chosen is None:
        _chosen = _checked(os.environ.get(BACKEND_VARIABLE, "auto"))
    return _chosen


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces an implementation for the whole process while the context lasts.

    Args:
        name: "auto" (the compiled kernels where they can run, plain torch elsewhere), "native" (the compiled kernels,
            or the reason why they cannot run, raised), or "reference" (plain torch). Under torch.func transforms, for
            forward-mode derivatives and in a backward with create_graph=True it is plain torch with all three.

    Raises:
        ValueError: an unknown name.
    """
    global _chosen
    before, _chosen = current_backend(), _checked(name)
    try:
        yield
    finally:
        _chosen = before


def native_library(device_type: str, dtype: torch.dtype, taps: int = 0) -> ctypes.CDLL | None:
    """The library that computes tensors of this device and dtype with so many taps, or None where plain torch does.

    Raises:
        NativeLibraryError, TypeError, ValueError: backend "native" is in force and cannot run, with the reason.
    """
    name = _chosen or current_backend()
    if name == "reference":
        return None
    try:
        if dtype is torch.float64:
            raise TypeError(
                "dcnv4: the compiled kernels take float32, float16 and bfloat16, got float64; "
                "convert the tensors, or use backend 'auto' or 'reference'"
            )
        if device_type == "cpu" and taps > CPU_TAPS:
            raise ValueError(f"dcnv4: the CPU kernel takes windows of at most {CPU_TAPS} taps, got {taps}")
        return _LIBRARIES[device_type]()
    except (native.NativeLibraryError, TypeError, ValueError) as reason:
        if name == "native":
            raise
        _say_once(f"dcnv4 runs in plain torch, which gives the same values more slowly: {reason}")
        return None


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r} (see {BACKEND_VARIABLE})")
    return name
