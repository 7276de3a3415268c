"""The CUDA operator against the float64 reference: every dtype, usual and adversarial shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcngen.ops import dcnv4_packed
from gpu.helpers import (
    DTYPES,
    Geometry,
    assert_close,
    check,
    check_tensors,
    copies_that_are_many,
    make,
    native,
    needs_window_backward,
    reference,
    reproducible,
    storage_dtype_formula,
)

# The first stages and U-Net levels at which the speed is measured, at smaller batches, then what breaks kernels.
BENCHMARK_SHAPES = [
    Geometry(8, 56, 56, 4, 32), Geometry(8, 28, 28, 8, 32), Geometry(8, 14, 14, 16, 32), Geometry(8, 7, 7, 32, 32),
    Geometry(8, 14, 14, 24, 32), Geometry(1, 200, 320, 4, 32), Geometry(1, 100, 160, 8, 32),
    Geometry(8, 32, 32, 16, 16), Geometry(8, 16, 16, 32, 16), Geometry(8, 8, 8, 64, 16), Geometry(8, 32, 32, 4, 64),
]  # fmt: skip
ODD_SHAPES = [
    Geometry(4, 7, 7, 8, 16), Geometry(3, 13, 9, 2, 32), Geometry(2, 1, 1, 2, 32), Geometry(5, 1, 17, 1, 64),
    Geometry(2, 17, 1, 3, 16), Geometry(1, 5, 5, 5, 32), Geometry(7, 3, 2, 1, 16), Geometry(2, 33, 31, 3, 32),
]  # fmt: skip
GEOMETRIES = [
    Geometry(2, 13, 9, 4, 16, stride=2), Geometry(2, 12, 11, 2, 32, kernel_size=5, padding=2),
    Geometry(2, 9, 9, 2, 16, kernel_size=(3, 5), padding=1), Geometry(1, 9, 8, 2, 16, kernel_size=1, padding=0),
    Geometry(2, 10, 10, 2, 32, dilation=2, padding=2), Geometry(2, 10, 10, 2, 32, padding=0),
    Geometry(2, 9, 9, 2, 32, padding=2), Geometry(2, 9, 9, 4, 16, remove_center=True),
    Geometry(2, 9, 9, 4, 16, softmax=True), Geometry(2, 9, 9, 4, 16, offset_scale=0.5),
    Geometry(2, 9, 9, 4, 32, offset_scale=2.0), Geometry(1, 15, 15, 2, 32, kernel_size=7, padding=3),
    Geometry(1, 40, 40, 20, 64), Geometry(1, 6, 6, 40, 32),
]  # fmt: skip


def _name(geometry: Geometry) -> str:
    g = geometry
    extras = [f"k{g.kernel}"] if g.kernel != (3, 3) else []
    extras += [f"{k}{getattr(g, k)}" for k in ("stride", "padding", "dilation", "offset_scale") if getattr(g, k) != 1]
    extras += [k for k in ("remove_center", "softmax") if getattr(g, k)]
    return "-".join([f"{g.batch}x{g.height}x{g.width}x{g.groups}x{g.group_channels}", *extras])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [*BENCHMARK_SHAPES, *ODD_SHAPES, *GEOMETRIES], ids=_name)
def test_matches_the_reference(geometry, dtype):
    check(geometry, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_channels", [1, 3, 8, 16, 24, 48, 64, 96, 128])
def test_any_group_width(group_channels, dtype):
    check(Geometry(2, 11, 10, 3, group_channels), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset_std", [0.0, 1.0, 3.0, 8.0, 100.0])
def test_any_share_of_far_samples(offset_std, dtype):
    check(Geometry(2, 20, 19, 4, 32), dtype, offset_std=offset_std)
    check(Geometry(2, 9, 12, 4, 16), dtype, offset_std=offset_std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset_std", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "geometry",
    [Geometry(3, 7, 7, 3, 64), Geometry(2, 8, 8, 3, 16), Geometry(2, 14, 14, 3, 32), Geometry(2, 16, 9, 2, 64),
     Geometry(2, 8, 8, 3, 32, padding=2),
     Geometry(1, 400, 400, 5, 32), Geometry(1, 400, 400, 2, 64)],
    ids=_name,
)  # fmt: skip
def test_far_samples_in_windows(geometry, offset_std, dtype):
    """Whole small maps, and maps large enough for windows around their outputs; with and without a fixed order.

    The half types add far samples to the input gradient in the storage type, so that is whom they are compared with.
    """
    tensors = make(geometry, dtype, offset_std=offset_std)
    plain = storage_dtype_formula(geometry, *tensors)
    check_tensors(geometry, tensors, plain, dtype)
    if geometry.height < 20:
        with reproducible():
            check_tensors(geometry, tensors, plain, dtype)


@st.composite
def geometries(draw):
    """Small problems of every kind; None where the window does not fit the map."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    kernel, stride, dilation = (one_of(3, 3, 1, 2, 5), one_of(3, 3, 1, 2, 5)), one_of(1, 1, 2), one_of(1, 1, 2)
    padding, height, width = one_of(1, 1, 0, 2, 3), one_of(1, 4, 7, 8, 9, 16, 19), one_of(1, 4, 7, 8, 9, 16, 19)
    if min(side + 2 * padding - dilation * (k - 1) for side, k in zip((height, width), kernel, strict=True)) < 1:
        return None
    return Geometry(
        one_of(1, 2, 3), height, width, one_of(1, 2, 3, 5), one_of(16, 32, 64, 8, 24, 3, 1),
        kernel, stride, padding, dilation,
        offset_scale=one_of(1.0, 1.0, 0.5, 2.0), softmax=one_of(False, False, True),
    )  # fmt: skip


