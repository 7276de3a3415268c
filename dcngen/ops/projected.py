"""dcnv4_packed and the matrix product that follows it in the layer, as one operator.

On compute capability 9.0 one kernel computes both: the operator's output goes from registers into the product and
reaches memory only where a backward will want it. Elsewhere it is the two calls one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import launch
from .backends import native_library
from .dcnv4 import (
    SCALAR_COUNT,
    SCALARS,
    is_plain_eager,
    library,
    needs_reference,
    register_autocast,
    scalars_of,
)
from .geometry import split_packed
from .linear_layer import linear, linear_gradients
from .packed import (
    check_packed_bias,
    dcnv4_packed,
    for_window_kernels,
    gradients_of,
    packed_gradients,
)
from .plan import geometry_of
from .reference import reference_forward, with_bias_gradient

library.define(
    f"dcnv4_packed_linear(Tensor packed, Tensor weight, Tensor? bias, int channels, bool save_output, {SCALARS}, "
    "Tensor? packed_bias=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Fewer leave warpgroups of an H200 without work, which was not measured.
LEAST_PIXELS = 2**16

_op = torch.ops.dcngen.dcnv4_packed_linear.default


def dcnv4_packed_linear(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed_bias: torch.Tensor | None = None,
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
    """`F.linear(dcnv4_packed(packed, packed_bias, ...), weight, bias)`, in one kernel where that is faster.

    It is one kernel on compute capability 9.0, for float16 and bfloat16, 128 channels in groups of 32 or 64, a 3x3
    window of stride and dilation 1, and maps and batches that fill the device. The operator's output is rounded to the
    dtype before the product, as it is between two calls.

    Args:
        packed, packed_bias, channels, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center,
            softmax: as in `dcnv4_packed`.
        weight, bias: (out, channels) and (out,) or None, as in `torch.nn.functional.linear`.

    Returns:
        (N, H, W, out), contiguous, in the dtype of packed.

    Raises:
        TypeError, ValueError, NativeLibraryError, RuntimeError: as `dcnv4_packed` and `F.linear`.
    """
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"packed: expected a torch.Tensor, got {type(packed).__name__}")
    scalars = scalars_of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax)
    check_packed_bias(packed, packed_bias)
    tensors = (packed, weight, bias, packed_bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_reference() or not _is_one_kernel(packed, weight, channels, scalars):
        output = dcnv4_packed(
            packed,
            packed_bias,
            channels=channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            offset_scale=offset_scale,
            remove_center=remove_center,
            softmax=softmax,
        )
        return linear(output, weight, bias)
    if torch.compiler.is_compiling() or not all(is_plain_eager(packed, t) for t in tensors[1:] if t is not None):
        return _op(packed, weight, bias, channels, needs_grad, *scalars, packed_bias)[0]
    if needs_grad:
        return _EagerLinear.apply(*tensors, channels, scalars)
    return _forward(packed, weight, bias, channels, False, *scalars)[0]


def _is_one_kernel(packed: torch.Tensor, weight: torch.Tensor, channels: int, scalars) -> bool:
    """Whether one kernel computes both and is faster; the launch asks the library once more about strides."""
    groups = scalars[8]
    return (
        for_window_kernels(packed, scalars)
        and channels == 128
        and groups in (2, 4)
        and tuple(weight.shape) == (channels, channels)
        and packed.numel() // packed.shape[-1] >= LEAST_PIXELS
        and _device_has_kernel(packed.device.index)
    )


@torch.compiler.assume_constant_result
def _device_has_kernel(device: int) -> bool:
    found = native_library("cuda", torch.bfloat16)
    return found is not None and launch.has_projected_kernel(found, device)


def _forward(packed, weight, bias, channels: int, save_output: bool, *scalars):
    input, offset_mask = split_packed(packed, channels, geometry_of(scalars))
    return launch.forward_projected(input, offset_mask, weight, bias, save_output, scalars)


def _forward_impl(packed, weight, bias, channels, save_output, *scalars_and_bias):
    return _forward(packed, weight, bias, channels, save_output, *scalars_and_bias[:SCALAR_COUNT])


for _key in ("CPU", "CUDA"):
    library.impl("dcnv4_packed_linear", _forward_impl, _key)


@torch.library.register_fake("dcngen::dcnv4_packed_linear", lib=library)
def _forward_fake(packed, weight, bias, channels, save_output, *scalars_and_bias):
    split_packed(packed, channels, geometry_of(scalars_and_bias[:SCALAR_COUNT]))
    output = packed.new_empty((*packed.shape[:3], channels) if save_output else (0,))
    return packed.new_empty((*packed.shape[:3], weight.shape[0])), output


def _setup_context(ctx, inputs, output):
    packed, weight, bias, ctx.channels, _, *scalars, packed_bias = inputs
    ctx.scalars = tuple(scalars)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(packed, weight, bias, packed_bias, output[1])


def _gradients(ctx, grad, wanted):
    """Of packed, weight, bias and packed_bias."""
    *tensors, output = ctx.saved_tensors
    packed, weight, bias, packed_bias = tensors
    if grad is None:
        return None, None, None, None
    if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
        geometry = geometry_of(ctx.scalars)
        shifted = with_bias_gradient(packed, packed_bias)
        result = F.linear(reference_forward(*split_packed(shifted, ctx.channels, geometry), geometry), weight, bias)
        return gradients_of(result, [t if want else None for t, want in zip(tensors, wanted, strict=True)], grad)
    if output.dim() == 1:  # of a call that did not expect a backward
        output = torch.ops.dcngen.dcnv4_packed.default(packed, ctx.channels, *ctx.scalars)
    of_packed = of_packed_bias = None
    wants_output = wanted[0] or wanted[3]
    of_output, of_weight, of_bias = linear_gradients(output, weight, grad, (wants_output, *wanted[1:3]))
    if wants_output:
        of_output = of_output.to(packed.dtype)  # a backward under autocast chooses its own
        of_packed, of_packed_bias = packed_gradients(
            of_output, packed, packed_bias if wanted[3] else None, ctx.channels, ctx.scalars
        )
    return of_packed, of_weight, of_bias, of_packed_bias


class _EagerLinear(torch.autograd.Function):
    """What the operator's autograd does, without the dispatcher."""

    @staticmethod
    def forward(ctx, packed, weight, bias, packed_bias, channels, scalars):
        projected, output = _forward(packed, weight, bias, channels, True, *scalars)
        ctx.channels, ctx.scalars = channels, scalars
        ctx.save_for_backward(packed, weight, bias, packed_bias, output)
        return projected

    @staticmethod
    def backward(ctx, grad):
        return *_gradients(ctx, grad, ctx.needs_input_grad[:4]), None, None


def _registered_gradient(ctx, grad, _):
    needs = ctx.needs_input_grad
    *of_parameters, of_packed_bias = _gradients(ctx, grad, (*needs[:3], needs[-1]))
    return *of_parameters, *[None] * (2 + SCALAR_COUNT), of_packed_bias


torch.library.register_autograd(
    "dcngen::dcnv4_packed_linear", _registered_gradient, setup_context=_setup_context, lib=library
)


register_autocast("dcnv4_packed_linear")
