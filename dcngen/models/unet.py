"""DCNUNet2DModel: diffusers' UNet2DModel with DCNv4 in the place of convolutions and attention, by its config."""

from __future__ import annotations

import inspect

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401 - pipelines look ModelMixin up in the module of a component
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from dcngen.models.channels_last import keep_channels_last
from dcngen.models.operators import operators_by_level, replace_operators, zero_residual_outputs

STOCK_ARGUMENTS = tuple(inspect.signature(UNet2DModel.__init__).parameters)[1:]
# What says where a config is, among the keyword arguments of from_pretrained.
CONFIG_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class DCNUNet2DModel(UNet2DModel):
    """A UNet2DModel whose config says which operator stands where.

    With `conv_operator="conv"` and `attention_operator="attention"` it is the stock model: the same state dict and the
    same numbers, so a baseline and a DCNv4 model are one class. All activations stay channels-last in memory.

    Each argument below is one value for all levels, or a list with one value a level, full resolution first; the middle
    block follows the deepest level, or takes the last value of a list with one more. Arguments that are not named here
    are those of UNet2DModel. For classifier-free guidance over C classes, `num_class_embeds` is C + 1 and the last
    index stands for no class.

    Args:
        conv_operator: "dcnv4" or "conv": the two 3x3 convolutions of every residual block.
        attention_operator: "dcnv4" or "attention": every self-attention. A level without attention keeps none.
        resample_operator: "conv" or "dcnv4": the 3x3 convolution of the level's own down- and upsampling.
        dcn_group_channels: channels of one DCNv4 group, halved at a layer until they divide its channels.
        dcn_kernel_size: odd size of the sampling window.
        dcn_offset_scale: multiplies the regular grid and the learned offsets alike.
        dcn_mask_init: initial bias of the masks; see `DCNv4`.
        dcn_center_mask_init: that of the middle tap, None for dcn_mask_init. With the default each DCNv4 starts as a
            pointwise layer, which trained better than the other starts tried (docs/operator.md).
        dcn_dw_kernel_size: odd size of a depthwise convolution before the offsets and masks, or None.
        zero_init: start every residual branch and the output at 0, with either operator (one value).

    conv_in, conv_out, 1x1 shortcuts and embeddings are always stock: 4 latent channels leave no groups to deform.

    Raises:
        ValueError: an unknown operator, a list of the wrong length, zero_init together with masks of 0.
    """

    # Class names, for compile_repeated_blocks and for wrapping by block.
    _repeated_blocks = ["ChannelsLastResnetBlock2D", "DCNv4Attention", "Attention"]
    _no_split_modules = ["ChannelsLastResnetBlock2D", "DCNv4Attention", "Attention"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        conv_operator: str | list[str] = "dcnv4",
        attention_operator: str | list[str] = "dcnv4",
        resample_operator: str | list[str] = "conv",
        dcn_group_channels: int | list[int] = 32,
        dcn_kernel_size: int | list[int] = 3,
        dcn_offset_scale: float | list[float] = 1.0,
        dcn_mask_init: float | list[float] = 0.0,
        dcn_center_mask_init: float | list[float | None] | None = 1.0,
        dcn_dw_kernel_size: int | list[int | None] | None = None,
        zero_init: bool = False,
    ):
        # Every argument of the parent is restated above: one left out would be lost on reload.
        super().__init__(**{name: self.config[name] for name in STOCK_ARGUMENTS})
        levels = operators_by_level(
            len(block_out_channels),
            conv=conv_operator,
            attention=attention_operator,
            resample=resample_operator,
            group_channels=dcn_group_channels,
            kernel_size=dcn_kernel_size,
            offset_scale=dcn_offset_scale,
            mask_init=dcn_mask_init,
            center_mask_init=dcn_center_mask_init,
            dw_kernel_size=dcn_dw_kernel_size,
        )
        replace_operators(self, levels)
        keep_channels_last(self)
        if zero_init:
            zero_residual_outputs(self)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample: noisy input (N, in_channels, H, W).
            timestep: (N,), or one for all.
            class_labels: (N,) indices, where the model has a class embedding.
            return_dict: a UNet2DOutput, or a tuple of one tensor.

        Returns:
            (N, out_channels, H, W) as `.sample`, or in a tuple.
        """
        # The first convolution hands this layout on, and every block keeps it.
        sample = sample.contiguous(memory_format=torch.channels_last)
        return super().forward(sample, timestep, class_labels, return_dict)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> DCNUNet2DModel:
        """As ModelMixin.from_pretrained, but never with weights left at random.

        Raises:
            ValueError: the config was saved by another class, or the weights are not those of the model it describes.
        """
        where = {name: kwargs[name] for name in CONFIG_ARGUMENTS if name in kwargs}
        saved_by = cls.load_config(pretrained_model_name_or_path, **where).get("_class_name", cls.__name__)
        if saved_by != cls.__name__:
            raise ValueError(
                f"{pretrained_model_name_or_path}: expected a config saved by {cls.__name__}, got {saved_by}; load it "
                "with dcngen.models.load_unet, which picks the class, then swap_operators to change its operators"
            )
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def fuse_projections(self, enabled: bool = True) -> DCNUNet2DModel:
        """Computes value and offset projections of each DCNv4 as one matrix product: same function, same state dict."""
        for module in self.modules():
            if hasattr(module, "can_fuse_projections"):
                module.fuse_projections = enabled
        return self


def load_strictly(from_pretrained, source, *, output_loading_info: bool = False, **kwargs):
    """`from_pretrained(source, **kwargs)` of a model class, refusing weights that do not fit the config.

    Raises:
        ValueError: a weight was missing, left over or of another shape.
    """
    model, info = from_pretrained(source, output_loading_info=True, **kwargs)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = [f"{len(info[kind])} {kind.replace('_', ' ')} (as {sorted(info[kind])[0]})" for kind in kinds if info[kind]]
    if found:
        raise ValueError(
            f"{source}: expected exactly the weights of the {type(model).__name__} that its config describes, "
            f"got {', '.join(found)}; config.json and the weights are not from one model"
        )
    return (model, info) if output_loading_info else model
