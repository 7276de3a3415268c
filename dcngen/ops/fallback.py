"""The gradients of DCNv4 in plain torch, formula by formula, for devices and dtypes without a compiled kernel.

Unlike autograd through the reference this keeps no intermediate of the forward, and works below autograd, where a
custom operator's backward runs.
"""

from __future__ import annotations

import torch

from .geometry import Geometry
from .reference import padded_rows, place_of, sampling_places, split_offset_mask


@torch.no_grad()
def reference_backward(
    grad_output: torch.Tensor, input: torch.Tensor, offset_mask: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_input, grad_offset_mask) of `dcnv4_reference`.

    With g the output's gradient and <,> over a group's channels: d(mask) = <g, sample>,
    d(offset) = offset_scale * mask * <g, d(sample)/d(place)>, d(input) = scatter of g * mask * corner weight.
    """
    offsets, masks = split_offset_mask(offset_mask, geometry)
    rows = padded_rows(input, geometry.groups, offsets.dtype)
    grad = grad_output.to(offsets.dtype).reshape(*offsets.shape[:4], rows.shape[1])
    grad_rows, grad_offsets, grad_masks = map(torch.zeros_like, (rows, offsets, masks))

    places = sampling_places(offsets, geometry)
    for k in range(geometry.taps):
        place = place_of(places[..., k, :], tuple(input.shape[1:3]))
        lx, ly, mask = place.lx, place.ly, torch.where(place.counts, masks[..., k], 0)
        # <g, corner> for the four corners: all that offsets and masks need of the channels
        p00, p01, p10, p11 = ((grad * rows[index]).sum(-1) for index in place.corners)
        grad_masks[..., k] = (1 - ly) * ((1 - lx) * p00 + lx * p01) + ly * ((1 - lx) * p10 + lx * p11)
        scale = geometry.offset_scale * mask
        grad_offsets[..., k, 0] = scale * ((1 - ly) * (p01 - p00) + ly * (p11 - p10))
        grad_offsets[..., k, 1] = scale * ((1 - lx) * (p10 - p00) + lx * (p11 - p01))
        for index, weight in zip(place.corners, place.weights, strict=True):
            share = grad * (mask * weight).unsqueeze(-1)
            grad_rows.index_add_(0, index.flatten(), share.flatten(0, -2))

    if geometry.softmax:  # d(logit) = w * (d(w) - sum over the taps of w * d(w))
        grad_masks = masks * (grad_masks - (masks * grad_masks).sum(-1, keepdim=True))
    return _unpad(grad_rows, input), _join(grad_offsets, grad_masks, offset_mask)


def _unpad(grad_rows: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    batch, height, width, channels = input.shape
    padded = grad_rows.view(batch, height + 2, width + 2, channels)
    return padded[:, 1:-1, 1:-1].to(input.dtype).contiguous()


def _join(grad_offsets: torch.Tensor, grad_masks: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
    """Back to the layout of offset_mask; the padding's gradient is 0."""
    used = torch.cat([grad_offsets.flatten(-2), grad_masks], -1).flatten(-2)
    grad = offset_mask.new_zeros(offset_mask.shape)
    grad[..., : used.shape[-1]] = used.to(grad.dtype)
    return grad
