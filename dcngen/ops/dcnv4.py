"""The public operator and its registration with torch: schema, fake, autograd, autocast.

The kernels are registered as `torch.ops.dcngen.dcnv4` and `dcnv4_backward`, so that torch.compile, export, FakeTensor
and dispatch modes see one opaque operator each.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.autograd import forward_ad

from . import launch
from .geometry import as_number, as_pair, check_tensors
from .plan import geometry_of
from .reference import reference_forward

SCALARS = (
    "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, "
    "int groups, float offset_scale, bool remove_center, bool softmax"
)

SCALAR_COUNT = SCALARS.count(",") + 1

library = torch.library.Library("dcngen", "DEF")
library.define(f"dcnv4(Tensor input, Tensor offset_mask, {SCALARS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define(
    f"dcnv4_backward(Tensor grad_output, Tensor input, Tensor offset_mask, {SCALARS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    library.impl("dcnv4", lambda input, offset_mask, *scalars: launch.forward(input, offset_mask, scalars), _key)
    library.impl("dcnv4_backward", lambda grad, input, om, *scalars: launch.backward(grad, input, om, scalars), _key)

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

# By name, not by attribute: looked up at every call.
_dispatch_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_profiler_enabled, _autocast_enabled = torch._C._autograd._profiler_enabled, torch.is_autocast_enabled

_forward_op = torch.ops.dcngen.dcnv4.default
_backward_op = torch.ops.dcngen.dcnv4_backward.default


def dcnv4(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> torch.Tensor:
    """Deformable convolution v4 (Xiong et al., arXiv 2401.06197, section 3.1), channels last.

    y(p) = sum_k m_k * x(p + p_k + dp_k) for each group, x sampled bilinearly. A place counts only where
    -1 < x < W and -1 < y < H (a NaN does not); corners outside the image contribute 0. Coordinates, weights and sums
    are float32 for float32, float16 and bfloat16 tensors, with one rounding at the end (docs/operator.md, section 1,
    says what the CUDA kernels round besides).

    The compiled kernels compute it on CPU and CUDA. Plain torch, `dcnv4_reference`, does where they cannot: float64, a
    missing library, backward with create_graph=True (for second derivatives), torch.func transforms and forward-mode
    derivatives. It is the same function, slower. Under torch.autocast both tensors are cast to the autocast dtype.
    Channel slices of a wider contiguous tensor are read in place; other layouts are copied first. On CUDA the last
    bits of input's gradient may differ from run to run where samples are a pixel or more from their place on the grid;
    torch.use_deterministic_algorithms(True) makes them the same (docs/operator.md, section 1).

    Args:
        input: (N, H, W, G * D).
        offset_mask: (N, H_out, W_out, P) with P = offset_mask_channels(groups, kernel_size, remove_center), in the
            layout that offset_mask_channels describes; offsets in pixels. Tap k = i * kernel_h + j, i over the width.
        kernel_size, stride, padding, dilation: an int or (height, width).
        groups: G, which divides the channels. Fastest where D, the channels of a group, is a multiple of 8.
        offset_scale: multiplies the regular grid and the offsets alike.
        remove_center: leave the middle tap out.
        softmax: the masks are logits, softmax over the taps of a group (DCNv3's weights).

    Returns:
        (N, H_out, W_out, G * D), contiguous, in the dtype of input.

    Raises:
        TypeError, ValueError: what does not fit, with what was expected.
        NativeLibraryError: backend "native" is forced and its library cannot be used.
        RuntimeError: the kernel could not be launched.
    """
    if not (isinstance(input, torch.Tensor) and isinstance(offset_mask, torch.Tensor)):
        name, tensor = ("offset_mask", offset_mask) if isinstance(input, torch.Tensor) else ("input", input)
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    scalars = scalars_of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax)
    if needs_reference():
        return reference_forward(*as_autocast(input, offset_mask), geometry_of(scalars))
    if torch.compiler.is_compiling() or not is_plain_eager(input, offset_mask):
        return _forward_op(input, offset_mask, *scalars)
    if torch.is_grad_enabled() and (input.requires_grad or offset_mask.requires_grad):
        return _EagerDCNv4.apply(input, offset_mask, scalars)
    return launch.forward(input, offset_mask, scalars)


def scalars_of(kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, softmax) -> tuple:
    """The arguments after the tensors, in the order of the schema."""
    if not isinstance(groups, int):
        raise TypeError(f"groups: expected an int, got {groups!r}")
    if type(kernel_size) is type(stride) is type(padding) is type(dilation) is int:  # as most are: in half the time
        pairs = (kernel_size, kernel_size, stride, stride, padding, padding, dilation, dilation)
    else:
        pairs = (
            *as_pair(kernel_size, "kernel_size"),
            *as_pair(stride, "stride"),
            *as_pair(padding, "padding"),
            *as_pair(dilation, "dilation"),
        )
    return *pairs, groups, as_number(offset_scale, "offset_scale"), bool(remove_center), bool(softmax)


def needs_reference() -> bool:
    """Whether a torch.func transform or a forward-mode derivative is under way, which only plain torch can follow.

    Asked before anything else, since both happen within torch.compile too.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain_eager(input: torch.Tensor, offset_mask: torch.Tensor) -> bool:
    """Whether the dispatcher has nothing to add: no subclass, mode, autocast, tracer or profiler.

    Its way through Python costs about 10 us a call, more than the kernel itself on small maps.
    """
    on_cuda = input.is_cuda
    return (
        type(input) in PLAIN_TYPES
        and type(offset_mask) in PLAIN_TYPES
        and (offset_mask.is_cuda if on_cuda else input.is_cpu and offset_mask.is_cpu)
        and not _dispatch_modes()
        and _tracing_state() is None
        and not _profiler_enabled()
        and not (_autocast_enabled() if on_cuda else _autocast_enabled("cpu"))
        and not (input.is_neg() or offset_mask.is_neg())
    )


def is_plain_gradient(grad: torch.Tensor) -> bool:
    """Whether a gradient can go to the kernels as it is; one of `is_grads_batched=True` has no memory of its own."""
    return type(grad) in PLAIN_TYPES and not grad.is_neg() and not torch._C._functorch.is_legacy_batchedtensor(grad)


@torch.library.register_fake("dcngen::dcnv4", lib=library)
def _forward_fake(input, offset_mask, *scalars):
    height_out, width_out = check_tensors(input, offset_mask, geometry_of(scalars))
    return input.new_empty((input.shape[0], height_out, width_out, input.shape[3]))


@torch.library.register_fake("dcngen::dcnv4_backward", lib=library)
def _backward_fake(grad_output, input, offset_mask, *scalars):
    return input.new_empty(input.shape), offset_mask.new_empty(offset_mask.shape)


def _setup_context(ctx, inputs, output):
    input, offset_mask = inputs[:2]
    ctx.save_for_backward(input, offset_mask)
    ctx.scalars = inputs[2:]


def _backward(ctx, grad_output):
    return (*_gradients(ctx, grad_output), *[None] * len(ctx.scalars))


def _gradients(ctx, grad_output):
    input, offset_mask = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: these gradients must be differentiable themselves
        return _differentiable_backward(grad_output, input, offset_mask, ctx.scalars)
    if is_plain_eager(input, offset_mask) and is_plain_gradient(grad_output):
        return launch.backward(grad_output, input, offset_mask, ctx.scalars)
    return _backward_op(grad_output, input, offset_mask, *ctx.scalars)


def _differentiable_backward(grad_output, input, offset_mask, scalars):
    output = reference_forward(input, offset_mask, geometry_of(scalars))
    wanted = [t for t in (input, offset_mask) if t.requires_grad]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if t.requires_grad else None for t in (input, offset_mask)]


