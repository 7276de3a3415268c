"""What the operator is compared with, where it is installed: the released DCNv4, torchvision, cuDNN, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dcngen.ops.geometry import make_geometry
from dcngen.ops.reference import split_offset_mask


class Competitor(NamedTuple):
    """A forward pass: ``run(prepare(value, offset_mask))``, of which only ``run`` is timed."""

    prepare: Callable[[torch.Tensor, torch.Tensor], Any]
    run: Callable[[Any], torch.Tensor]
    computes_dcnv4: bool = False  # then its result is channels last


def torchvision_tensors(
    value: torch.Tensor, offset_mask: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments (input, offset, weight, mask) with which torchvision's deform_conv2d, padding 1, is dcnv4.

    It wants NCHW, taps row by row and (y, x); a depthwise weight of ones leaves the sum over the taps. Its places have
    the storage type, so in float16 it is another function on wide maps: beyond 256 pixels they are off by up to 0.125.
    """
    parts = split_offset_mask(offset_mask, make_geometry(groups=groups))
    offsets, masks = (part.to(value.dtype) for part in parts)  # read as float32, which loses nothing
    row_major = [3 * i + j for j in range(3) for i in range(3)]  # our tap 3 * i + j runs over the width first
    offsets = offsets[..., row_major, :].flip(-1).flatten(3).permute(0, 3, 1, 2).contiguous()
    masks = masks[..., row_major].flatten(3).permute(0, 3, 1, 2).contiguous()
    weight = value.new_ones(value.shape[3], 1, 3, 3)
    return value.permute(0, 3, 1, 2).contiguous(), offsets, weight, masks


def torchvision_operator() -> Callable | None:
    """torchvision's deform_conv2d, or None where no torchvision fits the installed torch."""
    try:
        from torchvision.ops import deform_conv2d
    except Exception:  # one that does not fit this torch raises all kinds
        return None
    return deform_conv2d


def released_operator(batch: int, height: int, width: int, groups: int, group_channels: int):
    """(forward, backward) of the released DCNv4 with its own launch table, or None where it is not importable."""
    try:
        from DCNv4 import ext
        from DCNv4.functions.dcnv4_func import find_spec_bwd, findspec
    except ImportError:
        return None
    size = (batch, height, width, groups, group_channels)
    geometry = (3, 3, 1, 1, 1, 1, 1, 1, groups, group_channels, 1.0, 256)
    forward_spec, backward_spec = findspec(*size), find_spec_bwd(*size)

    def forward(value: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
        return ext.dcnv4_forward(value, offset_mask, *geometry, 0, *forward_spec, False)

    def backward(value: torch.Tensor, offset_mask: torch.Tensor, grad_output: torch.Tensor):
        return ext.dcnv4_backward(value, offset_mask, *geometry, grad_output, 0, *backward_spec, False)

    return forward, backward


def competitors(channels: int, groups: int, dtype: torch.dtype, device: torch.device) -> dict[str, Competitor]:
    """Forward passes of other operators on the same activations, by name."""
    dense = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
    dense = dense.to(memory_format=torch.channels_last)
    depthwise = torch.nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device=device, dtype=dtype)
    depthwise = depthwise.to(memory_format=torch.channels_last)

    def nchw(value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return value.permute(0, 3, 1, 2)

    def heads(value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return value.flatten(1, 2).unflatten(-1, (-1, 32)).transpose(1, 2)

    table = {"conv3x3": Competitor(nchw, dense), "depthwise7x7": Competitor(nchw, depthwise)}
    if dtype != torch.float32:
        table["attention"] = Competitor(heads, lambda x: F.scaled_dot_product_attention(x, x, x))
    deform_conv2d = torchvision_operator()
    if deform_conv2d is not None and dtype != torch.bfloat16:  # which it does not take
        table["torchvision"] = Competitor(
            lambda value, offset_mask: torchvision_tensors(value, offset_mask, groups),
            lambda x: deform_conv2d(*x[:3], padding=1, mask=x[3]).permute(0, 2, 3, 1),
            computes_dcnv4=True,
        )
    return table
