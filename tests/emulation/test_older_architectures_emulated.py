"""What runs before sm_90, emulated: copies by threads, matrices stored by shuffles, the plain backward."""

from __future__ import annotations

import pytest
import torch
from gpu.helpers import DTYPES, Geometry, make, storage_dtype_formula
from gpu.whole_maps import few_far_samples, masks_off_the_map, offsets_of_zero

HALVES = DTYPES[1:]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
by_side = pytest.mark.parametrize("side", [4, 8])


def _check(emulated, geometry, dtype, *, offset_std, **options):
    tensors = make(geometry, dtype, offset_std=offset_std, device="cpu")
    return emulated.check(geometry, tensors, plain=storage_dtype_formula(geometry, *tensors), **options)


@pytest.mark.parametrize("offset_std", [0.2, 0.45, 2.0])
@pytest.mark.parametrize("group_channels", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [(1, 9, 10), (2, 17, 9)], ids=str)
@by_dtype
def test_windows(emulated_sm_86, dtype, size, group_channels, offset_std):
    """Near samples alone, few far ones and many, in small problems and in others. The plain backward has no sums."""
    got = _check(emulated_sm_86, Geometry(*size, 3, group_channels), dtype, offset_std=offset_std)
    assert got.sums is None


@pytest.mark.parametrize("geometry", [
    Geometry(1, 1, 17, 3, 16), Geometry(1, 11, 12, 2, 32, padding=0), Geometry(1, 9, 9, 2, 32, padding=2),
    Geometry(1, 10, 9, 2, 32, offset_scale=2.0), Geometry(2, 13, 9, 3, 16, stride=2),
    Geometry(1, 12, 11, 2, 32, kernel_size=5, padding=2),
], ids=str)  # fmt: skip
@by_dtype
def test_odd_sizes(emulated_sm_86, geometry, dtype):
    _check(emulated_sm_86, geometry, dtype, offset_std=0.6)


@by_dtype
def test_the_plain_backward_in_a_fixed_order(emulated_sm_86, dtype):
    _check(emulated_sm_86, Geometry(1, 9, 11, 2, 16), dtype, offset_std=2.0, deterministic=True, reproducible=True)


@pytest.mark.parametrize("offset_std", [0.2, 3.0])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("size", [(3, 4, 4), (2, 3, 2), (3, 8, 8), (2, 7, 5)], ids=str)
@by_half
def test_maps_taken_whole(emulated_sm_86, dtype, size, group_channels, offset_std):
    for groups in (2, 3):
        geometry = Geometry(*size, groups, group_channels)
        _check(emulated_sm_86, geometry, dtype, offset_std=offset_std, reproducible=True)


@by_half
@by_side
def test_maps_taken_whole_where_random_offsets_miss(emulated_sm_86, side, dtype):
    for geometry, tensors in (few_far_samples(side, dtype, "cpu"), offsets_of_zero(side, dtype, 0.5, "cpu")):
        emulated_sm_86.check(geometry, tensors, reproducible=True)
    geometry, tensors = masks_off_the_map(side, dtype, float("nan"), "cpu")
    assert all(torch.isfinite(got).all() for got in emulated_sm_86(geometry, *tensors)[:3])
