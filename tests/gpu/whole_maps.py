"""Cases of maps taken whole that random offsets miss: for the tests on a GPU and for the emulation's.

Each is (geometry, (input, offset_mask, grad_output)) of maps of `side` x `side` pixels.
"""

from __future__ import annotations

import torch

from .helpers import Geometry, make


def masks_off_the_map(side: int, dtype: torch.dtype, bad: float, device: str = "cuda"):
    """Bad masks of samples off the map: near their place on the grid, or a whole pixel from it."""
    geometry = Geometry(2, side, side, 3, 32)
    tensors = make(geometry, dtype, offset_std=0.2, device=device)
    groups = _groups(geometry, tensors)
    groups[:, 0, :, :, 1] = -0.25  # the upper left tap of the first row, at y = -1.25
    groups[:, 1, :, :, 1] = -1.0  # and of the second, at y = -1
    groups[:, 2:, 1, :, 0] = -1.0  # and of the second column, at x = -1
    groups[:, :2, :, :, 18] = bad
    groups[:, 2:, 1, :, 18] = bad
    return geometry, tensors


def few_far_samples(side: int, dtype: torch.dtype, device: str = "cuda"):
    """Warps in which one lane alone, or one tap of every lane, is far, and others in which none is."""
    geometry = Geometry(6, side, side, 4, 32)
    tensors = make(geometry, dtype, offset_std=0.2, device=device)
    groups = _groups(geometry, tensors)
    groups[1, 0, side - 1, 2, 6:8] = torch.tensor([-2.5, 1.75], device=device)
    groups[2, :, :, 1, 4] = 1.0
    groups[4, :, :, 0, 5] = 1.0
    groups[3, :, :, 3, 16:18] = torch.tensor([-1.0, 1.5], device=device)
    return geometry, tensors


def offsets_of_zero(side: int, dtype: torch.dtype, share: float, device: str = "cuda"):
    """As a layer begins: the outermost taps are at -1 and at the side, which do not count and have no derivative."""
    geometry = Geometry(5, side, side, 3, 32)
    tensors = make(geometry, dtype, offset_std=0.2, device=device)
    offsets = _groups(geometry, tensors)[..., :18]
    zero = torch.rand(offsets.shape, generator=torch.Generator().manual_seed(0)) < share
    offsets[zero.to(device)] = 0
    return geometry, tensors


def _groups(geometry: Geometry, tensors) -> torch.Tensor:
    """A view of offset_mask as (..., groups, 27)."""
    return tensors[1][..., : 27 * geometry.groups].unflatten(-1, (geometry.groups, 27))
