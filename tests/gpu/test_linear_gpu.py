"""The linear layer's kernels (compute capability 9.0) against float64 and F.linear."""

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4
from dcngen.ops import has_linear_kernel, linear, linear_layer

from .helpers import EPSILON

HALVES = [torch.float16, torch.bfloat16]
SIZES = [(128, 128), (128, 192), (128, 256), (128, 320), (128, 384), (256, 256)]  # features in and out
forward_op, backward_op = torch.ops.dcngen.linear.default, torch.ops.dcngen.linear_backward.default


@pytest.fixture(autouse=True)
def _needs_the_kernels(monkeypatch):
    monkeypatch.setattr(linear_layer, "LEAST_ROWS", 1)
    one = torch.empty(1, 128, device="cuda", dtype=torch.bfloat16)
    if not has_linear_kernel(one, one.expand(128, 128)):
        pytest.skip("the linear layer's kernels need compute capability 9.0 and code of sm_90")


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def spoil(*shape, dtype=torch.bfloat16):
    """Leaves NaN in the memory that the next tensor of this size gets."""
    torch.full(shape, float("nan"), device="cuda", dtype=dtype)


def assert_rounded(got, exact, dtype):
    """One rounding of sums in float32, of 384 products of normal values at most."""
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= EPSILON[dtype] * (exact.abs() + 0.1)).all()


def launches(run, name: str):
    """run's result, after a check that a kernel of this name ran."""
    with torch.profiler.profile() as profile:
        result = run()
        torch.cuda.synchronize()
    assert any(name in event.name for event in profile.events())
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("features, width", SIZES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000, 40001])
def test_against_float64(dtype, features, width, rows):
    """One row to several tiles a warpgroup; the last tile is whole or not."""
    input, weight = normal(rows, features, dtype=dtype), normal(width, features, dtype=dtype) / 8
    bias, grad = normal(width, dtype=dtype), normal(rows, width, dtype=dtype)
    for b in (bias, None):
        spoil(rows, width, dtype=dtype)
        exact = F.linear(input.double(), weight.double(), None if b is None else b.double())
        assert_rounded(forward_op(input, weight, b), exact, dtype)
    spoil(rows, features, dtype=dtype)
    spoil(*backward_op(grad, weight.t().contiguous())[1].shape, dtype=torch.float32)
    of_input, sums = backward_op(grad, weight.t().contiguous())
    assert_rounded(of_input, grad.double() @ weight.double(), dtype)
    exact = grad.double().sum(0)
    assert ((sums.sum(0) - exact).abs() <= 1e-6 * grad.double().abs().sum(0)).all()


def test_the_kernels_run():
    input, weight, bias = normal(1000, 128), normal(192, 128), normal(192)
    launches(lambda: linear(input, weight, bias), "linear_forward_kernel")
    launches(lambda: backward_op(normal(1000, 192), weight.t().contiguous()), "linear_backward_kernel")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("features, width", [(128, 448), (256, 128), (256, 320), (256, 512), (256, 704), (256, 768)])
@pytest.mark.parametrize("rows", [1, 65, 20001])
def test_the_forward_alone(dtype, features, width, rows):
    """Whose blocks share the columns, equally or not; the gradients are torch's."""
    input, weight = normal(rows, features, dtype=dtype), normal(width, features, dtype=dtype) / 8
    bias, grad = normal(width, dtype=dtype), normal(rows, width, dtype=dtype)
    assert has_linear_kernel(input, weight) and not has_linear_kernel(input, weight, backward=True)
    spoil(rows, width, dtype=dtype)
    parameters = input.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    output = launches(lambda: linear(*parameters), "linear_forward_kernel")
    assert_rounded(output.detach(), F.linear(*(t.detach().double() for t in parameters)), dtype)
    expected = torch.autograd.grad(F.linear(*parameters), parameters, grad)
    for got, theirs in zip(torch.autograd.grad(output, parameters, grad), expected, strict=True):
        torch.testing.assert_close(got, theirs)


@pytest.mark.parametrize("features, width", [(128, 64), (128, 160), (128, 832), (64, 128), (512, 512)])
def test_other_sizes_run_as_torch_has_them(features, width):
    input, weight, bias = normal(1000, features), normal(width, features), normal(width)
    assert not has_linear_kernel(input, weight)
    torch.testing.assert_close(linear(input, weight, bias), F.linear(input, weight, bias))
    torch.testing.assert_close(forward_op(input, weight, bias), F.linear(input, weight, bias))


