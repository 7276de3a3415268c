"""Changing the operators of a U-Net that is already built, and loading one by what its config says it is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DModel

from dcngen.models.unet import DCNUNet2DModel, load_strictly
from dcngen.nn.dcnv4 import DCNv4

LOADABLE = (UNet2DModel, DCNUNet2DModel)


def swap_operators(
    model: UNet2DModel,
    *,
    conv: str | list[str] = "dcnv4",
    attention: str | list[str] = "dcnv4",
    resample: str | list[str] = "conv",
    group_channels: int | list[int] = 32,
    kernel_size: int | list[int] = 3,
    offset_scale: float | list[float] = 1.0,
    mask_init: float | list[float] = 0.0,
    center_mask_init: float | list[float | None] | None = 1.0,
    dw_kernel_size: int | list[int | None] | None = None,
) -> DCNUNet2DModel:
    """A DCNUNet2DModel with the config of `model` and these operators; `model` is left as it is.

    Layers that both models have keep their weights (copied); new operators are freshly initialised. Device, dtype,
    training mode, gradient checkpointing and `fuse_projections` are those of `model`. The config of the result says
    what it is, so it saves and loads as itself.

    Args:
        model: a UNet2DModel, or a DCNUNet2DModel whose operators are to change.
        conv, attention, resample: the arguments conv_operator, attention_operator and resample_operator of
            DCNUNet2DModel, one value or a list by level.
        group_channels, kernel_size, offset_scale, mask_init, center_mask_init, dw_kernel_size: its arguments
            dcn_group_channels, and so on.

    Raises:
        TypeError: `model` is of another class.
        ValueError: an operator that does not exist or does not fit.
    """
    if type(model) not in LOADABLE:
        raise TypeError(f"model: expected a UNet2DModel or DCNUNet2DModel, got {type(model).__name__}")
    operators = {
        "conv_operator": conv,
        "attention_operator": attention,
        "resample_operator": resample,
        "dcn_group_channels": group_channels,
        "dcn_kernel_size": kernel_size,
        "dcn_offset_scale": offset_scale,
        "dcn_mask_init": mask_init,
        "dcn_center_mask_init": center_mask_init,
        "dcn_dw_kernel_size": dw_kernel_size,
    }
    stock = {name: value for name, value in model.config.items() if not name.startswith("_")}
    parameter = next(model.parameters())
    swapped = DCNUNet2DModel(**(stock | operators)).to(parameter.device, parameter.dtype)
    kept = swapped.state_dict()
    for name, value in model.state_dict().items():
        if name in kept and kept[name].shape == value.shape:
            kept[name].copy_(value)
    _copy_fusing(model, swapped)
    if model.is_gradient_checkpointing:
        swapped.enable_gradient_checkpointing()
    return swapped.train(model.training)


def _copy_fusing(model: UNet2DModel, swapped: DCNUNet2DModel) -> None:
    """Gives layers that both models have their `fuse_projections`, and new ones False where all of `model` have it."""
    fused = {name: module.fuse_projections for name, module in model.named_modules() if isinstance(module, DCNv4)}
    for name, module in swapped.named_modules():
        if isinstance(module, DCNv4):
            module.fuse_projections = fused.get(name, any(fused.values()) or not fused)


def load_unet(folder: str | Path, **kwargs) -> UNet2DModel:
    """The U-Net saved in `folder`, of the class that its config names.

    Stock UNet2DModel.from_pretrained on the folder of a DCNUNet2DModel only warns and leaves convolutions at random;
    this refuses whatever does not fit.

    Args:
        folder: as written by save_pretrained (config.json and weights).
        kwargs: further arguments of from_pretrained (torch_dtype, ...).

    Raises:
        FileNotFoundError: no config.json there.
        ValueError: a class that is neither UNet2DModel nor DCNUNet2DModel, or weights that do not fit the config.
    """
    path = Path(folder) / (kwargs.get("subfolder") or "") / UNet2DModel.config_name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the config of a saved U-Net there; give the folder that save_pretrained wrote, "
            "inside a pipeline its unet/"
        )
    saved_by = json.loads(path.read_text()).get("_class_name")
    names = [cls.__name__ for cls in LOADABLE]
    if saved_by not in names:
        raise ValueError(f"{path}: expected _class_name to be one of {', '.join(names)}, got {saved_by!r}")
    if saved_by == DCNUNet2DModel.__name__:
        return DCNUNet2DModel.from_pretrained(folder, **kwargs)
    return load_strictly(UNet2DModel.from_pretrained, folder, **kwargs)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, trained or not, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
