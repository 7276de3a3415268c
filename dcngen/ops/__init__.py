"""The DCNv4 operator: the public function, its plain-torch reference, and the choice of implementation."""

from .geometry import offset_mask_channels
from .reference import dcnv4_reference

__all__ = ["dcnv4_reference", "offset_mask_channels"]
