"""The operator and the product after it in one kernel (compute capability 9.0) against float64 and the two calls."""

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4
from dcngen.ops import dcnv4_packed, dcnv4_packed_linear, launch, native, projected

from .helpers import EPSILON, Geometry, make, reference

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _needs_the_kernel(monkeypatch):
    if not launch.has_projected_kernel(native.cuda_library(), torch.cuda.current_device()):
        pytest.skip("the projected kernel needs compute capability 9.0 and code of sm_90")
    monkeypatch.setattr(projected, "LEAST_PIXELS", 0)


def inputs(geometry: Geometry, dtype: torch.dtype, *, offset_std: float = 0.2, bias: bool = True):
    """packed, weight, bias and a gradient; the padding of packed is NaN."""
    value, offset_mask, grad = make(geometry, dtype, offset_std=offset_std)
    channels = geometry.groups * geometry.group_channels
    weight = (torch.randn(channels, channels, device="cuda") / channels**0.5).to(dtype)
    return (
        torch.cat([offset_mask, value], -1),
        weight,
        torch.randn(channels, device="cuda").to(dtype) if bias else None,
        grad,
    )


def call(geometry: Geometry, packed, weight, bias, save_output: bool):
    """(result, output) of the kernel; the memory that it gets holds NaN."""
    channels = geometry.groups * geometry.group_channels
    for _ in range(2):
        torch.full((*packed.shape[:3], channels), float("nan"), device="cuda", dtype=packed.dtype)
    parts = packed[..., -channels:], packed[..., :-channels]
    scalars = (3, 3, 1, 1, 1, 1, 1, 1, geometry.groups, geometry.offset_scale, False, False)
    plan, *_ = launch.prepare(*parts, None, scalars)
    assert launch._projects(native.cuda_library(), plan, *parts, weight, bias)
    return launch.forward_projected(*parts, weight, bias, save_output, scalars)


