"""Deformable convolutions as modules, and the blocks that take a convolution's or an attention's place."""

from dcngen.nn.blocks import DCNv4Attention, DCNv4Conv2d, group_channels_for
from dcngen.nn.dcnv4 import DCNv4

__all__ = ["DCNv4", "DCNv4Attention", "DCNv4Conv2d", "group_channels_for"]
