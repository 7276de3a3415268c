"""Which operator stands where in a U-Net: a rule per resolution level, and its application to diffusers' blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.upsampling import Upsample2D

from dcngen.nn.blocks import DCNv4Attention, DCNv4Conv2d
from dcngen.nn.dcnv4 import DCNv4


@dataclass(frozen=True)
class LevelOperators:
    """The operators of one resolution level.

    Attributes:
        conv: "conv" or "dcnv4", for both 3x3 convolutions of every residual block.
        attention: "attention" or "dcnv4", for every self-attention.
        resample: "conv" or "dcnv4", for the 3x3 convolution of the level's down- or upsampling.
        group_channels, kernel_size, offset_scale, mask_init, center_mask_init, dw_kernel_size: of each DCNv4, see
            `DCNv4Conv2d` and `DCNv4`.
    """

    conv: str = "dcnv4"
    attention: str = "dcnv4"
    resample: str = "conv"
    group_channels: int = 32
    kernel_size: int = 3
    offset_scale: float = 1.0
    mask_init: float = 0.0
    center_mask_init: float | None = 1.0
    dw_kernel_size: int | None = None

    def __post_init__(self):
        for name, stock in (("conv", "conv"), ("attention", "attention"), ("resample", "conv")):
            value = getattr(self, name)
            if value not in (stock, "dcnv4"):
                raise ValueError(f"{name}_operator: expected {stock!r} or 'dcnv4', got {value!r}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"dcn_kernel_size: expected an odd size, which keeps the map's, got {self.kernel_size}")

    def dcn_options(self) -> dict:
        """The keyword arguments that every DCNv4 block of the level is built with."""
        return {
            "group_channels": self.group_channels,
            "kernel_size": self.kernel_size,
            "offset_scale": self.offset_scale,
            "mask_init": self.mask_init,
            "center_mask_init": self.center_mask_init,
            "dw_kernel_size": self.dw_kernel_size,
        }


def operators_by_level(num_levels: int, **options) -> list[LevelOperators]:
    """The rule for `num_levels` resolutions, from full resolution down, and then for the middle block.

    Args:
        num_levels: number of resolutions, len(block_out_channels).
        options: fields of LevelOperators, each one value for all levels, or a list with one value for each level (the
            middle block then follows the last, its own resolution) or with one more, for the middle block.

    Returns:
        num_levels + 1 entries.

    Raises:
        ValueError: a list of another length, or an operator that does not exist.
    """
    spread = {name: _spread(name, value, num_levels) for name, value in options.items()}
    return [LevelOperators(**{name: values[i] for name, values in spread.items()}) for i in range(num_levels + 1)]


def _spread(name: str, value, num_levels: int) -> list:
    if not isinstance(value, (list, tuple)):
        return [value] * (num_levels + 1)
    if len(value) == num_levels:
        return [*value, value[-1]]
    if len(value) != num_levels + 1:
        raise ValueError(
            f"{name}: expected one value, {num_levels} (one a level, full resolution first) or {num_levels + 1} "
            f"(the last for the middle block), got {len(value)}: {list(value)}"
        )
    return list(value)


def replace_operators(unet: nn.Module, levels: list[LevelOperators]) -> nn.Module:
    """Puts the operators of `levels` into the blocks of a UNet2DModel, in place.

    Level i is down block i and the up block of the same resolution. Only residual blocks, self-attentions and, with
    `resample`, the convolutions of plain down- and upsampling are touched; conv_in, conv_out, the 1x1 shortcuts and the
    embeddings stay. New modules are freshly initialised; all others keep their weights.

    Raises:
        ValueError: a level asks for DCNv4 convolutions but its block has none that can be replaced, or an attention is
            not a plain self-attention.
    """
    *resolutions, middle = levels
    blocks = list(zip([*unet.down_blocks, *unet.up_blocks], [*resolutions, *reversed(resolutions)], strict=True))
    if unet.mid_block is not None:
        blocks.append((unet.mid_block, middle))
    for block, operators in blocks:
        if operators.conv == "dcnv4":
            _replace_convolutions(block, operators)
        if operators.resample == "dcnv4":
            _replace_resampling(block, operators)
        if operators.attention == "dcnv4":
            _replace_attentions(block, operators)
    return unet


def _replace_convolutions(block: nn.Module, operators: LevelOperators) -> None:
    resnets = [module for module in block.modules() if isinstance(module, (ResnetBlock2D, ResnetBlockCondNorm2D))]
    if not resnets:
        raise ValueError(f"conv_operator: {type(block).__name__} has no ResnetBlock2D to put DCNv4 into; use 'conv'")
    for resnet in resnets:
        resnet.conv1 = _in_place_of_conv(resnet.conv1, operators)
        resnet.conv2 = _in_place_of_conv(resnet.conv2, operators)


def _replace_resampling(block: nn.Module, operators: LevelOperators) -> None:
    for module in block.modules():
        if isinstance(module, (Downsample2D, Upsample2D)) and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.conv = _in_place_of_conv(module.conv, operators)


def _replace_attentions(block: nn.Module, operators: LevelOperators) -> None:
    for parent in list(block.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Attention):
                setattr(parent, name, _in_place_of_attention(child, operators))


def _in_place_of_conv(conv: nn.Module, operators: LevelOperators) -> nn.Module:
    """DCNv4 with the convolution's channels, stride and grid; its padding grows with the kernel."""
    if isinstance(conv, DCNv4Conv2d):
        return conv
    options = operators.dcn_options()
    padding = conv.padding[0] + (options["kernel_size"] - conv.kernel_size[0]) // 2
    if padding < 0:
        raise ValueError(
            f"dcn_kernel_size: a {options['kernel_size']}x{options['kernel_size']} window is too small in the place of "
            f"{conv}; use {conv.kernel_size[0]} or more, or keep the convolution there"
        )
    return DCNv4Conv2d(conv.in_channels, conv.out_channels, stride=conv.stride, padding=padding, **options)


def _in_place_of_attention(attention: Attention, operators: LevelOperators) -> DCNv4Attention:
    if attention.is_cross_attention or attention.spatial_norm is not None:
        raise ValueError(
            "attention_operator: expected plain self-attention, got cross-attention or a spatial norm; use 'attention'"
        )
    return DCNv4Attention(
        attention.query_dim,
        attention.group_norm,
        attention.residual_connection,
        attention.rescale_output_factor,
        attention.dropout,
        **operators.dcn_options(),
    )


def zero_residual_outputs(unet: nn.Module) -> nn.Module:
    """Zeroes the last layer of every residual branch and conv_out, in place, as ADM (arXiv 2105.05233) and EDM do.

    Every residual block and attention then starts as the identity (or its shortcut), and the model's output as 0.

    Raises:
        ValueError: a DCNv4 there starts with masks of 0: the two zeros would keep each other from ever learning.
    """
    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, ResnetBlockCondNorm2D)):
            _zero_output(module.conv2)
        elif isinstance(module, DCNv4Attention):
            _zero_output(module.dcn)
        elif isinstance(module, Attention):
            _zero_output(module.to_out[0])
    _zero_output(unet.conv_out)
    return unet


def _zero_output(layer: nn.Module) -> None:
    if isinstance(layer, DCNv4):
        if layer.starts_at_zero():
            raise ValueError(
                "zero_init: expected a dcn_mask_init or dcn_center_mask_init other than 0, since zero masks before a "
                "zero projection give neither of them a gradient; set dcn_center_mask_init=1 or zero_init=False"
            )
        layer = layer.output_proj
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
