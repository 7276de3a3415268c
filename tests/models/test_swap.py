"""Changing the operators of a built model, and loading models by what their config says."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from dcngen.models import DCNUNet2DModel, count_parameters, load_unet, swap_operators
from dcngen.nn import DCNv4


def test_swap_keeps_the_rest_and_the_given_model(tiny):
    stock = UNet2DModel(**tiny).train()
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    swapped = swap_operators(stock, group_channels=16)
    assert type(swapped) is DCNUNet2DModel and swapped.training and type(stock) is UNet2DModel
    new = swapped.state_dict()
    kept = set(before) & set(new)
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.1.attentions.0.group_norm.weight"} <= kept
    assert not any(".conv1." in name for name in kept)
    for name in before:
        assert torch.equal(stock.state_dict()[name], before[name])
        if name in kept:
            assert torch.equal(new[name], before[name])
            assert new[name].data_ptr() != stock.state_dict()[name].data_ptr()
    assert count_parameters(swapped) < count_parameters(stock)


def test_swap_is_the_config(tiny):
    options = {"conv": ["conv", "dcnv4"], "attention": "dcnv4", "group_channels": 8, "kernel_size": 5}
    swapped = swap_operators(UNet2DModel(**tiny), **options)
    built = DCNUNet2DModel(**tiny, conv_operator=["conv", "dcnv4"], dcn_group_channels=8, dcn_kernel_size=5)
    assert [(n, type(m)) for n, m in swapped.named_modules()] == [(n, type(m)) for n, m in built.named_modules()]
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (swapped, built))
    assert ours == theirs


def test_swap_to_stock_and_back(tiny, make_batch):
    stock = UNet2DModel(**tiny).eval()
    same = swap_operators(stock, conv="conv", attention="attention")
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(same(*batch).sample, stock(*batch).sample, rtol=1e-4, atol=1e-5)
    dcn = swap_operators(same, conv="dcnv4", attention="attention")
    assert dcn.config.conv_operator == "dcnv4" and dcn.config.attention_operator == "attention"


def test_swap_keeps_dtype_and_checkpointing(tiny):
    stock = UNet2DModel(**tiny).to(torch.bfloat16)
    stock.enable_gradient_checkpointing()
    swapped = swap_operators(stock)
    assert {p.dtype for p in swapped.parameters()} == {torch.bfloat16} and swapped.is_gradient_checkpointing


def fusing(model):
    return {name: module.fuse_projections for name, module in model.named_modules() if isinstance(module, DCNv4)}


def test_swap_keeps_fuse_projections(tiny, make_unet):
    model = make_unet(attention_operator="attention").fuse_projections(False)
    swapped = fusing(swap_operators(model))
    assert len(swapped) > len(fusing(model)) and not any(swapped.values())
    one = next(iter(fusing(model)))
    model.get_submodule(one).fuse_projections = True
    swapped = fusing(swap_operators(model))
    assert fusing(model).items() <= swapped.items() and swapped[one]
    assert all(fusing(swap_operators(UNet2DModel(**tiny))).values())


def test_swap_refuses_other_models():
    with torch.device("meta"):
        other = UNet2DConditionModel(
            block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        )
    with pytest.raises(TypeError, match="got UNet2DConditionModel"):
        swap_operators(other)


@pytest.mark.parametrize("cls", [UNet2DModel, DCNUNet2DModel])
def test_load_picks_the_class_of_the_config(tmp_path, tiny, cls):
    model = cls(**tiny)
    model.save_pretrained(tmp_path / "unet")
    ways = [(tmp_path / "unet", {}), (tmp_path / "unet", {"subfolder": None}), (tmp_path, {"subfolder": "unet"})]
    for folder, options in ways:
        loaded = load_unet(folder, **options)
        assert type(loaded) is cls
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_dcn_class_refuses_a_stock_folder(tmp_path, tiny):
    UNet2DModel(**tiny).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved by DCNUNet2DModel, got UNet2DModel"):
        DCNUNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("claim", ["UNet2DModel", "DCNUNet2DModel"])
def test_weights_of_another_model_are_refused(tmp_path, make_unet, claim):
    """A config that claims something else than its weights are: diffusers itself only warns."""
    make_unet().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": claim, "conv_operator": "conv"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing keys .* unexpected keys"):
        load_unet(tmp_path)


def test_unknown_class_and_empty_folder_are_refused(tmp_path, make_unet):
    with pytest.raises(FileNotFoundError, match="expected the config"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    with pytest.raises(ValueError, match="got 'DiTTransformer2DModel'"):
        load_unet(tmp_path)


def test_loading_info_is_still_available(tmp_path, make_unet):
    make_unet().save_pretrained(tmp_path)
    model, info = DCNUNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DCNUNet2DModel) and not info["missing_keys"]
