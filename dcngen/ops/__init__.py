"""The DCNv4 operator: the public function, its plain-torch reference, and the choice of implementation."""

from .backends import FallbackWarning, backend, current_backend
from .dcnv4 import dcnv4
from .geometry import offset_mask_channels
from .linear_layer import has_linear_kernel, linear
from .native import NativeLibraryError
from .packed import dcnv4_packed
from .projected import dcnv4_packed_linear
from .reference import dcnv4_packed_linear_reference, dcnv4_packed_reference, dcnv4_reference

__all__ = [
    "FallbackWarning",
    "NativeLibraryError",
    "backend",
    "current_backend",
    "dcnv4",
    "dcnv4_packed",
    "dcnv4_packed_linear",
    "dcnv4_packed_linear_reference",
    "dcnv4_packed_reference",
    "dcnv4_reference",
    "has_linear_kernel",
    "linear",
    "offset_mask_channels",
]
