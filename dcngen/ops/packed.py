"""dcnv4 of one tensor that holds offset_mask and input side by side, and whose gradient is one tensor again.

Where one matrix product makes both, its backward wants both gradients in one buffer. With two tensors they would be
concatenated first: a pass over memory as long as a third of the operator's own backward. And the product's bias wants
the gradient's sum over all pixels, which the kernel has at hand and a pass over memory would compute again.
"""

from __future__ import annotations

import torch

from . import launch
from .backends import native_library
from .dcnv4 import (
    SCALAR_COUNT,
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
from .reference import reference_forward, with_bias_gradient

SMALL_MAP = 4  # pixels a side: kSide of kernels/cuda/small_map.cuh

_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(f"dcnv4_packed(Tensor packed, int channels, {SCALARS}, Tensor? packed_bias=None) -> Tensor", tags=_TAGS)
_OF_BACKWARD = f"(Tensor grad_output, Tensor packed, int channels, {SCALARS})"
library.define(f"dcnv4_packed_backward{_OF_BACKWARD} -> Tensor", tags=_TAGS)
library.define(f"dcnv4_packed_backward_with_sums{_OF_BACKWARD} -> (Tensor, Tensor)", tags=_TAGS)
_forward_op = torch.ops.dcngen.dcnv4_packed.default
_backward_op = torch.ops.dcngen.dcnv4_packed_backward.default
_backward_with_sums_op = torch.ops.dcngen.dcnv4_packed_backward_with_sums.default


def dcnv4_packed(
    packed: torch.Tensor,
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
    """`dcnv4(packed[..., -channels:], packed[..., :-channels])`, with one gradient for both; see `dcnv4`.

    Args:
        packed: (N, H, W, P): the 3 * G * K channels of offset_mask, then padding, which is not read and whose gradient
            is 0, then the G * D = channels of the input.
        packed_bias: (P,), a part of every pixel of packed already, as in `F.linear(x, weight, bias.detach())`. It does
            not change the result; its gradient, that of packed summed over all pixels, comes with the operator's own
            instead of a further pass over memory.
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
    check_packed_bias(packed, packed_bias)
    scalars = scalars_of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax)
    if needs_reference():
        geometry = geometry_of(scalars)
        packed = with_bias_gradient(*as_autocast(packed, packed_bias))
        return reference_forward(*split_packed(packed, channels, geometry), geometry)
    if torch.compiler.is_compiling() or not is_plain_eager(packed, packed if packed_bias is None else packed_bias):
        return _forward_op(packed, channels, *scalars, packed_bias)
    if torch.is_grad_enabled() and (packed.requires_grad or (packed_bias is not None and packed_bias.requires_grad)):
        return _EagerPacked.apply(packed, packed_bias, channels, scalars)
    return _forward(packed, channels, *scalars)


def check_packed_bias(packed: torch.Tensor, packed_bias: torch.Tensor | None) -> None:
    """Raises ValueError unless packed_bias has one number for each channel of packed, or is None."""
    if packed_bias is not None and tuple(packed_bias.shape) != (packed.shape[-1],):
        raise ValueError(
            f"packed_bias: expected the shape ({packed.shape[-1]},), a number for each channel of packed, "
            f"got {tuple(packed_bias.shape)}"
        )


def _forward(packed: torch.Tensor, channels: int, *scalars) -> torch.Tensor:
    return launch.forward(*split_packed(packed, channels, geometry_of(scalars)), scalars)


def _forward_impl(packed, channels, *scalars_and_bias):
    return _forward(packed, channels, *scalars_and_bias[:SCALAR_COUNT])


def _backward(grad_output: torch.Tensor, packed: torch.Tensor, channels: int, *scalars) -> torch.Tensor:
    return _write_gradient(launch.backward, grad_output, packed, channels, scalars)[0]


def _backward_with_sums(
    grad_output: torch.Tensor, packed: torch.Tensor, channels: int, *scalars
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of packed and its sums over all pixels, float32 (float64 for float64)."""
    grad, sums = _write_gradient(launch.backward_with_sums, grad_output, packed, channels, scalars)
    if sums is None:
        sums = grad.sum((0, 1, 2), dtype=_dtype_of_sums(packed))
    return grad, sums


def _dtype_of_sums(packed: torch.Tensor) -> torch.dtype:
    return torch.promote_types(packed.dtype, torch.float32)


def _write_gradient(backward, grad_output: torch.Tensor, packed: torch.Tensor, channels: int, scalars):
    """The gradient of packed, and what `backward` returned where it could write there."""
    input, offset_mask = split_packed(packed, channels, geometry_of(scalars))
    grad = packed.new_empty(packed.shape)
    parts = grad[..., packed.shape[3] - channels :], grad[..., : packed.shape[3] - channels]
    if all(tensor.stride(2) * tensor.element_size() % 16 == 0 == tensor.data_ptr() % 16 for tensor in parts):
        return grad, backward(grad_output, input, offset_mask, scalars, parts)
    # The copy engine, which writes whole pieces of 16 bytes, cannot write these.
    of_input, of_offset_mask = launch.backward(grad_output, input, offset_mask, scalars)
    parts[0].copy_(of_input)
    parts[1].zero_()[..., : of_offset_mask.shape[3]].copy_(of_offset_mask)
    return grad, None


for _key in ("CPU", "CUDA"):
    library.impl("dcnv4_packed", _forward_impl, _key)
    library.impl("dcnv4_packed_backward", _backward, _key)
    library.impl("dcnv4_packed_backward_with_sums", _backward_with_sums, _key)


@torch.library.register_fake("dcngen::dcnv4_packed", lib=library)
def _forward_fake(packed, channels, *scalars_and_bias):
    split_packed(packed, channels, geometry_of(scalars_and_bias[:SCALAR_COUNT]))
    return packed.new_empty((*packed.shape[:3], channels))


@torch.library.register_fake("dcngen::dcnv4_packed_backward", lib=library)
def _backward_fake(grad_output, packed, channels, *scalars):
    return packed.new_empty(packed.shape)


@torch.library.register_fake("dcngen::dcnv4_packed_backward_with_sums", lib=library)
def _backward_with_sums_fake(grad_output, packed, channels, *scalars):
    return packed.new_empty(packed.shape), packed.new_empty(packed.shape[3], dtype=_dtype_of_sums(packed))


def _setup_context(ctx, inputs, output):
    packed, ctx.channels, *scalars, packed_bias = inputs
    ctx.scalars = tuple(scalars)
    ctx.save_for_backward(packed, packed_bias)


def _gradients(ctx, grad_output, wants_packed: bool, wants_bias: bool):
    """Of packed and of packed_bias."""
    packed, packed_bias = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradients must be differentiable themselves
        geometry = geometry_of(ctx.scalars)
        shifted = with_bias_gradient(packed, packed_bias)
        output = reference_forward(*split_packed(shifted, ctx.channels, geometry), geometry)
        wanted = packed if wants_packed else None, packed_bias if wants_bias else None
        return gradients_of(output, wanted, grad_output)
    return packed_gradients(grad_output, packed, packed_bias if wants_bias else None, ctx.channels, ctx.scalars)


def gradients_of(output: torch.Tensor, inputs, grad_output: torch.Tensor) -> list[torch.Tensor | None]:
    """Differentiable gradients of the inputs, None for None."""
    found = iter(torch.autograd.grad(output, [t for t in inputs if t is not None], grad_output, create_graph=True))
    return [None if t is None else next(found) for t in inputs]


def packed_gradients(grad_output, packed, packed_bias, channels: int, scalars):
    """Of packed, and of packed_bias where there is one, by the kernels."""
    plain = is_plain_eager(packed, packed) and is_plain_gradient(grad_output)
    if packed_bias is not None and _kernels_have_sums(packed, channels, scalars):
        run = _backward_with_sums if plain else _backward_with_sums_op
        grad, sums = run(grad_output, packed, channels, *scalars)
        return grad, sums.to(packed_bias.dtype)
    grad = (_backward if plain else _backward_op)(grad_output, packed, channels, *scalars)
    if packed_bias is None:
        return grad, None
    # Outside the operator, where torch.compile sees it: its sum takes a fraction of torch's own time.
    return grad, grad.sum((0, 1, 2), dtype=_dtype_of_sums(packed)).to(packed_bias.dtype)


def _kernels_have_sums(packed: torch.Tensor, channels: int, scalars) -> bool:
    """Whether the backward leaves the sums of its gradients; the launch asks the library once more."""
    groups = scalars[8]
    return (
        for_window_kernels(packed, scalars)
        and channels // groups in (16, 32, 64)
        and packed.shape[3] % 8 == 0
        and _device_has_sums(packed.device.index)
    )


def for_window_kernels(packed: torch.Tensor, scalars) -> bool:
    """Whether the tensor and the window are what the CUDA kernels of half types for larger maps take.

    That is 3x3, stride 1, dilation 1, masks as they are, and a map of more than 4x4: smaller ones have kernels with
    neither the sums nor a product after them.
    """
    *window, _groups, _offset_scale, remove_center, softmax = scalars
    return (
        packed.is_cuda
        and packed.dtype in (torch.bfloat16, torch.float16)
        and max(packed.shape[1:3]) > SMALL_MAP
        and list(window[:4]) == [3, 3, 1, 1]
        and list(window[6:]) == [1, 1]
        and not remove_center
        and not softmax
    )


@torch.compiler.assume_constant_result
def _device_has_sums(device: int) -> bool:
    library = native_library("cuda", torch.bfloat16)
    return library is not None and launch.has_sums(library, device)


class _EagerPacked(torch.autograd.Function):
    """What the operator's autograd does, without the dispatcher."""

    @staticmethod
    def forward(ctx, packed, packed_bias, channels, scalars):
        _setup_context(ctx, (packed, channels, *scalars, packed_bias), None)
        return _forward(packed, channels, *scalars)

    @staticmethod
    def backward(ctx, grad_output):
        return *_gradients(ctx, grad_output, *ctx.needs_input_grad[:2]), None, None


def _registered_gradient(ctx, grad_output):
    wants_packed, *_, wants_bias = ctx.needs_input_grad
    of_packed, of_bias = _gradients(ctx, grad_output, wants_packed, wants_bias)
    return of_packed, *[None] * (1 + SCALAR_COUNT), of_bias


torch.library.register_autograd("dcngen::dcnv4_packed", _registered_gradient, setup_context=_setup_context, lib=library)


register_autocast("dcnv4_packed")
