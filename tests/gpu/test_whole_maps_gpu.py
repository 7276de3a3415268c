"""Maps of at most 4x4 and of at most 8x8 pixels in fp16 and bf16, which have kernels of their own."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dcngen.ops import dcnv4, dcnv4_packed
from gpu.helpers import Geometry, check, check_tensors, make, native, reference
from gpu.whole_maps import few_far_samples, masks_off_the_map, offsets_of_zero

HALVES = [torch.float16, torch.bfloat16]
SIZES = {
    4: [(1, 1), (2, 3), (3, 2), (4, 4), (4, 1), (1, 4), (3, 3)],
    8: [(8, 8), (7, 7), (5, 8), (8, 5), (8, 1), (1, 7), (4, 6), (6, 3)],
}
by_side = pytest.mark.parametrize("side", SIZES)


def _fits(side: int, size: int, padding: int) -> bool:
    return 1 <= size + 2 * padding - 2 <= side


@pytest.mark.parametrize("offset_std", [0.3, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_matches_the_reference(side, dtype, group_channels, offset_std):
    """Every size and padding with both maps small, odd and even numbers of groups, more images than a block has."""
    for (height, width), padding, groups in product(SIZES[side], [0, 1, 2], [1, 2, 3]):
        if _fits(side, height, padding) and _fits(side, width, padding):
            geometry = Geometry(7, height, width, groups, group_channels, padding=padding)
            check(geometry, dtype, offset_std=offset_std)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_offset_scale(side, dtype, scale):
    check(Geometry(5, side, side, 4, 32, offset_scale=scale), dtype, offset_std=0.7)


@pytest.mark.parametrize("tiny", [0.0, 2.0**-24])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_whole_offsets(side, dtype, tiny):
    """Places on pixels, on the outermost places that do not count (-1 and the side) and on those beside them.

    And so little beside them, on either side, that a coordinate in float32 does not show it; the cell, and so the
    derivative, is another there.
    """
    geometry = Geometry(40, side, side - 1, 3, 16)
    value, offset_mask, grad = make(geometry, dtype)
    offsets = offset_mask[..., :81].unflatten(-1, (3, 27))[..., :18]
    whole = torch.randint(-side - 1, side + 2, offsets.shape, device="cuda")
    offsets.copy_(torch.where(whole == 0, torch.randint_like(whole, -1, 2) * tiny, whole) if tiny else whole)
    tensors = value, offset_mask, grad
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=torch.float64 if tiny else dtype), dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_places_that_do_not_count(side, dtype, bad):
    """They contribute nothing and have no gradient, whatever their mask."""
    geometry = Geometry(3, side, side, 3, 32)
    value, offset_mask, grad = make(geometry, dtype)
    groups = offset_mask[..., :81].unflatten(-1, (3, 27))
    groups[:, ::2, 1::2, :, 4] = bad
    groups[:, ::2, 1::2, :, 18 + 2] = float("nan")
    exact = reference(geometry, value, offset_mask, grad)
    for got, best in zip(native(geometry, value, offset_mask, grad), exact, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), best, rtol=0.02, atol=0.02 * best.abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_places_just_outside_do_not_count(side, dtype, bad):
    """The mask of a sample just off the map, or a whole pixel, reaches nothing either."""
    geometry, tensors = masks_off_the_map(side, dtype, bad)
    for got, best in zip(native(geometry, *tensors), reference(geometry, *tensors), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), best, rtol=0.02, atol=0.02 * best.abs().max().item())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_few_far_samples_among_near_ones(side, dtype):
    geometry, tensors = few_far_samples(side, dtype)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_offsets_of_zero(side, dtype, share):
    geometry, tensors = offsets_of_zero(side, dtype, share)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


@pytest.mark.parametrize("padding", [3, 4])
def test_wide_paddings(padding):
    """Outputs around a small map, whose stencils lie on it in part or not at all."""
    check(Geometry(3, 10 - 2 * padding, 10 - 2 * padding, 3, 16, padding=padding), torch.bfloat16, offset_std=0.3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_what_is_not_finite_stays_in_its_image_and_group(side, dtype):
    geometry = Geometry(3, side, side, 4, 16)
    value, offset_mask, grad = make(geometry, dtype)
    clean = native(geometry, value, offset_mask, grad)
    value[1, 2, 2, 16:32] = float("nan")
    for number, (got, before) in enumerate(zip(native(geometry, value, offset_mask, grad), clean, strict=True)):
        width = 16 if number < 2 else 27
        own = torch.zeros_like(got, dtype=torch.bool)
        own[1, ..., width : 2 * width] = True
        assert got[own].isnan().any() == (number != 1)  # the input's gradient does not depend on the input
        torch.testing.assert_close(got[~own], before[~own], rtol=0, atol=0)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("padding", [0, 8, 72])
@by_side
def test_packed(side, padding, dtype, group_channels, groups):
    """One tensor for both: the padding is not read, whatever it holds, and its gradient is 0."""
    geometry = Geometry(5, side, side - 1, groups, group_channels)
    value, offset_mask, grad = make(geometry, dtype, offset_std=0.8)
    channels = value.shape[3]
    tail = torch.full((*value.shape[:3], padding), float("nan"), device="cuda", dtype=dtype)
    packed = torch.cat([offset_mask, tail, value], -1).requires_grad_()
    output = dcnv4_packed(packed, channels=channels, groups=groups)
    (of_packed,) = torch.autograd.grad(output, packed, grad)
    expected = native(geometry, value, offset_mask, grad)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(of_packed[..., -channels:], expected[1], rtol=0, atol=0)
    numbers = 27 * groups
    torch.testing.assert_close(of_packed[..., :numbers], expected[2][..., :numbers], rtol=0, atol=0)
    assert (of_packed[..., numbers:-channels] == 0).all() and (expected[2][..., numbers:] == 0).all()


@pytest.mark.parametrize("start", [1, 4, 8])
@by_side
def test_slices_of_wider_tensors(side, start):
    """In place where 16-byte accesses fit, by a copy or the plain kernel where they do not."""
    geometry = Geometry(4, side, side, 2, 32)
    tensors = make(geometry, torch.bfloat16)
    wide = [torch.cat([t.new_full((*t.shape[:3], start), float("nan")), t, t[..., :9]], -1) for t in tensors]
    slices = [w[..., start : start + t.shape[3]] for w, t in zip(wide, tensors, strict=True)]
    check_tensors(geometry, slices, reference(geometry, *tensors, dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@by_side
def test_far_samples_are_reproducible_unasked(side, dtype):
    geometry = Geometry(600, side, side, 5, 32)
    tensors = make(geometry, dtype, offset_std=3.0)
    for first, second in zip(native(geometry, *tensors), native(geometry, *tensors), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num()) and not first.isnan().any()


@by_side
def test_one_kernel_forward_and_one_backward(side):
    geometry = Geometry(64, side, side, 8, 64)
    value, offset_mask, grad = make(geometry, torch.bfloat16, offset_std=1.0)
    value.requires_grad_()
    offset_mask.requires_grad_()
    dcnv4(value, offset_mask, groups=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(dcnv4(value, offset_mask, groups=8), (value, offset_mask), grad)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "dcngen" in event.name]
    family = {4: "small_map", 8: "medium_map"}[side]
    assert len(names) == 2 and all(family in name for name in names), names