# Derandomized: a float32 place that rounds onto a whole coordinate takes the other side's derivative.
@settings(max_examples=150, deadline=None, derandomize=True)
@given(geometries(), st.sampled_from(DTYPES), st.sampled_from([0.1, 0.4, 1.0, 5.0]), st.integers(0, 2))
def test_any_geometry(geometry, dtype, offset_std, seed):
    if geometry is not None:
        check(geometry, dtype, offset_std=offset_std, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(geometry=geometries(), offset_std=st.sampled_from([0.1, 0.4, 1.0, 5.0]), seed=st.integers(0, 2))
def test_error_beside_the_formula_in_the_same_dtype(dtype, geometry, offset_std, seed):
    """At most twice the error of plain torch that keeps values, weights and sums in the storage dtype."""
    if geometry is None:
        return
    tensors = make(geometry, dtype, offset_std=offset_std, seed=seed)
    check_tensors(geometry, tensors, storage_dtype_formula(geometry, *tensors), dtype, units=0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_far_sample(dtype):
    geometry = Geometry(2, 16, 24, 2, 32)
    value, offset_mask, grad = make(geometry, dtype)
    offset_mask[1, 9, 13, 27 + 6] = 5.25
    tensors = (value, offset_mask, grad)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_pixel_offsets_follow_the_floor_convention(dtype):
    geometry = Geometry(2, 9, 13, 2, 32)
    value, offset_mask, grad = make(geometry, dtype)
    whole = torch.randint(-2, 3, offset_mask[..., :54].shape, device="cuda").to(dtype)
    for group in range(2):
        offset_mask[..., 27 * group : 27 * group + 18] = whole[..., 18 * group : 18 * group + 18]
    tensors = (value, offset_mask, grad)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 6e4])
def test_places_that_do_not_count(bad, dtype):
    geometry = Geometry(2, 9, 10, 2, 32)
    value, offset_mask, grad = make(geometry, dtype)
    offset_mask[0, 3, 4, 2] = bad
    offset_mask[1, 8, 9, 27 + 5] = bad
    tensors = (value, offset_mask, grad)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


