"""The kernels for maps of at most 4x4 and of at most 8x8 pixels, emulated, against the float64 reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gpu.helpers import Geometry, make, reference
from gpu.whole_maps import few_far_samples, masks_off_the_map, offsets_of_zero

HALVES = [torch.float16, torch.bfloat16]
SIZES = {4: [(1, 1), (4, 4), (3, 2), (1, 4)], 8: [(8, 8), (5, 8), (8, 1), (7, 6)]}
by_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
by_side = pytest.mark.parametrize("side", SIZES)


def _fits(side: int, size: int, padding: int) -> bool:
    return 1 <= size + 2 * padding - 2 <= side


@pytest.mark.parametrize("offset_std", [0.4, 3.0])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@by_dtype
@by_side
def test_matches_the_reference(emulated, side, dtype, group_channels, offset_std):
    """Every padding with both maps small, odd and even numbers of groups, more images than a block has."""
    for (height, width), padding in product(SIZES[side], [0, 1, 2]):
        if _fits(side, height, padding) and _fits(side, width, padding):
            groups = 1 + (height + padding) % 3
            geometry = Geometry(3, height, width, groups, group_channels, padding=padding)
            tensors = make(geometry, dtype, offset_std=offset_std, device="cpu")
            emulated.check(geometry, tensors, reproducible=True)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@by_dtype
@by_side
def test_offset_scale(emulated, side, dtype, scale):
    geometry = Geometry(3, side, side, 2, 32, offset_scale=scale)
    emulated.check(geometry, make(geometry, dtype, offset_std=0.7, device="cpu"))


@pytest.mark.parametrize("tiny", [0.0, 2.0**-24])
@by_dtype
@by_side
def test_whole_offsets(emulated, side, dtype, tiny):
    """Places on pixels, on the outermost places that do not count, and so little beside them that no sum shows it."""
    geometry = Geometry(8, side, side - 1, 3, 16)
    value, offset_mask, grad = make(geometry, dtype, device="cpu")
    offsets = offset_mask[..., :81].unflatten(-1, (3, 27))[..., :18]
    whole = torch.randint(-side - 1, side + 2, offsets.shape, generator=torch.Generator().manual_seed(1))
    sign = torch.randint(-1, 2, whole.shape, generator=torch.Generator().manual_seed(2))
    offsets.copy_(torch.where(whole == 0, sign * tiny, whole) if tiny else whole)
    tensors = value, offset_mask, grad
    plain = reference(geometry, *tensors, dtype=torch.float64 if tiny else dtype)
    emulated.check(geometry, tensors, plain=plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 6e4])
@by_dtype
@by_side
def test_places_that_do_not_count(emulated, side, dtype, bad):
    """They contribute nothing and have no gradient, whatever their mask."""
    geometry = Geometry(2, side, side, 3, 32)
    value, offset_mask, grad = make(geometry, dtype, device="cpu")
    groups = offset_mask[..., :81].unflatten(-1, (3, 27))
    groups[:, ::2, 1::2, :, 4] = bad
    groups[:, ::2, 1::2, :, 18 + 2] = float("nan")
    exact = reference(geometry, value, offset_mask, grad)
    for got, best in zip(emulated(geometry, value, offset_mask, grad)[:3], exact, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), best, rtol=0.02, atol=0.02 * best.abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@by_dtype
@by_side
def test_places_just_outside_do_not_count(emulated, side, dtype, bad):
    """The mask of a sample just off the map, or a whole pixel, reaches nothing either."""
    geometry, tensors = masks_off_the_map(side, dtype, bad, "cpu")
    for got, best in zip(emulated(geometry, *tensors)[:3], reference(geometry, *tensors), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), best, rtol=0.02, atol=0.02 * best.abs().max().item())


@by_dtype
@by_side
def test_few_far_samples_among_near_ones(emulated, side, dtype):
    geometry, tensors = few_far_samples(side, dtype, "cpu")
    emulated.check(geometry, tensors, reproducible=True)


@pytest.mark.parametrize("share", [0.5, 1.0])
@by_dtype
@by_side
def test_offsets_of_zero(emulated, side, dtype, share):
    geometry, tensors = offsets_of_zero(side, dtype, share, "cpu")
    emulated.check(geometry, tensors, reproducible=True)


@pytest.mark.parametrize("padding", [3, 4])
def test_wide_paddings(emulated, padding):
    """Outputs around a small map, whose stencils lie on it in part or not at all."""
    geometry = Geometry(3, 10 - 2 * padding, 10 - 2 * padding, 3, 16, padding=padding)
    emulated.check(geometry, make(geometry, torch.bfloat16, offset_std=0.3, device="cpu"), reproducible=True)


@by_dtype
@by_side
def test_what_is_not_finite_stays_in_its_image_and_group(emulated, side, dtype):
    geometry = Geometry(3, side, side, 4, 16)
    value, offset_mask, grad = make(geometry, dtype, device="cpu")
    clean = emulated(geometry, value, offset_mask, grad)
    value[1, 2, 2, 16:32] = float("nan")
    dirty = emulated(geometry, value, offset_mask, grad)
    for number, (got, before) in enumerate(zip(dirty[:3], clean[:3], strict=True)):
        width = 16 if number < 2 else 27
        own = torch.zeros_like(got, dtype=torch.bool)
        own[1, ..., width : 2 * width] = True
        assert got[own].isnan().any() == (number != 1)  # the input's gradient does not depend on the input
        torch.testing.assert_close(got[~own], before[~own], rtol=0, atol=0)


@pytest.mark.parametrize("padding", [0, 8, 72])
@pytest.mark.parametrize("groups", [2, 3])
@by_dtype
@by_side
def test_packed(emulated, side, padding, dtype, groups):
    """One tensor for both: the padding is not read, whatever it holds, and nothing else of the tensor is written."""
    geometry = Geometry(3, side, side - 1, groups, 32)
    value, offset_mask, grad = make(geometry, dtype, offset_std=0.8, device="cpu")
    tail = torch.full((*value.shape[:3], padding), float("nan"), dtype=dtype)
    packed, numbers = torch.cat([offset_mask, tail, value], -1), offset_mask.shape[3]
    slices = packed[..., -value.shape[3] :], packed[..., :numbers]
    expected = emulated(geometry, value, offset_mask, grad)
    for got, best in zip(emulated(geometry, *slices, grad), expected, strict=True):
        assert best is None or torch.equal(got, best)


@by_side
def test_tensors_that_begin_between_sixteen_bytes(emulated, side):
    """The forward's plain kernel takes them; the backward, which gets copies from the operator, refuses."""
    geometry = Geometry(2, side, side, 2, 32)
    tensors = make(geometry, torch.bfloat16, device="cpu")
    with pytest.raises(RuntimeError, match="backward: misaligned address"):
        emulated(geometry, *tensors, begin=4)
