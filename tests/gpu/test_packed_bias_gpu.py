"""The gradient of packed_bias: the packed gradient summed over all pixels, by the backward where it has the sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4
from dcngen.ops import dcnv4_packed, dcnv4_packed_linear, projected
from gpu.helpers import DTYPES, Geometry, assert_sums, has_window_backward, make, needs_window_backward

# From one unit of 8x4 pixels to some thousand; with offsets of deviation 0.3 some have far samples and others none.
SIZES = [(1, 1, 1), (2, 13, 21), (43, 7, 9), (50, 13, 21), (44, 8, 8), (400, 6, 5), (45, 1, 17)]


def packed_case(geometry: Geometry, dtype: torch.dtype, offset_std: float):
    """packed, a bias that it is said to contain, grad_output, and the two tensors that packed is made of."""
    value, offset_mask, grad = make(geometry, dtype, offset_std=offset_std)
    used = 3 * geometry.groups * geometry.taps
    tail = torch.full((*value.shape[:3], -(value.shape[3] + used) % 16), float("nan"), device="cuda", dtype=dtype)
    offset_mask = offset_mask[..., :used]
    packed = torch.cat([offset_mask, tail, value], -1)
    return packed.requires_grad_(), packed[0, 0, 0].detach().clone().requires_grad_(), grad, value, offset_mask


@pytest.mark.parametrize("offset_std", [0.2, 0.3, 1.0, 8.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_all_pixels(dtype, group_channels, size, offset_std):
    geometry = Geometry(*size, 3, group_channels)
    packed, bias, grad, *parts = packed_case(geometry, dtype, offset_std)
    output = dcnv4_packed(packed, bias, channels=3 * group_channels, **geometry.options)
    of_packed, got = torch.autograd.grad(output, (packed, bias), grad)
    without = dcnv4_packed(packed, channels=3 * group_channels, **geometry.options)
    torch.testing.assert_close(output, without, rtol=0, atol=0)
    if offset_std < 0.3 and has_window_backward():  # the other kernel writes the same gradients; elsewhere atomics do
        torch.testing.assert_close(of_packed, torch.autograd.grad(without, packed, grad)[0], rtol=0, atol=0)
    assert_sums(geometry, got, *parts, grad, dtype)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offset_scale(dtype, scale):
    geometry = Geometry(64, 13, 21, 2, 32, offset_scale=scale)
    packed, bias, grad, *parts = packed_case(geometry, dtype, 0.3)
    output = dcnv4_packed(packed, bias, channels=64, **geometry.options)
    assert_sums(geometry, torch.autograd.grad(output, bias, grad)[0], *parts, grad, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_places_that_do_not_count(bad):
    geometry = Geometry(32, 9, 17, 4, 16)
    packed, bias, grad, value, offset_mask = packed_case(geometry, torch.bfloat16, 0.3)
    offset_mask[:, ::3, ::2, ::5] = bad
    offset_mask.unflatten(-1, (4, 27))[..., 18:].nan_to_num_(1.0, 1.0, 1.0)
    with torch.no_grad():
        packed[..., : offset_mask.shape[3]] = offset_mask
    got = torch.autograd.grad(dcnv4_packed(packed, bias, channels=64, **geometry.options), bias, grad)[0]
    assert_sums(geometry, got, value, offset_mask, grad, torch.bfloat16)


@pytest.mark.parametrize("offset_std", [0.2, 1.0])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
def test_sums_are_reproducible(offset_std, group_channels):
    """With far samples, too, although the input gradient itself then is not."""
    needs_window_backward()
    geometry = Geometry(33, 20, 28, 4, group_channels)
    channels = 4 * group_channels
    packed, bias, grad, *_ = packed_case(geometry, torch.bfloat16, offset_std)
    first, second = (
        torch.autograd.grad(dcnv4_packed(packed, bias, channels=channels, **geometry.options), bias, grad)[0]
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_no_pass_over_the_gradient():
    needs_window_backward()
    geometry = Geometry(16, 32, 32, 8, 32)
    packed, bias, grad, *_ = packed_case(geometry, torch.bfloat16, 0.2)
    output = dcnv4_packed(packed, bias, channels=256, **geometry.options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(output, (packed, bias), grad)
    assert not [event for event in profile.events() if event.name == "aten::sum"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_layer_has_the_gradients_of_separate_projections(monkeypatch, autocast, compiled):
    monkeypatch.setattr(projected, "LEAST_PIXELS", 0)
    torch.manual_seed(0)
    layer = DCNv4(128, group=4, mask_init=1 / 9).cuda()
    with torch.no_grad():
        layer.offset_mask.weight.normal_(std=0.02)
    x, grad = torch.randn(2, 32, 16, 24, 128, device="cuda").unbind()

    def gradients(fuse: bool) -> list[torch.Tensor]:
        layer.fuse_projections = fuse
        torch._dynamo.reset()
        run = torch.compile(layer, fullgraph=True) if compiled and fuse else layer
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = run(x)
        return torch.autograd.grad(output, list(layer.parameters()), grad.to(output.dtype))

    for (name, _), got, expected in zip(layer.named_parameters(), gradients(True), gradients(False), strict=True):
        limit = (0.02 if autocast else 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(
            got, expected, rtol=0.02 if autocast else 1e-3, atol=limit, msg=lambda m, n=name: n + m
        )


def test_with_the_product_after_it(monkeypatch):
    monkeypatch.setattr(projected, "LEAST_PIXELS", 0)
    geometry = Geometry(32, 16, 24, 4, 32)
    packed, bias, grad, *parts = packed_case(geometry, torch.float16, 0.3)
    weight = torch.eye(128, device="cuda", dtype=torch.float16)
    output = dcnv4_packed_linear(packed, weight, None, bias, channels=128, groups=4)
    torch.testing.assert_close(output, F.linear(dcnv4_packed(packed, channels=128, groups=4), weight))
    assert_sums(geometry, torch.autograd.grad(output, bias, grad)[0], *parts, grad, torch.float16)


@pytest.mark.parametrize("offset_std", [0.2, 1.0])
@pytest.mark.parametrize(("images", "side"), [(16, 64), (1024, 8)])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
def test_peak_memory_is_inputs_outputs_and_gradients(group_channels, images, side, offset_std):
    """And 5 % of them, with the sums: the rows that the units leave of them are part of that."""
    needs_window_backward()
    geometry = Geometry(images, side, side, 128 // group_channels, group_channels)
    packed, bias, grad, *parts = packed_case(geometry, torch.bfloat16, offset_std)
    del parts
    dcnv4_packed(packed, bias, channels=128, **geometry.options).backward(grad)
    packed.grad = bias.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dcnv4_packed(packed, bias, channels=128, **geometry.options).backward(grad)
    torch.cuda.synchronize()
    size = sum(t.numel() * t.element_size() for t in (packed, grad))
    share = (torch.cuda.max_memory_allocated() - before - size) / (2 * size)
    print(f"{side}x{side}, D = {group_channels}, deviation {offset_std}: {share:.2%} beside inputs, output, gradients")
    assert share <= 0.05
