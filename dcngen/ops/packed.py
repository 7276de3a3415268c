"""dcnv4 of one tensor that holds input and offset_mask side by side, and whose gradient is one tensor again.

Where one matrix product makes both, its backward wants both gradients in one buffer. With two tensors they would be
concatenated first: a pass over memory as long as a third of the operator's own backward.
"""

from __future__ import annotations

import torch

from . import launch
from .dcnv4 import (
    SCALARS,
    as_autocast,
    is_plain_eager,
    is_plain_gradient,
    library,
    needs_reference,
    register_autocast,
    scalars_of,
)
from .geometry import split_packed
from .plan import geometry_of
from .reference import reference_forward

_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(f"dcnv4_packed(Tensor packed, int channels, {SCALARS}) -> Tensor", tags=_TAGS)
library.define(
    f"dcnv4_packed_backward(Tensor grad_output, Tensor packed, int channels, {SCALARS}) -> Tensor", tags=_TAGS
)
_forward_op = torch.ops.dcngen.dcnv4_packed.default
_backward_op = torch.ops.dcngen.dcnv4_packed_backward.default


def dcnv4_packed(
    packed: torch.Tensor,
    *,
    channels: int,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> torch.Tensor:
    """`dcnv4(packed[..., :channels], packed[..., channels:])`, with one gradient for both; see `dcnv4`.

    Args:
        packed: (N, H, W, P): G * D = channels of the input, then the 3 * G * K of offset_mask, then padding, which is
            not read and whose gradient is 0.
        channels: of the input.
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax: as in `dcnv4`; the output
            has the size of the input.

    Returns:
        (N, H, W, channels), contiguous, in the dtype of packed.

    Raises:
        TypeError, ValueError: what does not fit, with what was expected.
        NativeLibraryError: backend "native" is forced and its library cannot be used.
        RuntimeError: the kernel could not be launched.
    """
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"packed: expected a torch.Tensor, got {type(packed).__name__}")
    scalars = scalars_of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax)
    if needs_reference():
        geometry = geometry_of(scalars)
        return reference_forward(*split_packed(*as_autocast(packed), channels, geometry), geometry)
    if torch.compiler.is_compiling() or not is_plain_eager(packed, packed):
        return _forward_op(packed, channels, *scalars)
    if torch.is_grad_enabled() and packed.requires_grad:
        return _EagerPacked.apply(packed, channels, scalars)
    return _forward(packed, channels, *scalars)


def _forward(packed: torch.Tensor, channels: int, *scalars) -> torch.Tensor:
    return launch.forward(*split_packed(packed, channels, geometry_of(scalars)), scalars)


def _backward(grad_output: torch.Tensor, packed: torch.Tensor, channels: int, *scalars) -> torch.Tensor:
    input, offset_mask = split_packed(packed, channels, geometry_of(scalars))
    grad = packed.new_empty(packed.shape)
    parts = grad[..., :channels], grad[..., channels:]
    if all(tensor.stride(2) * tensor.element_size() % 16 == 0 == tensor.data_ptr() % 16 for tensor in parts):
        launch.backward(grad_output, input, offset_mask, scalars, parts)
    else:  # the copy engine, which writes whole pieces of 16 bytes, cannot write these
        of_input, of_offset_mask = launch.backward(grad_output, input, offset_mask, scalars)
        parts[0].copy_(of_input)
        parts[1].zero_()[..., : of_offset_mask.shape[3]].copy_(of_offset_mask)
    return grad


for _key in ("CPU", "CUDA"):
    library.impl("dcnv4_packed", _forward, _key)
    library.impl("dcnv4_packed_backward", _backward, _key)


@torch.library.register_fake("dcngen::dcnv4_packed", lib=library)
def _forward_fake(packed, channels, *scalars):
    split_packed(packed, channels, geometry_of(scalars))
    return packed.new_empty((*packed.shape[:3], channels))


@torch.library.register_fake("dcngen::dcnv4_packed_backward", lib=library)
def _backward_fake(grad_output, packed, channels, *scalars):
    return packed.new_empty(packed.shape)


def _setup_context(ctx, inputs, output):
    packed, ctx.channels = inputs[:2]
    ctx.scalars = inputs[2:]
    ctx.save_for_backward(packed)


def _gradient(ctx, grad_output):
    (packed,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable itself
        geometry = geometry_of(ctx.scalars)
        output = reference_forward(*split_packed(packed, ctx.channels, geometry), geometry)
        return torch.autograd.grad(output, packed, grad_output, create_graph=True)[0]
    if is_plain_eager(packed, packed) and is_plain_gradient(grad_output):
        return _backward(grad_output, packed, ctx.channels, *ctx.scalars)
    return _backward_op(grad_output, packed, ctx.channels, *ctx.scalars)


class _EagerPacked(torch.autograd.Function):
    """What the operator's autograd does, without the dispatcher."""

    @staticmethod
    def forward(ctx, packed, channels, scalars):
        _setup_context(ctx, (packed, channels, *scalars), None)
        return _forward(packed, channels, *scalars)

    @staticmethod
    def backward(ctx, grad_output):
        return _gradient(ctx, grad_output), None, None


torch.library.register_autograd(
    "dcngen::dcnv4_packed",
    lambda ctx, grad_output: (_gradient(ctx, grad_output), *[None] * (1 + len(ctx.scalars))),
    setup_context=_setup_context,
    lib=library,
)


register_autocast("dcnv4_packed")
