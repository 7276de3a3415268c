"""diffusers' U-Net blocks kept in channels-last memory: the same parameters, keys and numbers, other forwards.

The stock blocks return to the contiguous layout at five points, each one a copy of the whole map there and another
one back: Upsample2D from batch 64 on, ResnetBlock2D before its shortcut while training and before its resampling from
batch 64 on, the attention, which normalises a flattened and transposed view, and on a GPU every group norm.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

# torch's channels-last nearest upsampling refuses outputs with more elements than this.
MAX_CHANNELS_LAST_ELEMENTS = 2**31 - 1


class ChannelsLastGroupNorm(nn.GroupNorm):
    """GroupNorm whose output and input gradient are channels-last.

    On a GPU torch's are contiguous whatever the input is, and torch.compile takes that over: each convolution beside a
    group norm then kept its input in both layouts, and its backward copied input and gradient once more, which was a
    tenth of a training step. What is no convolution's input or gradient torch.compile may still lay out otherwise.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, ...) to the same shape; only maps, (N, C, H, W), have a channels-last layout."""
        if input.dim() != 4:
            return super().forward(input)
        return _ChannelsLast.apply(super().forward(_ChannelsLast.apply(input)))


class _ChannelsLast(torch.autograd.Function):
    """The identity; its output and its gradient lie channels-last in memory."""

    @staticmethod
    def forward(ctx, map: torch.Tensor) -> torch.Tensor:
        return map.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous(memory_format=torch.channels_last)


class ChannelsLastUpsample2D(Upsample2D):
    """Upsample2D for nearest upsampling by 2 (optionally then a convolution) that keeps the layout at any batch."""

    def forward(self, hidden_states: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        """(N, C, H, W) to (N, out_channels, 2H, 2W), or to `output_size`."""
        if output_size is None and torch.compiler.is_dynamo_compiling():
            hidden_states = _repeat_pixels(hidden_states)
        else:
            scale = None if output_size is not None else 2.0
            area = 4 * _area(hidden_states.shape[-2:]) if output_size is None else _area(output_size)
            # Compared by the batch, in integers: torch.export refuses the fraction that a product would bound it by.
            if hidden_states.shape[0] > MAX_CHANNELS_LAST_ELEMENTS // (hidden_states.shape[1] * area):
                hidden_states = hidden_states.contiguous()
            hidden_states = F.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
        if not self.use_conv:
            return hidden_states
        return self.conv(hidden_states) if self.name == "conv" else self.Conv2d_0(hidden_states)


class ChannelsLastResnetBlock2D(ResnetBlock2D):
    """ResnetBlock2D that keeps the layout at any batch, training or not."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in_channels, H, W) and the time embedding (N, temb_channels) to (N, out_channels, H', W')."""
        resample = self.upsample or self.downsample
        hidden_states = self.nonlinearity(self.norm1(input_tensor))
        if resample is not None:
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = self._normalize_with_time(self.conv1(hidden_states), temb)
        hidden_states = self.conv2(self.dropout(self.nonlinearity(hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return (input_tensor + hidden_states) / self.output_scale_factor

    def _normalize_with_time(self, hidden_states: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        """norm2 with the time embedding added before it, or scaling and shifting after it."""
        if self.time_emb_proj is None or temb is None:
            return self.norm2(hidden_states)
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
            return self.norm2(hidden_states) * (1 + scale) + shift
        return self.norm2(hidden_states + temb)


class ChannelsLastAttnProcessor:
    """Self-attention of a map whose group norm sees (N, C, H, W), so that a channels-last map is never copied."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, C, H, W) to (N, C, H, W); `temb` is not used."""
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.dim() != 4:
            raise ValueError(
                "ChannelsLastAttnProcessor: expected self-attention on (N, C, H, W) without a mask; "
                "call attn.set_processor(AttnProcessor2_0()) for anything else"
            )
        x = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states)
        # Contiguous, or torch.compile makes of each projection a product and a further pass that adds the bias.
        x = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        heads = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        x = F.scaled_dot_product_attention(*heads, scale=attn.scale)
        x = attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))
        x = x.unflatten(1, hidden_states.shape[-2:]).permute(0, 3, 1, 2)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor


def keep_channels_last(unet: nn.Module) -> nn.Module:
    """Gives the stock blocks of `unet` the forwards of this module, in place; parameters and keys stay.

    Blocks of other types, and those with what the forwards here leave out (cross-attention, spatial norms, transposed
    or normalised upsampling), are left as they are.
    """
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm:
                setattr(module, name, _with_forward_of(ChannelsLastGroupNorm, child))
            elif type(child) is ResnetBlock2D:
                setattr(module, name, _with_forward_of(ChannelsLastResnetBlock2D, child))
            elif type(child) is Upsample2D and child.interpolate and child.norm is None:
                if not child.use_conv_transpose:
                    setattr(module, name, _with_forward_of(ChannelsLastUpsample2D, child))
            elif isinstance(child, Attention) and _is_plain_self_attention(child):
                child.set_processor(ChannelsLastAttnProcessor())
    return unet


def _with_forward_of(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """`module` as an instance of its subclass `cls`, which overrides methods alone: the same parts, no new ones."""
    adopted = cls.__new__(cls)
    adopted.__dict__.update(module.__dict__)
    return adopted


def _is_plain_self_attention(attention: Attention) -> bool:
    extras = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    return (
        type(attention.processor) is AttnProcessor2_0
        and not attention.is_cross_attention
        and attention.to_out is not None
        and all(getattr(attention, name, None) is None for name in extras)
    )


def _repeat_pixels(x: torch.Tensor) -> torch.Tensor:
    """Nearest upsampling by 2, (N, C, H, W) to (N, C, 2H, 2W) in channels-last memory, for torch.compile.

    The gradient is a plain sum, where that of F.interpolate is compiled to a scatter with atomic additions. Outside
    torch.compile F.interpolate is the faster one.
    """
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).unsqueeze(3).unsqueeze(2).expand(-1, -1, 2, -1, 2, -1)
    # Cloned, because of a single pixel a reshape would be a view, with one place in memory for all four.
    x = x.clone(memory_format=torch.contiguous_format).view(batch, 2 * height, 2 * width, channels)
    return x.permute(0, 3, 1, 2)


def _area(size: int | tuple[int, int] | torch.Size) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    return height * width
