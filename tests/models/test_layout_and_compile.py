"""Activations stay channels-last at any batch, and the whole model is one graph."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from functorch.compile import make_boxed_func
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd

from dcngen.models.channels_last import (
    ChannelsLastAttnProcessor,
    ChannelsLastUpsample2D,
    _repeat_pixels,
    keep_channels_last,
)

STOCK = {"conv_operator": "conv", "attention_operator": "attention"}
DCN = {"conv_operator": "dcnv4", "attention_operator": "dcnv4"}


def maps_not_channels_last(model, batch):
    """Names of modules whose output map (several channels, several pixels) is in another layout."""
    found = []

    def check(name):
        def hook(module, args, output):
            is_map = torch.is_tensor(output) and output.dim() == 4 and output.shape[1] > 1 and output.shape[2] > 1
            if is_map and not output.is_contiguous(memory_format=torch.channels_last):
                found.append(name)

        return hook

    # Inside a DCNv4 block maps are (N, H, W, C).
    for name, module in model.named_modules():
        if "dcn" not in name.split(".") and not isinstance(module, torch.nn.Linear):
            module.register_forward_hook(check(name))
    model(*batch)
    return found


@pytest.mark.parametrize("options", [{}, {"downsample_type": "resnet", "upsample_type": "resnet"}])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_training_keeps_maps_channels_last(make_unet, make_batch, arm, batch_size, options):
    model = make_unet(**arm, **options).train()
    assert maps_not_channels_last(model, make_batch(batch_size)) == []


def test_the_layout_check_sees_the_stock_copies(tiny, make_batch):
    stock = UNet2DModel(**tiny).train()
    sample, *rest = make_batch(64)
    sample = sample.contiguous(memory_format=torch.channels_last)
    assert maps_not_channels_last(stock, (sample, *rest)) != []


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3), (7, 8)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_pixels_are_those_of_interpolate(size, memory_format, dtype):
    x = torch.randn(3, 6, *size, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    # Small integers, whose sums are exact in any order.
    gradient = torch.randint(-4, 5, (3, 6, 2 * size[0], 2 * size[1])).to(dtype)
    output, expected = _repeat_pixels(x), F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(output, expected) and output.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (output, expected)))


def test_the_gradient_of_upsampling_by_two_is_compiled_to_a_sum():
    """That of F.interpolate becomes a scatter, which runs as long as several whole layers on a GPU."""
    backward = []

    def keep(graph, _):
        backward.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return make_boxed_func(graph.forward)

    def operators(module):
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keep,
                               decompositions=core_aten_decompositions())  # fmt: skip
        x = torch.randn(2, 4, 5, 3, requires_grad=True)
        torch.compile(module, backend=backend, dynamic=False)(x).sum().backward()
        return backward.pop()

    def scatters(found):
        return [name for name in found if "index_put" in name or "upsample" in name]

    assert scatters(operators(torch.nn.Upsample(scale_factor=2.0)))
    found = operators(ChannelsLastUpsample2D(4, use_conv=False))
    assert "aten.sum.dim_IntList" in found and not scatters(found)


def test_upsampling_to_a_given_size():
    block = ChannelsLastUpsample2D(4, use_conv=False)
    x = torch.arange(2 * 4 * 2 * 3.0).view(2, 4, 2, 3)
    assert torch.equal(block(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert block(x, output_size=(5, 7)).shape == (2, 4, 5, 7)


def test_export_names_the_largest_batch_of_channels_last_upsampling():
    block, x = ChannelsLastUpsample2D(4, use_conv=False), torch.randn(3, 4, 8, 8)
    largest = (2**31 - 1) // (4 * 4 * 8 * 8)
    with pytest.raises(torch._dynamo.exc.UserError, match=rf"Dim\('n', max={largest}\)"):
        torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("n", max=largest)},))
    assert torch.equal(exported.module()(x[:2]), block(x[:2]))


def test_group_norms_hand_on_channels_last(monkeypatch):
    """As on a GPU, where torch's own gives and takes the contiguous layout; values and gradients are the same."""
    real = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *args: real(x.contiguous(), *args).contiguous())
    layouts = []
    norm = keep_channels_last(torch.nn.Sequential(torch.nn.GroupNorm(2, 8)))[0]
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x * 1
    before.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))
    output = norm(before)
    assert output.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(2, 8, 3, 5)
    (got,) = torch.autograd.grad(output, x, gradient)
    expected = real(x, 2, norm.weight, norm.bias)
    assert layouts == [True]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, gradient)[0])


@pytest.mark.parametrize("with_gradients", [True, False])
def test_products_of_the_attention_add_their_bias_in_any_layout(traced_products, with_gradients):
    options = {"heads": 2, "dim_head": 8, "norm_num_groups": 4, "bias": True, "residual_connection": True}
    attention = Attention(16, processor=ChannelsLastAttnProcessor(), **options)
    x = torch.randn(2, 16, 5, 4)
    with torch.set_grad_enabled(with_gradients):
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            assert traced_products(attention, layout) == ["addmm"] * 4


def test_attention_processor_refuses_cross_attention(make_unet):
    model = make_unet(conv_operator="conv", attention_operator="attention")
    attention = next(m for m in model.modules() if isinstance(m, Attention))
    with pytest.raises(ValueError, match="self-attention"):
        attention(torch.randn(1, 32, 4, 4), encoder_hidden_states=torch.randn(1, 3, 32))


@pytest.mark.parametrize(
    "options, checkpointing, backend",
    [(STOCK, False, "eager"), (DCN, False, "aot_eager"), (DCN, True, "eager")],
    ids=["stock", "dcnv4", "dcnv4-checkpointing"],
)
def test_compiles_whole_and_once(make_unet, make_batch, options, checkpointing, backend):
    torch._dynamo.reset()
    model = make_unet(**options).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    first, second = make_batch(), make_batch()
    expected = model(*second).sample
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    compiled(*first).sample.sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        output = compiled(*second).sample
        output.sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_compiles_fused_under_autocast(make_unet, make_batch):
    torch._dynamo.reset()
    model = make_unet(**DCN).fuse_projections()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = compiled(*batch).sample, model(*batch).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