@pytest.mark.parametrize("many", [False, True], ids=["small problem", "many images"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_wider_tensors(dtype, many):
    geometry = Geometry(3, 10, 12, 4, 32)
    if many:
        geometry = replace(geometry, batch=3 * copies_that_are_many(geometry))
    value, offset_mask, grad = make(geometry, dtype)
    wide = torch.randn(*value.shape[:3], 128 + offset_mask.shape[-1] + 8, device="cuda", dtype=dtype)
    wide[..., :128], wide[..., 128:-8] = value, offset_mask
    with reproducible():
        whole = native(geometry, value, offset_mask, grad)
        sliced = native(geometry, wide[..., :128], wide[..., 128:-8], grad)
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    tensors = (value, offset_mask, grad)
    exact, plain = (reference(geometry, *tensors, dtype=d) for d in (torch.float64, dtype))
    assert_close(geometry, native(geometry, wide[..., :128], wide[..., 128:-8], grad), exact, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_whose_pixels_no_vector_access_fits(dtype):
    geometry = Geometry(3, 10, 12, 4, 32)
    value, offset_mask, grad = make(geometry, dtype)
    odd = torch.randn(3, 10, 12, 131, device="cuda", dtype=dtype)
    odd[..., 3:] = value
    sliced, whole = (native(geometry, v, offset_mask, grad)[0] for v in (odd[..., 3:], value))
    torch.testing.assert_close(sliced.float(), whole.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_begin_between_sixteen_bytes(dtype):
    geometry = Geometry(2, 9, 10, 2, 32)
    tensors = make(geometry, dtype)
    shifted = []
    for tensor in tensors:
        wide = torch.zeros(*tensor.shape[:3], tensor.shape[3] + 8, device="cuda", dtype=dtype)
        wide[..., 1:-7] = tensor
        shifted.append(wide[..., 1:-7])
    exact, plain = reference(geometry, *tensors), reference(geometry, *tensors, dtype=dtype)
    assert_close(geometry, native(geometry, *shifted), exact, plain, dtype)


@pytest.mark.parametrize("padding", [0, 4, 10, 20, 84, 150], ids="padding {}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_tensors(dtype, padding):
    """With paddings of 4, 20, 84 a pixel is whole pieces of 16 bytes in every dtype: gradients are written in place."""
    geometry = Geometry(2, 9, 13, 4, 32)
    value, offset_mask, grad = make(geometry, dtype, offset_std=0.2)
    used = 3 * geometry.groups * geometry.taps
    tail = torch.full((*value.shape[:3], padding), float("nan"), device="cuda", dtype=dtype)
    packed = torch.cat([offset_mask[..., :used], tail, value], -1).requires_grad_()
    output = dcnv4_packed(packed, channels=128, **geometry.options)
    (gradient,) = torch.autograd.grad(output, packed, grad)
    of_value, of_offset_mask = gradient[..., -128:], gradient[..., :used]
    exact, plain = (reference(geometry, value, offset_mask, grad, dtype=t) for t in (torch.float64, dtype))
    exact, plain = ((*parts[:2], parts[2][..., :used]) for parts in (exact, plain))
    assert_close(geometry, (output, of_value, of_offset_mask), exact, plain, dtype)
    assert (gradient[..., used:-128] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_that_are_not_channels_last(dtype):
    geometry = Geometry(2, 8, 9, 2, 32)
    value, offset_mask, grad = make(geometry, dtype)
    scrambled = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    with reproducible():
        dense, copied = native(geometry, value, offset_mask, grad), native(geometry, scrambled, offset_mask, grad)
    for a, b in zip(dense, copied, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_batch(dtype):
    geometry = Geometry(0, 8, 9, 2, 32)
    assert [t.numel() for t in native(geometry, *make(geometry, dtype))] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements(dtype):
    geometry = Geometry(8, 1024, 1024, 8, 40)  # 2.7e9 elements of input
    value = torch.randn(8, 1024, 1024, 320, device="cuda", dtype=dtype)
    offset_mask = torch.zeros(8, 1024, 1024, 216, device="cuda", dtype=dtype)
    offset_mask[-1] = torch.rand(1024, 1024, 216, device="cuda").to(dtype)
    with torch.no_grad():
        from dcngen.ops import dcnv4

        last = dcnv4(value, offset_mask, **geometry.options)[-1, -16:]
        expected = dcnv4_tail(value, offset_mask, geometry)
    torch.testing.assert_close(last.double(), expected, rtol=0.02, atol=0.15)


def dcnv4_tail(value, offset_mask, geometry):
    """The last 16 rows of the last image from the reference on the 40 rows they can reach."""
    from dcngen.ops import dcnv4_reference

    value, offset_mask = value[-1:, -40:].double(), offset_mask[-1:, -40:].double()
    return dcnv4_reference(value, offset_mask, **geometry.options)[0, -16:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [Geometry(4, 32, 32, 8, 32), Geometry(4, 7, 7, 8, 16)], ids=_name)
def test_backward_is_reproducible_within_the_window(geometry, dtype):
    needs_window_backward()
    value, offset_mask, grad = make(geometry, dtype)
    offsets = offset_mask[..., : 27 * geometry.groups].unflatten(-1, (geometry.groups, 27))[..., :18]
    offsets.clamp_(-0.99, 0.99)
    first = native(geometry, value, offset_mask, grad)
    for _ in range(3):
        for a, b in zip(first, native(geometry, value, offset_mask, grad), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms_hold_for_far_samples(dtype):
    geometry = Geometry(2, 12, 12, 4, 32)
    tensors = make(geometry, dtype, offset_std=3.0)
    with reproducible():
        first = native(geometry, *tensors)
        for _ in range(3):
            for a, b in zip(first, native(geometry, *tensors), strict=True):
                assert torch.equal(a, b)
    assert_close(geometry, first, reference(geometry, *tensors), reference(geometry, *tensors, dtype=dtype), dtype)
