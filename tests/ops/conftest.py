"""Inputs for the operator's tests, and an oracle that shares no code with the operator."""

import math

import pytest
import torch

from dcngen.ops import offset_mask_channels


def output_size(size, kernel_size=3, stride=1, padding=1, dilation=1):
    return (size + 2 * padding - (dilation * (kernel_size - 1) + 1)) // stride + 1


@pytest.fixture
def make_inputs():
    """make_inputs(batch, height, width, groups, group_channels, spread=..., ...) -> input, offset_mask."""

    def make(
        batch,
        height,
        width,
        groups,
        group_channels,
        *,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        remove_center=False,
        spread=1.5,
        dtype=torch.float64,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
        sizes = zip((height, width), *map(pair, (kernel_size, stride, padding, dilation)), strict=True)
        height_out, width_out = (output_size(*of_axis) for of_axis in sizes)
        channels = offset_mask_channels(groups, kernel_size, remove_center)
        input = torch.randn(batch, height, width, groups * group_channels, dtype=torch.float64, generator=generator)
        offset_mask = torch.randn(batch, height_out, width_out, channels, dtype=torch.float64, generator=generator)
        return input.to(dtype), (offset_mask * spread).to(dtype)

    return make


@pytest.fixture
def naive_dcnv4():
    """The oracle: naive_dcnv4(input, offset_mask, kernel_size, stride, ...), all pairs (height, width)."""
    return _naive_dcnv4


def _naive_dcnv4(
    input, offset_mask, kernel_size, stride, padding, dilation, groups, scale=1.0, remove_center=False, softmax=False
):
    """Scalar loops over the definition, in Python floats; all arguments pairs (height, width)."""
    batch, height, width, channels = input.shape
    _, height_out, width_out, _ = offset_mask.shape
    depth = channels // groups
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel_size, stride, padding, dilation
    taps = [(i, j) for i in range(kw) for j in range(kh) if not (remove_center and (i, j) == (kw // 2, kh // 2))]
    cw, ch = (dw * (kw - 1)) // 2, (dh * (kh - 1)) // 2
    output = torch.zeros(batch, height_out, width_out, channels, dtype=torch.float64)
    for n in range(batch):
        for oh in range(height_out):
            for ow in range(width_out):
                for g in range(groups):
                    part = offset_mask[n, oh, ow, 3 * len(taps) * g : 3 * len(taps) * (g + 1)].tolist()
                    masks = part[2 * len(taps) :]
                    if softmax:
                        total = sum(math.exp(m) for m in masks)
                        masks = [math.exp(m) / total for m in masks]
                    for k, (i, j) in enumerate(taps):
                        x = cw - pw + ow * sw + scale * (i * dw - cw + part[2 * k])
                        y = ch - ph + oh * sh + scale * (j * dh - ch + part[2 * k + 1])
                        if not (-1 < x < width and -1 < y < height):
                            continue
                        for yy in (math.floor(y), math.floor(y) + 1):
                            for xx in (math.floor(x), math.floor(x) + 1):
                                if 0 <= yy < height and 0 <= xx < width:
                                    weight = (1 - abs(x - xx)) * (1 - abs(y - yy)) * masks[k]
                                    span = slice(g * depth, (g + 1) * depth)
                                    output[n, oh, ow, span] += weight * input[n, yy, xx, span]
    return output
