"""DCNv4 in the places of a U-Net: where a convolution stood, and where an attention stood.

Both take and give (N, C, H, W). A channels-last tensor permuted to (N, H, W, C) is contiguous, so the permutations
around the operator move no data; a tensor in the other layout gives the same result at the price of a copy.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from dcngen.nn.dcnv4 import DCNv4
from dcngen.ops.geometry import as_pair


def group_channels_for(channels: int, group_channels: int = 32) -> int:
    """Channels of one group for a layer of `channels`: `group_channels`, halved until it divides them.

    So 32 gives 32, 16, 8, 4, 2 or 1; the compiled kernels are fastest from 16 on.

    Raises:
        ValueError: a size below 1.
    """
    if channels < 1 or group_channels < 1:
        raise ValueError(f"expected at least one channel, got channels={channels}, group_channels={group_channels}")
    while channels % group_channels:
        group_channels //= 2
    return group_channels


def _check_map(tensor: torch.Tensor, channels: int, name: str) -> None:
    """Raises ValueError where the tensor is not (N, channels, H, W)."""
    if tensor.dim() != 4 or tensor.shape[1] != channels:
        raise ValueError(
            f"{name}: expected (N, C, H, W) with C = {channels} channels, got shape {tuple(tensor.shape)}; "
            "channels come second here, use .permute(0, 3, 1, 2) on NHWC tensors"
        )


def _padding_that_keeps_size(
    kernel_size: int | tuple[int, int], dilation: int | tuple[int, int] = 1
) -> tuple[int, int]:
    """(height, width) of the padding that keeps the map's size at stride 1.

    Raises:
        TypeError: neither an int nor a pair of ints.
        ValueError: an even kernel size.
    """
    sizes = as_pair(kernel_size, "kernel_size")
    if not all(size % 2 for size in sizes):
        raise ValueError(
            f"kernel_size: expected an odd size, which has padding that keeps the map's size, got {kernel_size}; "
            "use an odd one, or DCNv4Conv2d with a padding"
        )
    height, width = (step * (size - 1) // 2 for step, size in zip(as_pair(dilation, "dilation"), sizes, strict=True))
    return height, width


class DCNv4Conv2d(DCNv4):
    """DCNv4 in the place of `Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation)`.

    value_proj changes the channel count; the operator and output_proj work on out_channels. Parameters, with
    K = kernel_size**2 taps and G = out_channels / D groups of D channels (biases and padding apart):

        in * out  +  out * out  +  3 * K * G * in      against  9 * in * out  of a 3x3 convolution

    that is 2.84 C**2 against 9 C**2 at D = 32, and 3.69 C**2 at D = 16.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: of the convolution; padding None, with an odd
            kernel_size, keeps the size at stride 1.
        group_channels: D, see `group_channels_for`.
        dcn: further keyword arguments of `DCNv4` (offset_scale, dw_kernel_size, mask_init, ...).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        *,
        group_channels: int = 32,
        **dcn,
    ):
        super().__init__(
            out_channels,
            kernel_size,
            stride,
            _padding_that_keeps_size(kernel_size, dilation) if padding is None else padding,
            dilation,
            group=out_channels // group_channels_for(out_channels, group_channels),
            in_channels=in_channels,
            **dcn,
        )
        self.out_channels = out_channels

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H_out, W_out), channels-last in memory."""
        _check_map(input, self.in_channels, "input")
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DCNv4Attention(nn.Module):
    """DCNv4 in the place of diffusers' self-attention block on maps:

        output = (hidden_states + dropout(dcn(group_norm(hidden_states)))) / rescale_output_factor

    Args:
        channels: of the input and the output.
        group_norm: the normalisation before the operator, or None.
        residual_connection: whether the input is added.
        rescale_output_factor: what the sum is divided by.
        dropout: probability of the dropout after the operator.
        kernel_size, dilation: of the sampling window; an odd kernel_size.
        group_channels: see `group_channels_for`.
        dcn: further keyword arguments of `DCNv4`.
    """

    def __init__(
        self,
        channels: int,
        group_norm: nn.Module | None = None,
        residual_connection: bool = True,
        rescale_output_factor: float = 1.0,
        dropout: float = 0.0,
        *,
        kernel_size: int = 3,
        dilation: int = 1,
        group_channels: int = 32,
        **dcn,
    ):
        super().__init__()
        self.channels = channels
        self.group_norm = group_norm
        self.dcn = DCNv4(
            channels,
            kernel_size,
            pad=_padding_that_keeps_size(kernel_size, dilation),
            dilation=dilation,
            group=channels // group_channels_for(channels, group_channels),
            **dcn,
        )
        self.dropout = nn.Dropout(dropout)
        self.residual_connection = residual_connection
        self.rescale_output_factor = rescale_output_factor
        # Set by diffusers' enable_gradient_checkpointing, together with _gradient_checkpointing_func.
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The call of diffusers' Attention, for self-attention.

        Args:
            hidden_states: (N, channels, H, W).
            encoder_hidden_states, attention_mask: must be None: the operator looks at its own map alone.
            temb: accepted and, as in an attention without a spatial norm, not used.

        Returns:
            (N, channels, H, W)
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("DCNv4Attention: expected self-attention without a mask; keep Attention in this place")
        _check_map(hidden_states, self.channels, "hidden_states")
        x = hidden_states if self.group_norm is None else self.group_norm(hidden_states)
        x = x.permute(0, 2, 3, 1)
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(self.dcn, x)
        else:
            x = self.dcn(x)
        x = self.dropout(x.permute(0, 3, 1, 2))
        if self.residual_connection:
            x = x + hidden_states
        return x / self.rescale_output_factor
