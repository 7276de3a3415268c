"""The shape rules of DCNv4: what a call's arguments mean and whether they fit each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Geometry(NamedTuple):
    """The arguments of one DCNv4 call apart from the tensors; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool
    softmax: bool

    @property
    def taps(self) -> int:
        """K: sampling places of one output position and group."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) for an input of the given size; not positive where the kernel does not fit."""
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        height_out, width_out = ((n + 2 * p - (d * (k - 1) + 1)) // s + 1 for n, k, s, p, d in sizes)
        return height_out, width_out

    def describe(self) -> str:
        pairs = (f"{name}={getattr(self, name)}" for name in ("kernel_size", "stride", "padding", "dilation"))
        return ", ".join(pairs)


def as_pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """An int or a (height, width) pair as a pair."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    raise TypeError(f"{name}: expected an int or a (height, width) pair of ints, got {value!r}")


def as_number(value: float, name: str) -> float:
    """An int or float as a float; float() would take a string, too."""
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {value!r}")


def make_geometry(
    kernel_size=3,
    stride=1,
    padding=1,
    dilation=1,
    groups=1,
    offset_scale=1.0,
    remove_center=False,
    softmax=False,
) -> Geometry:
    """A checked Geometry.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.
    """
    if not isinstance(groups, int):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    geometry = Geometry(
        as_pair(kernel_size, "kernel_size"),
        as_pair(stride, "stride"),
        as_pair(padding, "padding"),
        as_pair(dilation, "dilation"),
        groups,
        as_number(offset_scale, "offset_scale"),
        bool(remove_center),
        bool(softmax),
    )
    check_geometry(geometry)
    return geometry


def check_geometry(geometry: Geometry) -> None:
    """Raises ValueError where a value is out of its range."""
    for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        pair = getattr(geometry, name)
        if min(pair) < least:
            raise ValueError(f"{name}: expected at least {least} in both directions, got {pair}")
    if geometry.groups < 1:
        raise ValueError(f"groups: expected at least 1, got {geometry.groups}")
    if not math.isfinite(geometry.offset_scale):
        raise ValueError(f"offset_scale: expected a finite number, got {geometry.offset_scale}")
    if geometry.remove_center:
        if not all(k % 2 for k in geometry.kernel_size):
            raise ValueError(
                f"remove_center: expected odd kernel sizes, which have a middle tap, got {geometry.kernel_size}; "
                "use remove_center=False"
            )
        if geometry.taps < 1:
            raise ValueError("remove_center: a 1x1 kernel has no other tap; use remove_center=False")


def offset_mask_channels(groups: int, kernel_size: int | tuple[int, int] = 3, remove_center: bool = False) -> int:
    """P, the channels of `offset_mask`: 3 * groups * taps rounded up to a multiple of 8.

    Group g begins at channel 3 * taps * g with 2 * taps interleaved offsets (x0, y0, x1, y1, ...), then taps mask
    values. The padding stands once, at the tail; it is never read and its gradient is 0.

    Args:
        groups: number of groups G, each with its own places and weights.
        kernel_size: an int or (height, width).
        remove_center: the middle tap is left out.
    """
    geometry = make_geometry(kernel_size=kernel_size, groups=groups, remove_center=remove_center)
    return padded_channels(3 * geometry.groups * geometry.taps)


def padded_channels(channels: int) -> int:
    return -(-channels // 8) * 8


def check_tensors(input: torch.Tensor, offset_mask: torch.Tensor, geometry: Geometry) -> tuple[int, int]:
    """Checks that the two tensors fit each other and the geometry; returns (H_out, W_out).

    Raises:
        TypeError: not tensors, or dtypes that are not floating, or differ.
        ValueError: shapes or devices that do not fit.
    """
    for name, tensor in (("input", input), ("offset_mask", offset_mask)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(f"input: expected a float32, float16, bfloat16 or float64 tensor, got {input.dtype}")
    if offset_mask.dtype != input.dtype:
        raise TypeError(
            f"offset_mask: expected the dtype of input, {input.dtype}, got {offset_mask.dtype}; "
            "convert one of them, or call under torch.autocast"
        )
    if offset_mask.device != input.device:
        raise ValueError(
            f"offset_mask: expected the device of input, {input.device}, got {offset_mask.device}; move one of them"
        )
    if input.dim() != 4:
        raise ValueError(f"input: expected 4 dimensions (N, H, W, groups * D), got {_shape(input)}")
    if offset_mask.dim() != 4:
        raise ValueError(f"offset_mask: expected 4 dimensions (N, H_out, W_out, P), got {_shape(offset_mask)}")
    batch, height, width, channels = input.shape
    if channels < 1 or channels % geometry.groups:
        raise ValueError(
            f"input: expected channels (the last dimension) that groups={geometry.groups} divides, "
            f"got {channels} in {_shape(input)}; channels come last, use .permute(0, 2, 3, 1) on NCHW tensors"
        )
    if height < 1 or width < 1:
        raise ValueError(f"input: expected a map of at least one pixel, got {_shape(input)}")
    height_out, width_out = geometry.output_size(height, width)
    if height_out < 1 or width_out < 1:
        raise ValueError(
            f"input: a {height}x{width} map is too small for {geometry.describe()}; "
            "use more padding or a smaller kernel"
        )
    # Unpadded channels are taken too: the padding is never read.
    least = 3 * geometry.groups * geometry.taps
    most = padded_channels(least)
    if (
        offset_mask.shape[0] != batch
        or offset_mask.shape[1] != height_out
        or offset_mask.shape[2] != width_out
        or not least <= offset_mask.shape[3] <= most
    ):
        raise ValueError(
            f"offset_mask: expected ({batch}, {height_out}, {width_out}, {most}) for input {_shape(input)}, "
            f"groups={geometry.groups}, {geometry.describe()}, remove_center={geometry.remove_center}; "
            f"got {_shape(offset_mask)}; the last size is offset_mask_channels(groups, kernel_size, remove_center)"
        )
    return height_out, width_out


def split_packed(packed: torch.Tensor, channels: int, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """input (N, H, W, channels) and offset_mask (N, H, W, P), views of packed (N, H, W, P + channels or more).

    offset_mask comes first, input last. The other way round the backward on an H200 took up to a sixth longer where the
    two parts of a row were 1 or 2 KB apart (kernels/README.md).

    Raises:
        TypeError: not a tensor.
        ValueError: too few channels, or an output of another size than the input, which one tensor cannot hold.
    """
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"packed: expected a torch.Tensor, got {type(packed).__name__}")
    used = 3 * geometry.groups * geometry.taps
    if packed.dim() != 4 or channels < 1 or packed.shape[3] < channels + used:
        raise ValueError(
            f"packed: expected (N, H, W, P) with P of at least {used} + {channels} channels (offset_mask, then input), "
            f"got {_shape(packed)}"
        )
    size = tuple(packed.shape[1:3])
    if geometry.output_size(*size) != size:
        raise ValueError(
            f"packed: expected a geometry that keeps the map's size {size}, got {geometry.describe()}, which gives "
            f"{geometry.output_size(*size)}; use dcnv4 with two tensors"
        )
    # With its padding where there is one: the window kernel copies 16 bytes at a time.
    end = packed.shape[3] - channels
    return packed[..., end:], packed[..., : min(end, padded_channels(used))]


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(str(n) for n in tensor.shape)})"
