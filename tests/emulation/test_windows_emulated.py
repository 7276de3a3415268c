"""The window kernels, what they leave to others, and the plain kernels, emulated, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from gpu.helpers import DTYPES, Geometry, make, reference, storage_dtype_formula

HALVES = DTYPES[1:]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Two multiprocessors are emulated: a forward of more than eight blocks leaves many far samples to the gather kernel.
ALONE, MANY = Geometry(1, 9, 10, 2, 32), Geometry(2, 17, 19, 2, 32)
# In the half types one window holds the first map; the second takes windows around its outputs.
WHOLE, AROUND = [Geometry(2, 14, 11, 3, 32), Geometry(1, 9, 16, 2, 16)], Geometry(2, 18, 20, 2, 32)


@pytest.mark.parametrize("offset_std", [0.2, 0.45, 2.0])
@pytest.mark.parametrize("group_channels", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [(1, 9, 10), (2, 17, 9)], ids=str)
@by_dtype
def test_matches_the_reference(emulated, dtype, size, group_channels, offset_std):
    """Near samples alone, few far ones and many, in small problems and in others; an odd number of groups."""
    geometry = Geometry(*size, 3, group_channels)
    tensors = make(geometry, dtype, offset_std=offset_std, device="cpu")
    plain = storage_dtype_formula(geometry, *tensors) if offset_std > 0.3 else None
    emulated.check(geometry, tensors, plain=plain)


@pytest.mark.parametrize("geometry", [
    Geometry(1, 1, 17, 3, 16), Geometry(2, 17, 1, 1, 64), Geometry(1, 10, 9, 5, 16),
    Geometry(1, 11, 12, 2, 32, padding=0), Geometry(1, 9, 9, 2, 32, padding=2), Geometry(1, 8, 8, 2, 16, padding=2),
    Geometry(1, 12, 9, 2, 32, padding=3),
    Geometry(1, 9, 9, 2, 32, offset_scale=0.5), Geometry(1, 10, 9, 2, 32, offset_scale=2.0),
], ids=str)  # fmt: skip
@by_dtype
def test_odd_sizes_padding_and_scale(emulated, geometry, dtype):
    tensors = make(geometry, dtype, offset_std=0.6, device="cpu")
    emulated.check(geometry, tensors, plain=storage_dtype_formula(geometry, *tensors))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("offset_std", [0.5, 3.0])
@pytest.mark.parametrize("geometry", [*WHOLE, AROUND], ids=["the whole map", "narrow groups", "around"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_far_samples_in_windows(emulated, dtype, geometry, offset_std, deterministic):
    tensors = make(geometry, dtype, offset_std=offset_std, device="cpu")
    plain = storage_dtype_formula(geometry, *tensors)
    emulated.check(geometry, tensors, plain=plain, deterministic=deterministic, reproducible=deterministic)


@by_dtype
def test_far_samples_in_a_fixed_order(emulated, dtype):
    geometry = Geometry(1, 17, 9, 2, 16)
    tensors = make(geometry, dtype, offset_std=3.0, device="cpu")
    plain = storage_dtype_formula(geometry, *tensors)
    emulated.check(geometry, tensors, plain=plain, deterministic=True, reproducible=True)


@pytest.mark.parametrize("offset_std", [0.2, 0.5])
@pytest.mark.parametrize("group_channels", [16, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_of_several_blocks(emulated, dtype, group_channels, offset_std):
    """The last block to finish adds up what the others left."""
    geometry = Geometry(9, 18, 17, 1, group_channels)
    tensors = make(geometry, dtype, offset_std=offset_std, device="cpu")
    got = emulated.check(geometry, tensors, plain=storage_dtype_formula(geometry, *tensors))
    assert got.sums is not None


@pytest.mark.parametrize("geometry", [ALONE, MANY], ids=["small problem", "many blocks"])
@by_dtype
def test_a_single_far_sample(emulated, geometry, dtype):
    value, offset_mask, grad = make(geometry, dtype, offset_std=0.1, device="cpu")
    offset_mask[0, 8, 9, 27 + 6] = 5.25
    emulated.check(geometry, (value, offset_mask, grad))


@by_dtype
def test_whole_pixel_offsets_follow_the_floor_convention(emulated, dtype):
    value, offset_mask, grad = make(ALONE, dtype, device="cpu")
    whole = torch.randint(-2, 3, (*offset_mask.shape[:3], 2, 18), generator=torch.Generator().manual_seed(0))
    offset_mask[..., :54].unflatten(-1, (2, 27))[..., :18] = whole.to(dtype)
    emulated.check(ALONE, (value, offset_mask, grad))


@pytest.mark.parametrize("geometry", [ALONE, MANY, AROUND], ids=["small problem", "many blocks", "around"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 6e4])
@by_dtype
def test_places_that_do_not_count(emulated, geometry, bad, dtype):
    """They contribute nothing and have no gradient, whatever their mask."""
    value, offset_mask, grad = make(geometry, dtype, offset_std=0.2, device="cpu")
    of_groups = offset_mask[..., :54].unflatten(-1, (2, 27))
    of_groups[0, 3, 4, 0, 2] = of_groups[0, 8, 7:, 1, 5] = of_groups[0, 5, 5, :, 6:12] = bad
    of_groups[0, 3, 4, 0, 19] = of_groups[0, 8, 7:, 1, 20] = of_groups[0, 5, 5, :, 21:24] = float("nan")
    tensors = (value, offset_mask, grad)
    got = emulated(geometry, *tensors)
    for ours, best in zip(got[:3], reference(geometry, *tensors), strict=True):
        torch.testing.assert_close(ours.double(), best, rtol=0.02, atol=0.02 * best.abs().max().item())


@pytest.mark.parametrize("geometry", [ALONE, MANY], ids=["small problem", "many blocks"])
@by_dtype
def test_slices_of_one_packed_tensor(emulated, geometry, dtype):
    value, offset_mask, grad = make(geometry, dtype, device="cpu")
    used, channels = offset_mask.shape[3], value.shape[3]
    packed = torch.cat([offset_mask, torch.full((*value.shape[:3], 8), float("nan"), dtype=dtype), value], -1)
    slices = packed[..., :used], packed[..., -channels:]
    expected = emulated(geometry, value, offset_mask, grad, deterministic=True)
    got = emulated(geometry, slices[1], slices[0], grad, deterministic=True)
    for ours, best in zip(got, expected, strict=True):
        assert best is None or torch.equal(ours, best)


@by_dtype
def test_tensors_that_begin_between_sixteen_bytes(emulated, dtype):
    """The forward's plain kernel takes them; the backward, which gets copies from the operator, refuses."""
    with pytest.raises(RuntimeError, match="backward: misaligned address"):
        emulated(ALONE, *make(ALONE, dtype, device="cpu"), begin=2)


@pytest.mark.parametrize("geometry", [
    Geometry(2, 13, 9, 3, 16, stride=2), Geometry(1, 12, 11, 2, 32, kernel_size=5, padding=2),
    Geometry(1, 9, 9, 2, 16, kernel_size=(3, 5)), Geometry(1, 9, 8, 2, 16, kernel_size=1, padding=0),
    Geometry(1, 10, 10, 2, 32, dilation=2, padding=2), Geometry(1, 9, 9, 3, 16, remove_center=True),
    Geometry(1, 9, 9, 3, 16, softmax=True, offset_scale=2.0), Geometry(2, 5, 5, 5, 3), Geometry(1, 9, 9, 1, 96),
    Geometry(1, 9, 9, 1, 6),
], ids=str)  # fmt: skip
@by_dtype
def test_other_geometries(emulated, geometry, dtype):
    tensors = make(geometry, dtype, offset_std=1.0, device="cpu")
    emulated.check(geometry, tensors)
    emulated.check(geometry, tensors, deterministic=True, reproducible=True)
