"""The reference against scalar loops over the definition, against torchvision, and its edge cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcngen.ops import dcnv4_reference, offset_mask_channels
from dcngen.ops.fallback import reference_backward
from dcngen.ops.geometry import make_geometry

GEOMETRIES = {
    "plain": dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
    "stride 2": dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1)),
    "kernel 5": dict(kernel_size=(5, 5), stride=(1, 1), padding=(2, 2), dilation=(1, 1)),
    "kernel 1": dict(kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1)),
    "even, uneven pairs": dict(kernel_size=(4, 2), stride=(2, 1), padding=(1, 3), dilation=(1, 2)),
    "dilated": dict(kernel_size=(3, 5), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("softmax", [False, True])
def test_matches_scalar_loops(name, softmax, make_inputs, naive_dcnv4):
    geometry = GEOMETRIES[name]
    input, offset_mask = make_inputs(2, 6, 7, 2, 3, **geometry)
    for scale in (1.0, 0.5, 2.0):
        ours = dcnv4_reference(input, offset_mask, **geometry, groups=2, offset_scale=scale, softmax=softmax)
        expected = naive_dcnv4(input, offset_mask, **geometry, groups=2, scale=scale, softmax=softmax)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 3)])
def test_remove_center_matches_scalar_loops(kernel_size, make_inputs, naive_dcnv4):
    geometry = dict(kernel_size=kernel_size, stride=(1, 1), padding=(1, 1), dilation=(1, 1), remove_center=True)
    input, offset_mask = make_inputs(2, 6, 5, 2, 3, **geometry)
    ours = dcnv4_reference(input, offset_mask, **geometry, groups=2)
    torch.testing.assert_close(ours, naive_dcnv4(input, offset_mask, **geometry, groups=2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "kernel_size,stride,padding,dilation,size",
    [(3, 1, 1, 1, (6, 7)), (3, 2, 1, 1, (9, 8)), (5, 1, 2, 1, (7, 7)), (3, 1, 2, 2, (7, 5)), (2, 1, 1, 1, (5, 6))],
)
def test_matches_torchvision(kernel_size, stride, padding, dilation, size, scale, make_inputs):
    """deform_conv2d with a depthwise weight of ones: row-major taps, (y, x) order, no scale of the grid."""
    torchvision_ops = pytest.importorskip("torchvision.ops", reason="the oracle is torchvision's deform_conv2d")
    groups, depth, taps = 3, 4, kernel_size**2
    geometry = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    input, offset_mask = make_inputs(2, *size, groups, depth, **geometry)
    input.requires_grad_()
    offset_mask.requires_grad_()
    ours = dcnv4_reference(input, offset_mask, **geometry, groups=groups, offset_scale=scale)

    parts = offset_mask[..., : 3 * groups * taps].unflatten(-1, (groups, 3 * taps))
    by_tap = torch.arange(taps).view(kernel_size, kernel_size).T.flatten()  # row-major tap -> ours (width outer)
    xy = parts[..., : 2 * taps].unflatten(-1, (taps, 2))[..., by_tap, :]
    center = (dilation * (kernel_size - 1)) >> 1
    row, column = torch.meshgrid(torch.arange(kernel_size), torch.arange(kernel_size), indexing="ij")
    to_center = center - dilation * torch.stack([column.flatten(), row.flatten()], -1)
    xy = scale * xy + (1 - scale) * to_center
    masks = parts[..., 2 * taps :][..., by_tap]
    theirs = torchvision_ops.deform_conv2d(
        input.permute(0, 3, 1, 2),
        xy.flip(-1).flatten(-3).permute(0, 3, 1, 2),
        torch.ones(groups * depth, 1, kernel_size, kernel_size, dtype=input.dtype),
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=masks.flatten(-2).permute(0, 3, 1, 2),
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    grad = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(ours, (input, offset_mask), grad)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, (input, offset_mask), grad), rtol=1e-9, atol=1e-9)


def test_first_and_second_derivatives(make_inputs):
    geometry = dict(kernel_size=(2, 1), padding=(1, 0))
    input, offset_mask = make_inputs(1, 2, 2, 2, 1, spread=0.7, **geometry)
    inputs = input.requires_grad_(), offset_mask.requires_grad_()

    def function(a, b):
        return dcnv4_reference(a, b, **geometry, groups=2, offset_scale=0.5, softmax=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_formulas_of_the_gradients_match_autograd(data):
    """fallback.py writes the derivatives out; autograd derives them from the reference."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, groups = (draw(1, 3), draw(1, 3)), draw(1, 3)
    remove_center = data.draw(st.booleans()) and all(k % 2 for k in kernel) and kernel != (1, 1)
    geometry = make_geometry(
        kernel, (draw(1, 2), draw(1, 2)), (1, 1), (draw(1, 2), 1), groups, 0.5, remove_center, data.draw(st.booleans())
    )
    height, width = draw(3, 6), draw(3, 6)
    height_out, width_out = geometry.output_size(height, width)
    generator = torch.Generator().manual_seed(draw(0, 10**6))
    channels = offset_mask_channels(groups, kernel, remove_center)
    input = torch.randn(draw(0, 2), height, width, groups * draw(1, 4), dtype=torch.float64, generator=generator)
    offset_mask = torch.randn(
        input.shape[0], height_out, width_out, channels, dtype=torch.float64, generator=generator
    ).mul_(3.0)
    input.requires_grad_()
    offset_mask.requires_grad_()
    output = dcnv4_reference(input, offset_mask, **geometry._asdict())
    grad = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    expected = torch.autograd.grad(output, (input, offset_mask), grad)
    torch.testing.assert_close(reference_backward(grad, input, offset_mask, geometry), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_a_place_that_does_not_count_leaves_no_trace(bad, make_inputs):
    """Its tap is as if its mask were 0, in the output and in every gradient, even where the mask itself is NaN."""
    input, offset_mask = make_inputs(1, 4, 4, 1, 2, spread=0.3)
    broken, silent = offset_mask.clone(), offset_mask.clone()
    broken[0, 1, 1, 8] = bad  # x of tap 4
    broken[0, 1, 1, 18 + 4] = float("nan")
    silent[0, 1, 1, 18 + 4] = 0
    results = []
    for values in (broken, silent):
        x, om = input.clone().requires_grad_(), values.requires_grad_()
        output = dcnv4_reference(x, om, groups=1)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, om))))
    assert all(torch.isfinite(t).all() for t in results[0])
    assert results[0][2][0, 1, 1, 18 + 4] == 0  # but the silent mask does have a gradient: the place counts there
    results[1][2][0, 1, 1, 18 + 4] = 0
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_boundary_is_strict():
    """At exactly -1 and W a place does not count; just inside, the corner in the image weighs in."""
    input = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for x, expected in ((-1.0, 0.0), (-0.75, 0.25), (0.0, 1.0), (0.75, 0.25), (1.0, 0.0)):
        offset_mask = torch.tensor([x, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 3)
        output = dcnv4_reference(input, offset_mask, kernel_size=1, padding=0, groups=1)
        assert output.item() == expected, x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once(dtype, make_inputs):
    input, offset_mask = make_inputs(2, 5, 5, 2, 8, dtype=dtype)
    output = dcnv4_reference(input, offset_mask, groups=2)
    wide = dcnv4_reference(input.float(), offset_mask.float(), groups=2)
    assert output.dtype == dtype
    torch.testing.assert_close(output, wide.to(dtype), rtol=0, atol=0)


def test_empty_batch_and_single_pixel(make_inputs, naive_dcnv4):
    input, offset_mask = make_inputs(0, 5, 4, 2, 3)
    input.requires_grad_()
    output = dcnv4_reference(input, offset_mask, groups=2)
    output.sum().backward()
    assert output.shape == (0, 5, 4, 6) and input.grad.shape == input.shape
    geometry = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    input, offset_mask = make_inputs(2, 1, 1, 1, 1)
    torch.testing.assert_close(
        dcnv4_reference(input, offset_mask, groups=1), naive_dcnv4(input, offset_mask, **geometry, groups=1)
    )


@pytest.mark.parametrize(
    "groups,kernel,remove,expected", [(4, 3, False, 112), (1, 3, False, 32), (2, (5, 3), True, 88)]
)
def test_offset_mask_channels(groups, kernel, remove, expected):
    assert offset_mask_channels(groups, kernel, remove) == expected


def test_padding_of_offset_mask_is_not_read_and_gets_no_gradient(make_inputs):
    input, offset_mask = make_inputs(1, 3, 3, 1, 2)
    poisoned = offset_mask.clone()
    poisoned[..., 27:] = float("nan")
    poisoned.requires_grad_()
    output = dcnv4_reference(input, poisoned, groups=1)
    torch.testing.assert_close(output, dcnv4_reference(input, offset_mask[..., :27], groups=1), rtol=0, atol=0)
    output.sum().backward()
    assert not poisoned.grad[..., 27:].any() and torch.isfinite(poisoned.grad).all()
