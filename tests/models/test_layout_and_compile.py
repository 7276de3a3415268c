"""Activations stay channels-last at any batch, and the whole model is one graph."""

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from dcngen.models.channels_last import ChannelsLastUpsample2D

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
