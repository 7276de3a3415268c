"""DCNUNet2DModel: the stock model where all is stock, operators placed by the config, saved and loaded exactly."""

import copy
import inspect
import json

import accelerate
import pytest
import torch
from diffusers import UNet2DModel

from dcngen.models import DCNUNet2DModel
from dcngen.nn import DCNv4, DCNv4Attention, DCNv4Conv2d

STOCK = {"conv_operator": "conv", "attention_operator": "attention"}
STOCK_VARIANTS = {
    "plain": {},
    "no classes, fourier": {"num_class_embeds": None, "time_embedding_type": "fourier"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "resampling by residual blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no middle attention, asymmetric downsampling": {"add_attention": False, "downsample_padding": 0},
    "middle scale": {"mid_block_scale_factor": 2.0, "center_input_sample": True},
}


def run(model, sample, timestep, labels):
    return model(sample, timestep, labels if model.config.num_class_embeds else None).sample


@pytest.mark.parametrize("options", STOCK_VARIANTS.values(), ids=STOCK_VARIANTS.keys())
def test_all_stock_is_the_stock_model(tiny, make_batch, randomize, options):
    tiny.update(options)
    stock = randomize(UNet2DModel(**tiny))
    ours = DCNUNet2DModel(**tiny, **STOCK)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    batch = make_batch()
    outputs = [run(model.train(), *batch) for model in (stock, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for model, output in zip((stock, ours), outputs, strict=True):
        output.square().mean().backward()
        model.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(ours.gradients, stock.gradients, rtol=1e-3, atol=1e-5)


def test_all_stock_is_the_stock_model_with_fir_blocks(tiny, make_batch):
    # These blocks hold their filters as plain functions and mix in a picture of three channels.
    tiny.update(
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    stock, ours = UNet2DModel(**tiny).eval(), DCNUNet2DModel(**tiny, **STOCK).eval()
    ours.load_state_dict(stock.state_dict())
    sample, *rest = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(
            run(ours, sample[:, :3], *rest), run(stock, sample[:, :3], *rest), rtol=1e-4, atol=1e-5
        )


def test_every_parent_argument_is_restated_with_its_default():
    parent = inspect.signature(UNet2DModel.__init__).parameters
    ours = inspect.signature(DCNUNet2DModel.__init__).parameters
    for name, parameter in list(parent.items())[1:]:
        assert name in ours, f"{name}: a new argument of UNet2DModel, which would be lost on reload"
        assert ours[name].default == parameter.default


def test_default_puts_dcnv4_in_both_places_everywhere(make_unet):
    model = make_unet()
    resnets = [m for name, m in model.named_modules() if name.split(".")[-2:-1] == ["resnets"]]
    assert len(resnets) == 8  # one a down level, two in the middle, two an up level
    for resnet in resnets:
        assert isinstance(resnet.conv1, DCNv4Conv2d) and isinstance(resnet.conv2, DCNv4Conv2d)
    attentions = [m for name, m in model.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
    assert len(attentions) == 4 and all(isinstance(m, DCNv4Attention) for m in attentions)
    stock_convs = {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    }
    assert stock_convs == {"conv_in", "conv_out", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"}


def test_levels_are_resolutions(make_unet):
    model = make_unet(
        conv_operator=["conv", "dcnv4"],
        attention_operator=["dcnv4", "attention", "dcnv4"],
        resample_operator=["dcnv4", "conv"],
        dcn_group_channels=[8, 16, 32],
        dcn_kernel_size=[3, 5],
        dcn_offset_scale=[1.0, 2.0],
    )
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["down_blocks.0.resnets.0.conv1"] is kinds["up_blocks.1.resnets.0.conv1"] is torch.nn.Conv2d
    assert kinds["down_blocks.1.resnets.0.conv1"] is kinds["up_blocks.0.resnets.0.conv1"] is DCNv4Conv2d
    assert kinds["mid_block.resnets.0.conv1"] is DCNv4Conv2d
    assert kinds["mid_block.attentions.0"] is DCNv4Attention
    assert kinds["down_blocks.1.attentions.0"] is not DCNv4Attention
    assert kinds["down_blocks.0.downsamplers.0.conv"] is DCNv4Conv2d
    assert kinds["up_blocks.0.upsamplers.0.conv"] is torch.nn.Conv2d
    deep, middle = model.down_blocks[1].resnets[0].conv1, model.mid_block.resnets[0].conv1
    assert deep.geometry.groups == 2 and middle.geometry.groups == 1
    assert deep.geometry.kernel_size == middle.geometry.kernel_size == (5, 5)
    assert deep.geometry.offset_scale == 2.0
    assert model.down_blocks[0].downsamplers[0].conv.geometry.stride == (2, 2)


@pytest.mark.parametrize("resample_padding", [0, 1])
def test_resampling_may_be_dcnv4_too(make_unet, make_batch, resample_padding):
    model = make_unet(resample_operator="dcnv4", downsample_padding=resample_padding, dcn_dw_kernel_size=3)
    assert run(model, *make_batch()).shape == (3, 4, 8, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"conv_operator": "dcnv5"}, "conv_operator: expected 'conv' or 'dcnv4', got 'dcnv5'"),
        ({"attention_operator": ["dcnv4", "conv"]}, "attention_operator: expected 'attention' or 'dcnv4'"),
        ({"conv_operator": ["conv"]}, "expected one value, 2 .* or 3 .*, got 1"),
        ({"dcn_kernel_size": 4}, "odd size"),
        ({"zero_init": True, "dcn_center_mask_init": 0.0}, "dcn_mask_init or dcn_center_mask_init other than 0"),
    ],
)
def test_wrong_operators_are_refused(make_unet, options, message):
    with pytest.raises(ValueError, match=message):
        make_unet(**options)


def test_zero_init_starts_at_zero_and_learns(make_unet, arm, make_batch):
    model = make_unet(**arm, zero_init=True)
    batch = make_batch()
    assert torch.all(run(model, *batch) == 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (run(model, *batch) - 1).square().mean().backward()
        optimizer.step()
    idle = [name for name, p in model.named_parameters() if p.grad is not None and torch.all(p.grad == 0)]
    assert idle == [], "layers that got no gradient in the third step"


@pytest.mark.parametrize(
    "options",
    [
        STOCK,
        {},
        {"conv_operator": ["conv", "dcnv4"], "dcn_group_channels": [8, 16, 32], "dcn_mask_init": 0.2},
        {"resample_operator": "dcnv4", "dcn_dw_kernel_size": 3, "dcn_kernel_size": 5, "zero_init": True},
    ],
)
def test_round_trip_is_exact(tmp_path, make_unet, make_batch, randomize, options):
    model = randomize(make_unet(**options)).eval()
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    loaded = DCNUNet2DModel.from_pretrained(tmp_path)
    configs = [{k: v for k, v in m.config.items() if k[0] != "_"} for m in (loaded, model)]
    assert json.dumps(configs[0]) == json.dumps(configs[1])
    assert not loaded.training
    for (name, value), (other, saved) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, saved)
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(run(loaded, *batch), run(model, *batch), rtol=1e-5, atol=1e-6)


def test_from_config_rebuilds_the_same_model(make_unet):
    model = make_unet(conv_operator=["conv", "dcnv4"], dcn_group_channels=8)
    again = DCNUNet2DModel.from_config(model.config)
    assert [(n, type(m)) for n, m in again.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]


def test_gradient_checkpointing_changes_no_gradient(make_unet, arm, make_batch, randomize):
    model = randomize(make_unet(**arm)).train()
    batch = make_batch()
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
            assert any(isinstance(m, DCNv4Attention) and m.gradient_checkpointing for m in model.modules()) == (
                arm.get("attention_operator") != "attention"
            )
        model.zero_grad()
        run(model, *batch).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_fuse_projections_reaches_every_operator(make_unet, make_batch, randomize):
    model = randomize(make_unet()).eval()
    batch = make_batch()
    with torch.no_grad():
        expected = run(model, *batch)
        assert model.fuse_projections() is model
        assert all(m.fuse_projections for m in model.modules() if isinstance(m, DCNv4))
        torch.testing.assert_close(run(model, *batch), expected, rtol=1e-4, atol=1e-5)


def test_layerwise_casting_and_offloading_reach_every_projection(make_unet, make_batch, randomize):
    model = randomize(make_unet()).eval()
    batch = make_batch()
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(run(offloaded, *batch), run(model, *batch), rtol=1e-4, atol=1e-5)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert next(m for m in model.modules() if isinstance(m, DCNv4)).value_proj.weight.dtype == torch.float8_e4m3fn
        assert run(model, *batch).isfinite().all()


def test_repeated_blocks_exist(make_unet, arm):
    model = make_unet(**arm)
    found = {type(m).__name__ for m in model.modules()} & set(DCNUNet2DModel._repeated_blocks)
    assert "ChannelsLastResnetBlock2D" in found and len(found) == 2