def assert_near(got, expected, tolerance: float = 1e-2) -> None:
    """In the norm: where few samples are far, the two ways round other weights."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got.double() - expected.double()).norm().item()
    assert error <= tolerance * expected.double().norm().item() + 1e-6, error


def uses_the_kernel(run):
    """run's result, after a check that the kernel computed it."""
    with torch.profiler.profile() as profile:
        result = run()
        torch.cuda.synchronize()
    assert any("forward_projected" in event.name for event in profile.events())
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group_channels", [32, 64])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 8, 8), (3, 7, 9), (5, 13, 21), (2, 1, 30), (40, 24, 17)])
@pytest.mark.parametrize("offset_std", [0.1, 0.3, 0.45, 1, 8])
def test_against_float64(dtype, group_channels, size, offset_std):
    """Deviations of 0.3 and 0.45 have few far samples, 1 and 8 many: all three ways through the kernel, mixed."""
    geometry = Geometry(*size, 128 // group_channels, group_channels)
    packed, weight, bias, grad = inputs(geometry, dtype, offset_std=offset_std)
    exact = reference(geometry, packed[..., -128:], packed[..., :-128], grad)[0].detach()
    with_output, output = call(geometry, packed, weight, bias, True)
    alone, nothing = call(geometry, packed, weight, bias, False)
    assert nothing.numel() == 0
    torch.testing.assert_close(alone, with_output, rtol=0, atol=0)
    separate = dcnv4_packed(packed, channels=128, groups=geometry.groups)
    error, allowed = ((t.double() - exact).norm() for t in (output, separate))
    assert error <= 1.3 * allowed + EPSILON[dtype] / 8 * exact.norm()
    expected = F.linear(output.double(), weight.double(), bias.double())
    assert ((with_output.double() - expected).abs() <= EPSILON[dtype] * (expected.abs() + 1)).all()


def test_places_that_do_not_count():
    geometry = Geometry(3, 9, 10, 4, 32)
    packed, weight, _, _ = inputs(geometry, torch.bfloat16)
    offset_mask = packed[..., : 27 * 4]
    offset_mask[0, 2:5, :, 3] = float("nan")
    offset_mask[1, :, 4, 0:18:2] = float("inf")
    offset_mask[2, 0, 0, 31] = -1e30
    result, output = call(geometry, packed, weight, None, True)
    assert_near(output, dcnv4_packed(packed, channels=128, groups=geometry.groups))
    assert_near(result, F.linear(output, weight))


@pytest.mark.parametrize("scale", [0.5, 1.7, -1.0, 3.0])
def test_offset_scale(scale):
    geometry = Geometry(2, 12, 11, 2, 64, offset_scale=scale)
    packed, weight, bias, _ = inputs(geometry, torch.bfloat16)
    _, output = call(geometry, packed, weight, bias, True)
    assert_near(output, dcnv4_packed(packed, channels=128, groups=2, offset_scale=scale))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(compiled, bias):
    geometry = Geometry(3, 16, 13, 4, 32)
    tensors = inputs(geometry, torch.bfloat16, bias=bias)
    wanted = [t.requires_grad_() for t in tensors[:3] if t is not None]

    def together(packed, weight, bias):
        return dcnv4_packed_linear(packed, weight, bias, channels=128, groups=4)

    def separate(packed, weight, bias):
        return F.linear(dcnv4_packed(packed, channels=128, groups=4), weight, bias)

    torch._dynamo.reset()
    run = torch.compile(together, fullgraph=True) if compiled else together
    expected = separate(*tensors[:3])
    of_expected = torch.autograd.grad(expected, wanted, tensors[3])
    for result in (run(*tensors[:3]), uses_the_kernel(lambda: run(*tensors[:3]))):
        assert_near(result, expected)
        for ours, theirs in zip(torch.autograd.grad(result, wanted, tensors[3]), of_expected, strict=True):
            assert_near(ours, theirs)


def test_what_does_not_fit_runs_as_two_calls():
    geometry = Geometry(2, 8, 9, 2, 64)
    packed, weight, bias, _ = inputs(geometry, torch.bfloat16)
    shifted = torch.empty(packed.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view_as(packed).copy_(packed)
    expected = F.linear(dcnv4_packed(packed, channels=128, groups=2), weight, bias)
    for tensors in ((shifted, weight, bias), (packed, weight.t().contiguous().t(), bias)):
        assert_near(dcnv4_packed_linear(*tensors, channels=128, groups=2), expected)
    half = dcnv4_packed_linear(packed, weight[:64].contiguous(), bias[:64], channels=128, groups=2)
    assert_near(half, expected[..., :64])


def test_graph_replay_and_many_tiles():
    """More tiles than warpgroups on the device, with few far samples in some; replayed on other values."""
    geometry = Geometry(9, 64, 70, 2, 64)
    packed, weight, bias, _ = inputs(geometry, torch.bfloat16, offset_std=0.25)
    run = torch.no_grad()(lambda: dcnv4_packed_linear(packed, weight, bias, channels=128, groups=2))
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    packed.copy_(packed.flip(0))
    for _ in range(3):
        graph.replay()
    expected = F.linear(dcnv4_packed(packed, channels=128, groups=2), weight, bias)
    assert_near(result, expected)


def test_the_layer_uses_it_under_autocast_and_compile():
    layer = DCNv4(128, group=2, mask_init=0.1).cuda()
    x = torch.randn(2, 16, 16, 128, device="cuda", requires_grad=True)
    grad = torch.randn(2, 16, 16, 128, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)

    def step(run):
        with torch.autocast("cuda", torch.bfloat16):
            output = run(x)
        return output, *torch.autograd.grad(output, [x, *layer.parameters()], grad)

    results = [step(layer), step(compiled), *(uses_the_kernel(lambda run=run: step(run)) for run in (layer, compiled))]
    layer.fuse_projections = False
    for got in results:
        for ours, theirs in zip(got, step(layer), strict=True):
            assert_near(ours, theirs, 2e-2)
