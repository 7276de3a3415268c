"""The DCNv4 module: projections around the operator (Xiong et al., arXiv 2401.06197, section 3)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from dcngen.ops import (
    dcnv4,
    dcnv4_packed,
    dcnv4_packed_linear,
    has_linear_kernel,
    linear,
    offset_mask_channels,
)
from dcngen.ops.geometry import make_geometry


def _padded_width(width: int, channels: int, on_gpu: bool) -> int:
    """What the width of the fused product, `channels` values and then offsets and masks, is rounded up to.

    The kernels' 16-byte accesses need a multiple of 8. On an H200 the whole layer is up to 5 % faster (13 % where 184
    become 192) with rows of whole lines of 128 bytes, of two where the row is mostly offsets, if that adds at most an
    eighth. Rows wider than 1024 torch.compile pads to single lines anyway, and would copy others where they meet the
    operator.
    """
    lines = 128 if 2 * channels <= width <= 1024 else 64
    multiples = (lines, 64, 16) if on_gpu else (64,) if width > 1024 else ()
    rounded = (-(-width // multiple) * multiple for multiple in multiples)
    return next((w for w in rounded if w <= width * 9 / 8), -(-width // 8) * 8)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module does nothing but nn.Linear's forward, so that its weights may be read instead."""
    return type(module) is nn.Linear and not _has_own_forward(module) and not _has_hooks(module)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the instance replaces its class's forward, as accelerate and diffusers do to offload or cast weights.

    Taken off again, such a hook leaves the bound method of the class behind, which replaces nothing.
    """
    own = vars(module).get("forward")
    bound_back = getattr(own, "__self__", None) is module and own.__func__ is type(module).forward
    return own is not None and not bound_back


def _has_hooks(module: nn.Module) -> bool:
    """Whether torch's hooks run around the module's forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class DCNv4(nn.Module):
    """Deformable convolution v4 with its projections, channels last.

        value       = value_proj(x)
        offset_mask = offset_mask(offset_mask_dw(x))       offset_mask_dw only with dw_kernel_size
        y           = dcnv4(value, offset_mask)            dcngen.ops.dcnv4
        y           = y * (1 - s) + value * s              s = sigmoid(linear(y)), only with center_feature_scale
        output      = output_proj(y)

    The arguments, the initialisation and the state-dict keys are those of the released module, so its weights load.

    Args:
        channels: channels of the output, and of the input unless `in_channels` says otherwise; `group` divides them.
        kernel_size, stride, pad, dilation: of the sampling grid; an int or (height, width).
        group: number of groups G, each with its own places and weights.
        offset_scale: multiplies the regular grid and the learned offsets alike.
        dw_kernel_size: odd size of a depthwise convolution before the offsets and masks; None leaves it out.
        center_feature_scale: mix in the value at the window's middle, by a learned weight for each group.
        remove_center: leave the middle tap out.
        output_bias: whether output_proj has a bias.
        without_pointwise: leave value_proj and output_proj out.
        in_channels: channels of the input where they differ from `channels`; value_proj then changes the count.
        mask_init: initial bias of the masks. With 0, the released initialisation, the output is exactly output_proj's
            bias and only the masks get a gradient in the first step. With 1 / K (K taps) the operator starts as the
            mean over its window.
        center_mask_init: that of the middle tap, where it differs; None for `mask_init`. With 1, and the rest 0, the
            operator starts as the identity and the module as its two projections.
        fuse_projections: compute value_proj and offset_mask as one matrix product, and their gradients as one, where
            nothing stands between the input and both (same function, same state dict); see `can_fuse_projections`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        in_channels: int | None = None,
        mask_init: float = 0.0,
        center_mask_init: float | None = None,
        fuse_projections: bool = True,
    ):
        super().__init__()
        in_channels = channels if in_channels is None else in_channels
        self.geometry = make_geometry(kernel_size, stride, pad, dilation, group, offset_scale, remove_center)
        if channels < 1 or channels % group:
            raise ValueError(f"group: expected a divisor of channels={channels}, got {group}")
        if without_pointwise and in_channels != channels:
            raise ValueError(
                f"without_pointwise: expected in_channels equal to channels={channels}, got {in_channels}; "
                "the projection that changes the count is left out"
            )
        if dw_kernel_size is not None and (dw_kernel_size < 1 or dw_kernel_size % 2 == 0):
            raise ValueError(f"dw_kernel_size: expected an odd size or None, got {dw_kernel_size}")
        if center_mask_init is not None and (remove_center or not all(k % 2 for k in self.geometry.kernel_size)):
            raise ValueError("center_mask_init: expected None, since this window has no middle tap")
        self.in_channels = in_channels
        self.channels = channels
        self.without_pointwise = without_pointwise
        self.center_feature_scale = center_feature_scale
        self.mask_init = mask_init
        self.center_mask_init = center_mask_init
        self.fuse_projections = fuse_projections

        self.offset_mask = nn.Linear(in_channels, offset_mask_channels(group, kernel_size, remove_center))
        self.offset_mask_dw = None
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                in_channels, in_channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=in_channels
            )
        if not without_pointwise:
            self.value_proj = nn.Linear(in_channels, channels)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released initialisation, with `mask_init` and `center_mask_init` as the bias of the masks."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        groups, taps = self.geometry.groups, self.geometry.taps
        with torch.no_grad():
            masks = self.offset_mask.bias[: 3 * groups * taps].view(groups, 3 * taps)[:, 2 * taps :]
            masks.fill_(self.mask_init)
            if self.center_mask_init is not None:
                masks[:, taps // 2] = self.center_mask_init
        if self.offset_mask_dw is not None:
            self.offset_mask_dw.reset_parameters()
        if not self.without_pointwise:
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def forward(self, input: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Args:
            input: (N, H, W, in_channels), or (N, L, in_channels) with L = H * W.
            shape: (H, W) of a three-dimensional input; a square where it is left out.

        Returns:
            (N, H_out, W_out, channels), or (N, H_out * W_out, channels) for a three-dimensional input.

        Raises:
            ValueError: a shape that does not fit.
        """
        x = input if input.dim() == 4 and shape is None else self._as_map(input, shape)
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"input: expected {self.in_channels} channels in the last dimension, got shape {tuple(input.shape)}; "
                "channels come last, use .permute(0, 2, 3, 1) on NCHW tensors"
            )
        if self.fuse_projections and self.can_fuse_projections():
            packed, packed_bias = self._project_at_once(x)
            if self._output_follows():
                weight, bias = self.output_proj.weight, self.output_proj.bias
                y = dcnv4_packed_linear(
                    packed, weight, bias, packed_bias, channels=self.channels, **self.geometry._asdict()
                )
                return y.flatten(1, 2) if input.dim() == 3 else y
            y = dcnv4_packed(packed, packed_bias, channels=self.channels, **self.geometry._asdict())
            value = packed[..., -self.channels :]
        else:
            value, offset_mask = self._project(x)
            y = dcnv4(value, offset_mask, **self.geometry._asdict())
        if self.center_feature_scale:
            y = self._mix_center(y, value)
        if not self.without_pointwise:
            y = self.output_proj(y)
        return y.flatten(1, 2) if input.dim() == 3 else y

    def starts_at_zero(self) -> bool:
        """Whether every mask is 0 at initialisation, so that the operator's output is."""
        return self.mask_init == 0 and self.center_mask_init in (None, 0)

    def can_fuse_projections(self) -> bool:
        """Whether value and offset_mask are plain products of one input.

        Not with a depthwise convolution, without projections or their biases, where the output's positions are not the
        input's, or where a projection has been replaced, wrapped or hooked (an adapter, a quantised or offloaded
        layer), whose own forward must run.
        """
        return (
            self.offset_mask_dw is None
            and not self.without_pointwise
            and self._keeps_positions()
            and all(_is_plain_linear(p) and p.bias is not None for p in (self.value_proj, self.offset_mask))
        )

    def _output_follows(self) -> bool:
        """Whether output_proj is a plain product of the operator's output."""
        return not self.center_feature_scale and _is_plain_linear(self.output_proj)

    def _project_at_once(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """offset_mask, padding and value of x (N, H, W, in_channels), side by side, as one matrix product.

        And its bias, where the operator is to compute the gradient; None where the product does.
        """
        weights, biases = zip(*((p.weight, p.bias) for p in (self.offset_mask, self.value_proj)), strict=True)
        width = sum(len(bias) for bias in biases)
        if padding := _padded_width(width, self.channels, x.is_cuda) - width:
            weights = (weights[0], weights[0].new_zeros(padding, self.in_channels), weights[1])
            biases = (biases[0], biases[0].new_zeros(padding), biases[1])
        weight, bias = torch.cat(weights), torch.cat(biases)
        x = x.contiguous()  # of a view in another order torch.compile makes a product and a pass that adds the bias
        # With center_feature_scale the value has a gradient that the operator does not see.
        wants_sums = torch.is_grad_enabled() and bias.requires_grad and not self.center_feature_scale
        if not wants_sums or has_linear_kernel(x, weight, backward=True):
            return linear(x, weight, bias), None
        return linear(x, weight, bias.detach()), bias

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """value (N, H, W, channels) and offset_mask (N, H_out, W_out, P) of x (N, H, W, in_channels)."""
        if self.without_pointwise:
            value = x  # as it lies: the operator reads slices in place
        else:
            x = x.contiguous()  # before each product, as in _project_at_once
            value = self.value_proj(x)
        if self.offset_mask_dw is not None:
            x = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return value, self.offset_mask(self._at_centers(x).contiguous())

    def _mix_center(self, y: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """y * (1 - s) + value * s with s = sigmoid(linear(y)), one s for each group."""
        scale = F.linear(y, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
        scale = scale.repeat_interleave(self.channels // self.geometry.groups, dim=-1)
        return y * (1 - scale) + self._at_centers(value) * scale

    def _keeps_positions(self) -> bool:
        """Whether output position p is centred on input position p and there are as many of both."""
        geometry = self.geometry
        return geometry.stride == (1, 1) and all(
            2 * pad == dilation * (size - 1)
            for size, pad, dilation in zip(geometry.kernel_size, geometry.padding, geometry.dilation, strict=True)
        )

    def _at_centers(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, H, W, C) at the middle of each output position's window, clamped to the image: (N, H_out, W_out, C).

        The released module has no such step: it knows only stride 1 and padding that keeps the size.
        """
        if self._keeps_positions():
            return x
        geometry = self.geometry
        for axis, size_out in enumerate(geometry.output_size(x.shape[1], x.shape[2])):
            center = (geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)) >> 1
            places = torch.arange(size_out, device=x.device) * geometry.stride[axis] + center - geometry.padding[axis]
            x = x.index_select(1 + axis, places.clamp(0, x.shape[1 + axis] - 1))
        return x

    @staticmethod
    def _as_map(input: torch.Tensor, shape: tuple[int, int] | None) -> torch.Tensor:
        """The input as (N, H, W, C)."""
        if input.dim() == 4:
            if tuple(shape) != tuple(input.shape[1:3]):
                raise ValueError(f"shape: expected {tuple(input.shape[1:3])}, the input's own, or None; got {shape}")
            return input
        if input.dim() != 3:
            raise ValueError(f"input: expected (N, H, W, C) or (N, L, C), got shape {tuple(input.shape)}")
        length = input.shape[1]
        height, width = (round(length**0.5),) * 2 if shape is None else shape
        if height * width != length:
            raise ValueError(
                f"shape: expected (H, W) with H * W = {length}, the input's length, "
                f"got {'None, and the length is not a square' if shape is None else tuple(shape)}"
            )
        return input.unflatten(1, (height, width))

    def extra_repr(self) -> str:
        geometry = self.geometry
        return (
            f"{self.in_channels}, {self.channels}, group={geometry.groups}, {geometry.describe()}, "
            f"offset_scale={geometry.offset_scale}"
        )
