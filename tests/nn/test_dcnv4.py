"""The DCNv4 module against its formula, the released keys and initialisation, and convolutions that it must equal."""

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4
from dcngen.nn.dcnv4 import _padded_width
from dcngen.ops import dcnv4_reference, offset_mask_channels

PROJECTIONS = ["value_proj.weight", "value_proj.bias", "output_proj.weight", "output_proj.bias"]
OFFSET_MASK = ["offset_mask.weight", "offset_mask.bias"]


@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, PROJECTIONS + OFFSET_MASK),
        ({"output_bias": False}, PROJECTIONS[:3] + OFFSET_MASK),
        ({"without_pointwise": True}, OFFSET_MASK),
        ({"dw_kernel_size": 3}, [*PROJECTIONS, *OFFSET_MASK, "offset_mask_dw.weight", "offset_mask_dw.bias"]),
        (
            {"center_feature_scale": True},
            [*PROJECTIONS, *OFFSET_MASK, "center_feature_scale_proj_weight", "center_feature_scale_proj_bias"],
        ),
    ],
)
def test_state_dict_keys_are_the_released_ones(options, keys):
    module = DCNv4(channels=64, **options)
    assert sorted(module.state_dict()) == sorted(keys)
    assert module.offset_mask.weight.shape == (112, 64)  # 3 * 9 taps * 4 groups = 108, to a multiple of 8
    if options.get("center_feature_scale"):
        assert module.center_feature_scale_proj_weight.shape == (4, 64)


