"""DCNv4 in plain torch operations: the definition that every compiled kernel is held to.

Slow, but differentiable twice, in float64 where asked, and on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .geometry import Geometry, check_tensors, make_geometry, split_packed


def dcnv4_reference(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> torch.Tensor:
    """Deformable convolution v4 (Xiong et al., arXiv 2401.06197, section 3.1) as a sum of gathers.

    y(p) = sum_k m_k * x(p + p_k + dp_k) for each group, x sampled bilinearly. A place counts only where
    -1 < x < W and -1 < y < H (a NaN does not); corners outside the image contribute 0. Float16 and bfloat16 are
    computed in float32 and rounded once; float64 stays float64.

    Args:
        input: (N, H, W, G * D), channels last.
        offset_mask: (N, H_out, W_out, P) with P = offset_mask_channels(groups, kernel_size, remove_center), in the
            layout that offset_mask_channels describes; offsets in pixels. Tap k = i * kernel_h + j, i over the width.
        kernel_size, stride, padding, dilation: an int or (height, width).
        groups: G, which divides the channels.
        offset_scale: multiplies the regular grid and the offsets alike.
        remove_center: leave the middle tap out.
        softmax: the masks are logits, softmax over the taps of a group (DCNv3's weights).

    Returns:
        (N, H_out, W_out, G * D) in the dtype of input.

    Raises:
        TypeError, ValueError: what does not fit, with what was expected.
    """
    geometry = make_geometry(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax)
    return reference_forward(input, offset_mask, geometry)


def dcnv4_packed_reference(
    packed: torch.Tensor, packed_bias: torch.Tensor | None = None, *, channels: int, groups: int, **options
) -> torch.Tensor:
    """`dcnv4_reference` of the two parts of one tensor; see `dcnv4_packed`."""
    geometry = make_geometry(groups=groups, **options)
    return reference_forward(*split_packed(with_bias_gradient(packed, packed_bias), channels, geometry), geometry)


def with_bias_gradient(packed: torch.Tensor, packed_bias: torch.Tensor | None) -> torch.Tensor:
    """packed, but so that packed_bias takes part in its derivatives."""
    return packed if packed_bias is None else packed + (packed_bias - packed_bias.detach())


def dcnv4_packed_linear_reference(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed_bias: torch.Tensor | None = None,
    *,
    channels: int,
    **options,
) -> torch.Tensor:
    """`F.linear` of `dcnv4_packed_reference`; see `dcnv4_packed_linear`."""
    return F.linear(dcnv4_packed_reference(packed, packed_bias, channels=channels, **options), weight, bias)


def reference_forward(input: torch.Tensor, offset_mask: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """dcnv4_reference for a Geometry already made."""
    check_tensors(input, offset_mask, geometry)
    offsets, masks = split_offset_mask(offset_mask, geometry)
    rows = padded_rows(input, geometry.groups, offsets.dtype)
    output = rows.new_zeros(*offsets.shape[:4], rows.shape[1])
    places = sampling_places(offsets, geometry)
    for k in range(geometry.taps):
        place = place_of(places[..., k, :], tuple(input.shape[1:3]))
        # Replaced, not multiplied by 0: the mask of a place that does not count may be NaN.
        mask = torch.where(place.counts, masks[..., k], 0)
        for index, weight in zip(place.corners, place.weights, strict=True):
            output = output + F.embedding(index, rows) * (mask * weight).unsqueeze(-1)
    return output.flatten(-2).to(input.dtype)


def split_offset_mask(offset_mask: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (N, H_out, W_out, G, K, 2) and masks (N, H_out, W_out, G, K) as they weigh, at least in float32."""
    groups, taps = geometry.groups, geometry.taps
    dtype = torch.promote_types(offset_mask.dtype, torch.float32)
    parts = offset_mask[..., : 3 * groups * taps].to(dtype).unflatten(-1, (groups, 3 * taps))
    offsets, masks = parts[..., : 2 * taps].unflatten(-1, (taps, 2)), parts[..., 2 * taps :]
    return offsets, masks.softmax(-1) if geometry.softmax else masks


def padded_rows(input: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """The pixels of input with a border of one zero pixel, one row a pixel and group: (N * (H+2) * (W+2) * G, D).

    With the border every corner of a counting place can be read, since -1 <= x0 and x0 + 1 <= W. Row 0 is zeros.
    """
    return F.pad(input.to(dtype), (0, 0, 1, 1, 1, 1)).reshape(-1, input.shape[-1] // groups)


def sampling_places(offsets: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Coordinates (x, y) in pixels of the input, of the shape of offsets (N, H_out, W_out, G, K, 2)."""
    (kernel_h, kernel_w), (dilation_h, dilation_w) = geometry.kernel_size, geometry.dilation
    center_h, center_w = (dilation_h * (kernel_h - 1)) >> 1, (dilation_w * (kernel_w - 1)) >> 1
    grid = [
        (i * dilation_w - center_w, j * dilation_h - center_h)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (geometry.remove_center and i == kernel_w // 2 and j == kernel_h // 2)
    ]
    _, height_out, width_out = offsets.shape[:3]
    x = torch.arange(width_out, device=offsets.device) * geometry.stride[1] + (center_w - geometry.padding[1])
    y = torch.arange(height_out, device=offsets.device) * geometry.stride[0] + (center_h - geometry.padding[0])
    origin = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(offsets.dtype)[:, :, None, None, :]
    return origin + geometry.offset_scale * (offsets.new_tensor(grid) + offsets)


class Place(NamedTuple):
    """Sampling places (N, H_out, W_out, G) of one tap; the corners in the order y0x0, y0x1, y1x0, y1x1."""

    counts: torch.Tensor  # -1 < x < W and -1 < y < H; False for NaN
    lx: torch.Tensor  # distance from the lower corner; 0 where the place does not count
    ly: torch.Tensor
    corners: list[torch.Tensor]  # rows of padded_rows; row 0, zeros, where the place does not count

    @property
    def weights(self) -> list[torch.Tensor]:
        """The corners' bilinear weights."""
        hx, hy = 1 - self.lx, 1 - self.ly
        return [hy * hx, hy * self.lx, self.ly * hx, self.ly * self.lx]


def place_of(coordinates: torch.Tensor, size: tuple[int, int]) -> Place:
    """The places of coordinates (N, H_out, W_out, G, 2), in pixels of a map of the given (height, width)."""
    (height, width), (batch, _, _, groups, _) = size, coordinates.shape
    x, y = coordinates.unbind(-1)
    counts = (x > -1) & (x < width) & (y > -1) & (y < height)
    # Replaced, not multiplied by 0: a NaN or far coordinate reaches neither values nor gradients.
    x, y = torch.where(counts, x, 0), torch.where(counts, y, 0)
    x0, y0 = x.detach().floor(), y.detach().floor()
    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * (height + 2)
    pixel = (image + y0.long() + 1) * (width + 2) + x0.long() + 1
    first = pixel * groups + torch.arange(groups, device=x.device)
    steps = (0, groups, (width + 2) * groups, (width + 3) * groups)
    return Place(counts, x - x0, y - y0, [torch.where(counts, first + step, 0) for step in steps])
