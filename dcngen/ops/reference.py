"""DCNv4 in plain torch operations: the definition that every compiled kernel is held to.

Slow, but differentiable twice, in float64 where asked, and on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .geometry import Geometry, check_tensors, make_geometry


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


def reference_forward(input: torch.Tensor, offset_mask: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """dcnv4_reference for a Geometry already made."""
    height_out, width_out = check_tensors(input, offset_mask, geometry)
    batch, _, _, channels = input.shape
    groups, taps = geometry.groups, geometry.taps
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32

    parts = offset_mask[..., : 3 * groups * taps].to(compute).unflatten(-1, (groups, 3 * taps))
    offsets = parts[..., : 2 * taps].unflatten(-1, (taps, 2))
    masks = parts[..., 2 * taps :]
    if geometry.softmax:
        masks = masks.softmax(-1)

    # A border of zeros makes every corner of a counting place readable: -1 <= x0 and x0 + 1 <= W.
    padded = F.pad(input.to(compute), (0, 0, 1, 1, 1, 1))
    rows = padded.reshape(-1, channels // groups)  # one row a pixel and group; row 0 is border: zeros
    size = input.shape[1:3]

    places = _origin(geometry, height_out, width_out, offsets) + geometry.offset_scale * (
        _grid(geometry, offsets) + offsets
    )
    output = rows.new_zeros(batch, height_out, width_out, groups, channels // groups)
    for k in range(taps):
        output = output + _sample(rows, size, places[..., k, 0], places[..., k, 1], masks[..., k])
    return output.reshape(batch, height_out, width_out, channels).to(input.dtype)


def _origin(geometry: Geometry, height_out: int, width_out: int, like: torch.Tensor) -> torch.Tensor:
    """Where the kernel's middle lies for each output position: (H_out, W_out, 1, 1, 2) as (x, y)."""
    center_h, center_w = _center(geometry)
    x = torch.arange(width_out, device=like.device) * geometry.stride[1] + (center_w - geometry.padding[1])
    y = torch.arange(height_out, device=like.device) * geometry.stride[0] + (center_h - geometry.padding[0])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(like.dtype)[:, :, None, None, :]


def _grid(geometry: Geometry, like: torch.Tensor) -> torch.Tensor:
    """The taps' places around the middle, width outer: (K, 2) as (x, y)."""
    (kernel_h, kernel_w), (dilation_h, dilation_w) = geometry.kernel_size, geometry.dilation
    center_h, center_w = _center(geometry)
    grid = [
        (i * dilation_w - center_w, j * dilation_h - center_h)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (geometry.remove_center and i == kernel_w // 2 and j == kernel_h // 2)
    ]
    return torch.tensor(grid, dtype=like.dtype, device=like.device)


def _center(geometry: Geometry) -> tuple[int, int]:
    (kernel_h, kernel_w), (dilation_h, dilation_w) = geometry.kernel_size, geometry.dilation
    return (dilation_h * (kernel_h - 1)) >> 1, (dilation_w * (kernel_w - 1)) >> 1


def _sample(
    rows: torch.Tensor, size: tuple[int, int], x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """mask * bilinear value at (x, y), all (N, H_out, W_out, G); returns (N, H_out, W_out, G, D).

    `rows` holds the pixels of a `size` map with a border of one zero pixel, one row a pixel and group.
    """
    height, width = size
    batch, groups = x.shape[0], x.shape[3]
    counts = (x > -1) & (x < width) & (y > -1) & (y < height)
    # Replaced, not multiplied by 0: a NaN or far coordinate, or its mask, reaches neither values nor gradients.
    x, y, mask = (torch.where(counts, v, 0) for v in (x, y, mask))
    x0, y0 = x.detach().floor(), y.detach().floor()
    lx, ly = x - x0, y - y0

    image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * (height + 2)
    pixel = (image + y0.long() + 1) * (width + 2) + x0.long() + 1
    first = pixel * groups + torch.arange(groups, device=x.device)

    def corner(down: int, right: int) -> torch.Tensor:
        index = first + (down * (width + 2) + right) * groups
        return F.embedding(torch.where(counts, index, 0), rows)

    top = corner(0, 0) * (1 - lx).unsqueeze(-1) + corner(0, 1) * lx.unsqueeze(-1)
    bottom = corner(1, 0) * (1 - lx).unsqueeze(-1) + corner(1, 1) * lx.unsqueeze(-1)
    return (top * (mask * (1 - ly)).unsqueeze(-1)) + bottom * (mask * ly).unsqueeze(-1)