def test_released_initialisation_gives_zero_and_teaches_masks_alone():
    module = DCNv4(channels=16, group=2)
    output = module(torch.randn(2, 5, 4, 16))
    assert torch.equal(output, torch.zeros_like(output))
    output.sum().backward()
    learning = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {"offset_mask.weight", "offset_mask.bias", "output_proj.bias"}
    rows = module.offset_mask.bias.grad[:54].view(2, 27)
    assert torch.all(rows[:, :18] == 0) and torch.all(rows[:, 18:] != 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_uniform_masks_are_a_mean_over_the_window(stride):
    module = DCNv4(channels=16, group=2, stride=stride, mask_init=1 / 9)
    x = torch.randn(2, 7, 6, 16)
    value = module.value_proj(x).permute(0, 3, 1, 2)
    expected = module.output_proj(F.avg_pool2d(value, 3, stride, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_middle_mask_of_one_is_the_identity(kernel_size):
    module = DCNv4(16, kernel_size, pad=kernel_size // 2, group=2, center_mask_init=1.0)
    x = torch.randn(2, 5, 4, 16)
    torch.testing.assert_close(module(x), module.output_proj(module.value_proj(x)))
    assert not module.starts_at_zero() and DCNv4().starts_at_zero()


def test_masks_without_offsets_are_a_depthwise_convolution():
    module = DCNv4(channels=8, group=4, without_pointwise=True)
    masks = torch.randn(4, 9)
    with torch.no_grad():
        module.offset_mask.bias[:108].view(4, 27)[:, 18:] = masks
    x = torch.randn(2, 8, 6, 5)
    kernels = masks.view(4, 3, 3).transpose(1, 2)  # taps run with the width outer
    expected = F.conv2d(x, kernels.repeat_interleave(2, 0)[:, None], padding=1, groups=8)
    torch.testing.assert_close(module(x.permute(0, 2, 3, 1)), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dw_kernel_size", [None, 3])
@pytest.mark.parametrize("center_feature_scale", [False, True])
@pytest.mark.parametrize("remove_center", [False, True])
def test_forward_is_the_documented_composition(randomize, dw_kernel_size, center_feature_scale, remove_center):
    options = {"dw_kernel_size": dw_kernel_size, "remove_center": remove_center}
    module = DCNv4(12, group=3, offset_scale=0.7, center_feature_scale=center_feature_scale, **options)
    randomize(module)
    x = torch.randn(2, 5, 7, 12)
    value = x @ module.value_proj.weight.T + module.value_proj.bias
    source = x
    if dw_kernel_size:
        depthwise = module.offset_mask_dw
        nchw = F.conv2d(x.permute(0, 3, 1, 2), depthwise.weight, depthwise.bias, padding=1, groups=12)
        source = nchw.permute(0, 2, 3, 1)
    offset_mask = source @ module.offset_mask.weight.T + module.offset_mask.bias
    y = dcnv4_reference(value, offset_mask, groups=3, offset_scale=0.7, remove_center=remove_center)
    if center_feature_scale:
        logits = y @ module.center_feature_scale_proj_weight.T + module.center_feature_scale_proj_bias
        s = logits.sigmoid().unsqueeze(-1).expand(2, 5, 7, 3, 4).reshape(2, 5, 7, 12)
        y = y * (1 - s) + value * s
    expected = y @ module.output_proj.weight.T + module.output_proj.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_sequence_and_map_give_the_same():
    module = DCNv4(16, group=2, mask_init=0.1)
    x = torch.randn(2, 4, 6, 16)
    expected = module(x)
    torch.testing.assert_close(module(x.flatten(1, 2), shape=(4, 6)), expected.flatten(1, 2))
    torch.testing.assert_close(module(x, shape=(4, 6)), expected)
    square = x[:, :4, :4]
    torch.testing.assert_close(module(square.flatten(1, 2)), module(square).flatten(1, 2))


@pytest.mark.parametrize(
    "shape, kwargs, message",
    [
        ((2, 24, 16), {}, "not a square"),
        ((2, 24, 16), {"shape": (5, 5)}, "H \\* W = 24"),
        ((2, 4, 6, 16), {"shape": (6, 4)}, "expected \\(4, 6\\)"),
        ((24, 16), {}, "got shape \\(24, 16\\)"),
        ((2, 16, 4, 6), {}, "channels come last"),
    ],
)
def test_wrong_inputs_are_refused(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DCNv4(16, group=2)(torch.randn(shape), **kwargs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 10, "group": 4}, "divisor of channels=10"),
        ({"dw_kernel_size": 4}, "odd size"),
        ({"without_pointwise": True, "in_channels": 8}, "in_channels equal to channels"),
        ({"remove_center": True, "kernel_size": 4}, "odd kernel"),
        ({"remove_center": True, "center_mask_init": 1.0}, "no middle tap"),
        ({"kernel_size": 2, "center_mask_init": 1.0}, "no middle tap"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DCNv4(**options)


def test_fused_projections_change_nothing(randomize):
    module = randomize(DCNv4(16, group=2, in_channels=24))
    x = torch.randn(2, 6, 5, 24)
    results = []
    for fuse in (False, True):
        module.fuse_projections = fuse
        module.zero_grad()
        output = module(x)
        output.square().sum().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels, group, width", [(16, 2, 16 + 56), (768, 24, 1472)])
def test_fused_projections_are_one_product(channels, group, width):
    """Wide ones are rounded up to 64: torch.compile pads such rows, and copies what does not fit."""
    module = DCNv4(channels, group=group, fuse_projections=True)
    packed, _ = module._project_at_once(torch.randn(1, 2, 2, channels))
    assert packed.shape == (1, 2, 2, width) and packed.is_contiguous()


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(
    "options, products",
    [
        ({}, 2),
        ({"center_feature_scale": True}, 3),
        ({"fuse_projections": False}, 3),
        ({"dw_kernel_size": 3}, 3),
        ({"stride": 2}, 3),
        ({"without_pointwise": True}, 1),
    ],
    ids=str,
)
def test_products_add_their_bias_in_any_layout(traced_products, options, products, with_gradients):
    """A product and an addition apart would pass over memory once more, for each projection."""
    module = DCNv4(16, group=2, **options)
    nchw, sliced = torch.randn(2, 16, 5, 4).permute(0, 2, 3, 1), torch.randn(2, 5, 4, 24)[..., :16]
    with torch.set_grad_enabled(with_gradients):
        for x in (nchw, nchw[:, :, :2], sliced, nchw.contiguous()):
            assert traced_products(module, x) == ["addmm"] * products


def test_the_operator_reads_the_input_as_it_lies(monkeypatch):
    """Without value_proj; only the offsets and masks need a copy."""
    seen = []
    monkeypatch.setattr("dcngen.nn.dcnv4.dcnv4", lambda value, offset_mask, **geometry: seen.append(value) or value)
    x = torch.randn(2, 5, 4, 24)[..., :16]
    DCNv4(16, group=2, without_pointwise=True)(x)
    assert seen[0] is x


@pytest.mark.parametrize(
    "channels, width, on_gpu", [(128, 384, True), (256, 768, True), (384, 1088, True), (512, 1408, True),
                                (32, 96, True), (8, 40, True), (128, 344, False), (512, 1408, False)],
)  # fmt: skip
def test_rows_of_the_fused_product_end_with_a_line(channels, width, on_gpu):
    """With groups of 16 (8), where that adds at most an eighth; on the CPU only as far as torch.compile pads them."""
    needed = channels + offset_mask_channels(max(channels // 16, 1))
    assert _padded_width(needed, channels, on_gpu) == width


def test_wrapped_projections_are_called_not_fused():
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module = DCNv4(16, group=2, mask_init=1.0, fuse_projections=True)
    plain = module(torch.randn(1, 4, 4, 16).fill_(0))
    module.value_proj = Adapter(16, 16)
    torch.nn.init.zeros_(module.value_proj.bias)
    assert not module.can_fuse_projections()
    assert not torch.allclose(module(torch.zeros(1, 4, 4, 16)), plain)


def test_hooked_projections_are_called_not_fused():
    module, seen = DCNv4(16, group=2, fuse_projections=True), []
    handle = module.offset_mask.register_forward_hook(lambda *arguments: seen.append(arguments))
    assert not module.can_fuse_projections()
    module(torch.zeros(1, 4, 4, 16))
    assert len(seen) == 1
    handle.remove()
    assert module.can_fuse_projections()


@pytest.mark.parametrize("name", ["value_proj", "offset_mask", "output_proj"])
def test_replaced_projections_need_no_bias(randomize, name):
    module, x = randomize(DCNv4(16, group=2)), torch.randn(1, 4, 4, 16)
    projection = getattr(module, name)
    torch.nn.init.zeros_(projection.bias)
    expected = module(x)
    replaced = torch.nn.Linear(projection.in_features, projection.out_features, bias=False)
    replaced.weight = projection.weight
    setattr(module, name, replaced)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["value_proj", "offset_mask", "output_proj"])
def test_projections_with_a_forward_of_their_own_are_called(randomize, name):
    """accelerate and diffusers hook a module by giving the instance another forward."""
    module, x, seen = randomize(DCNv4(16, group=2)), torch.randn(1, 4, 4, 16), []
    expected = module(x)
    projection = getattr(module, name)
    original = projection.forward
    projection.forward = lambda value: seen.append(name) or original(value)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [name]
    projection.forward = original
    assert module.can_fuse_projections() and module._output_follows()


@pytest.mark.parametrize("attached", [True, False])
def test_compiles_whole_with_a_replaced_forward(randomize, attached):
    torch._dynamo.reset()
    module, x = randomize(DCNv4(16, group=2)), torch.randn(1, 4, 4, 16)
    original = module.value_proj.forward
    module.value_proj.forward = (lambda value: original(value) + 1) if attached else original
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "kernel_size, stride, pad, dilation", [(3, 2, 1, 1), (5, 1, 0, 1), (3, 1, 2, 2), (2, 2, 0, 1), (3, 1, 3, 1)]
)
def test_offsets_come_from_the_window_middle(randomize, kernel_size, stride, pad, dilation):
    """Masks that copy the input's first channel: each output must use the pixel under its window's middle."""
    module = DCNv4(4, kernel_size, stride, pad, dilation, group=1, without_pointwise=True)
    taps = kernel_size**2
    with torch.no_grad():
        module.offset_mask.weight[2 * taps : 3 * taps, 0] = 1
    x = torch.rand(1, 8, 9, 4) + 1
    ones = torch.ones(4, 1, kernel_size, kernel_size)
    window_sum = F.conv2d(x.permute(0, 3, 1, 2), ones, stride=stride, padding=pad, dilation=dilation, groups=4)
    center = (dilation * (kernel_size - 1)) // 2
    output = module(x)
    height, width = output.shape[1:3]
    rows = (torch.arange(height) * stride + center - pad).clamp(0, 7)
    columns = (torch.arange(width) * stride + center - pad).clamp(0, 8)
    masks = x[:, rows][:, :, columns][..., :1]
    torch.testing.assert_close(output, window_sum.permute(0, 2, 3, 1) * masks, rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights():
    module = DCNv4(16, group=2, mask_init=1 / 9)
    x = torch.randn(2, 4, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(x), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert module.value_proj.weight.grad.dtype == torch.float32