def test_what_does_not_fit_is_refused():
    input, weight = normal(1000, 128), normal(192, 128)
    for bias in (normal(191), normal(192).float(), normal(192).cpu()):
        for run in (linear, forward_op):
            with pytest.raises(RuntimeError):
                run(input, weight, bias)
    with pytest.raises(RuntimeError):
        linear(input, weight.cpu())


def test_rows_are_apart():
    """NaN and infinity stay in their rows; the columns' sums see them all."""
    input, weight, grad = normal(300, 128), normal(256, 128), normal(300, 256)
    clean = forward_op(input, weight, None), backward_op(grad, weight.t().contiguous())[0]
    input[70, 5], input[299, 0] = float("nan"), float("inf")
    grad[70, 5], grad[299, 0] = float("nan"), float("inf")
    of_input, sums = backward_op(grad, weight.t().contiguous())
    rest = torch.ones(300, dtype=torch.bool, device="cuda")
    rest[[70, 299]] = False
    for got, expected in zip((forward_op(input, weight, None), of_input), clean, strict=True):
        torch.testing.assert_close(got[rest], expected[rest], rtol=0, atol=0)
        assert not got[~rest].isfinite().any()
    assert sums.sum(0).isfinite().sum() == 254


def test_views_and_shifted_tensors():
    rows = 500
    wide, shifted = normal(rows, 256), normal(rows * 128 + 1)
    weight, bias = normal(128, 192).t(), normal(400)[1:385:2]
    for input in (wide[:, 64:192], shifted[1:].view(rows, 128), wide[:, :128].unflatten(0, (5, 10, 10))):
        expected = F.linear(input.double(), weight.double(), bias.double())
        assert_rounded(linear(input, weight, bias), expected, torch.bfloat16)
    grad = normal(192, rows).t()
    assert_rounded(backward_op(grad, weight.t())[0], grad.double() @ weight.double(), torch.bfloat16)


def test_two_runs_are_equal():
    grad, weight = normal(50000, 384), normal(384, 128).t().contiguous()
    for one, two in zip(backward_op(grad, weight), backward_op(grad, weight), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_graph_replay():
    input, weight, bias = normal(30000, 128), normal(384, 128), normal(384)
    forward_op(input, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward_op(input, weight, bias)
        _, sums = backward_op(output, weight.t().contiguous())
    input.copy_(input.flip(0))
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(output, forward_op(input, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(sums.sum(0), output.double().sum(0).float(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels, group_channels", [(128, 16), (128, 32), (128, 64), (256, 32)])
def test_the_layer(compiled, channels, group_channels):
    """With its projections by these kernels, beside the layer whose projections are three calls of torch."""
    layer = DCNv4(channels, group=channels // group_channels, mask_init=0.1).cuda()
    torch.nn.init.normal_(layer.offset_mask.weight, std=0.02)
    for projection in (layer.value_proj, layer.output_proj):
        torch.nn.init.normal_(projection.bias)
    x = torch.randn(3, 24, 17, channels, device="cuda", requires_grad=True)
    grad = torch.randn(3, 24, 17, channels, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True) if compiled else layer

    def step(run):
        with torch.autocast("cuda", torch.bfloat16):
            output = run(x)
        return output, *torch.autograd.grad(output, [x, *layer.parameters()], grad)

    step(run)
    got = launches(lambda: step(run), "linear_backward_kernel")
    layer.fuse_projections = False
    for ours, theirs in zip(got, step(layer), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= 2e-2 * theirs.double().norm()


def test_a_frozen_input_and_inference():
    input, weight, bias = normal(1000, 128), normal(192, 128).requires_grad_(), normal(192).requires_grad_()
    grad = normal(1000, 192)
    ours = torch.autograd.grad(linear(input, weight, bias), (weight, bias), grad)
    for got, expected in zip(
        ours, torch.autograd.grad(F.linear(input, weight, bias), (weight, bias), grad), strict=True
    ):
        torch.testing.assert_close(got, expected)
    with torch.inference_mode():
        torch.testing.assert_close(linear(input, weight, bias), F.linear(input, weight, bias), rtol=1e-2, atol=1e-2)