class _EagerDCNv4(torch.autograd.Function):
    """What the operator's autograd does, without the dispatcher."""

    @staticmethod
    def forward(ctx, input, offset_mask, scalars):
        ctx.save_for_backward(input, offset_mask)
        ctx.scalars = scalars
        return launch.forward(input, offset_mask, scalars)

    @staticmethod
    def backward(ctx, grad_output):
        return (*_gradients(ctx, grad_output), None)


torch.library.register_autograd("dcngen::dcnv4", _backward, setup_context=_setup_context, lib=library)


def register_autocast(name: str) -> None:
    """Gives the operator `name` its rule on both device types: tensors are cast to the autocast dtype."""
    op = getattr(torch.ops.dcngen, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl(name, partial(_autocast, op, device_type, without_autocast), key)


def _autocast(op, device_type: str, without_autocast: torch._C.DispatchKeySet, *arguments):
    with torch._C._ExcludeDispatchKeyGuard(without_autocast):
        return op(*(_cast(argument, device_type) for argument in arguments))


def _cast(argument, device_type: str):
    """As torch's own rules do: tensors of another device and float64 stay as they are."""
    if not isinstance(argument, torch.Tensor) or argument.device.type != device_type:
        return argument
    if not argument.is_floating_point() or argument.dtype == torch.float64:
        return argument
    return argument.to(torch.get_autocast_dtype(device_type))


def as_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as the operator's autocast rule has them, where it is not the operator that is called."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple(_cast(t, t.device.type) if t is not None and t.device.type in kinds else t for t in tensors)


register_autocast("dcnv4")
