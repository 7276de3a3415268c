"""F.linear with kernels of its own for many rows of few features, which memory limits: the projections on large maps.

On an H200 cuBLAS takes up to 1.6 times as long with a bias as without one there, and the bias's gradient is one more
pass over memory. These kernels add the bias for nothing, and sum the gradient's columns while they read it.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from .backends import native_library
from .dcnv4 import library, needs_reference, register_autocast
from .launch import aligned, cuda_error
from .plan import DTYPE_CODES

LEAST_ROWS = 2**15  # with half as many cuBLAS is as fast on an H200, but for the widest results

_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=_TAGS)
# The gradient of input, and sums over parts of the rows: (parts, out_features).
library.define("linear_backward(Tensor grad_output, Tensor weight_transposed) -> (Tensor, Tensor)", tags=_TAGS)
_op = torch.ops.dcngen.linear.default
_backward_op = torch.ops.dcngen.linear_backward.default


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, with kernels of its own where `has_linear_kernel`.

    Args:
        input: (..., in_features).
        weight, bias: (out_features, in_features) and (out_features,) or None.

    Returns:
        (..., out_features), contiguous where a kernel computes it. The bias's gradient is summed in float32.

    Raises:
        RuntimeError: as `F.linear`, or the kernel could not be launched.
    """
    if needs_reference() or not has_linear_kernel(input, weight) or not _fits(bias, weight):
        return F.linear(input, weight, bias)  # which says what does not fit
    return _op(input, weight, bias)


def has_linear_kernel(input: torch.Tensor, weight: torch.Tensor, *, backward: bool = False) -> bool:
    """Whether `linear` has a kernel for these tensors, under the autocast of the moment.

    On compute capability 9.0, for float16 and bfloat16, at least 2**15 rows, and from 128 or 256 features to 128, 192,
    ... 768. With `backward`: also one for the gradients of input and bias, which have it from 128 features to 384 at
    most, and from 256 to 256.
    """
    dtype = _cast_dtype(input)
    return (
        input.is_cuda
        and input.device == weight.device
        and dtype == _cast_dtype(weight)
        and weight.dim() == 2
        and weight.shape[1] == input.shape[-1]
        and _rows(input) >= LEAST_ROWS
        and _parts(input, dtype, *weight.shape) >= (1 if backward else 0)
    )


def _cast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The tensor's dtype once autocast has cast it."""
    casts = torch.is_autocast_enabled("cuda") and tensor.dtype != torch.float64
    return torch.get_autocast_dtype("cuda") if casts else tensor.dtype


def _fits(bias: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether the kernel can read the bias as one number for each row of weight."""
    return bias is None or (
        bias.shape == weight.shape[:1] and bias.device == weight.device and _cast_dtype(bias) == _cast_dtype(weight)
    )


def _rows(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _parts(rows: torch.Tensor, dtype: torch.dtype, out_features: int, in_features: int) -> int:
    """In how many parts the backward sums grad_output; 0 with a kernel for the forward alone, -1 without one."""
    fits = rows.is_cuda and dtype in (torch.bfloat16, torch.float16) and 0 < _rows(rows) < 2**31
    return _device_parts(rows.device.index, dtype, out_features, in_features) if fits else -1


@torch.compiler.assume_constant_result
def _device_parts(device: int, dtype: torch.dtype, out_features: int, in_features: int) -> int:
    found = native_library("cuda", dtype)
    return -1 if found is None else _library_parts(found, device, dtype, out_features, in_features)


@functools.lru_cache
def _library_parts(found, device: int, dtype: torch.dtype, out_features: int, in_features: int) -> int:
    return found.dcngen_cuda_linear_parts(1, in_features, out_features, DTYPE_CODES[dtype], device)


def linear_gradients(
    input: torch.Tensor, weight: torch.Tensor, grad_output: torch.Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of a linear layer's input, weight and bias, as wanted, in the dtype of grad_output.

    Differentiable where gradients are recorded.
    """
    wants_input, wants_weight, wants_bias = wanted
    of_input = of_weight = of_bias = None
    if wants_input:
        of_input, of_bias = _of_input_and_bias(grad_output, weight, wants_bias)
    elif wants_bias:
        of_bias = grad_output.flatten(0, -2).sum(0)
    if wants_weight:
        of_weight = grad_output.flatten(0, -2).t() @ input.flatten(0, -2)
    return of_input, of_weight, of_bias


def _of_input_and_bias(
    grad_output: torch.Tensor, weight: torch.Tensor, wants_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    one_kernel = (
        not torch.is_grad_enabled()
        and weight.dtype == grad_output.dtype
        and _rows(grad_output) >= LEAST_ROWS
        and _parts(grad_output, grad_output.dtype, *weight.shape) > 0
    )
    if not one_kernel:
        return grad_output @ weight, grad_output.flatten(0, -2).sum(0) if wants_bias else None
    of_input, sums = _backward_op(grad_output, weight.t().contiguous())
    return of_input, sums.sum(0).to(grad_output.dtype) if wants_bias else None


def _forward_impl(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not (_is_same_kind(input, weight) and _fits(bias, weight)) or _parts(input, input.dtype, *weight.shape) < 0:
        return F.linear(input, weight, bias).contiguous()
    input, weight = aligned(input.contiguous()), aligned(weight.contiguous())
    bias = None if bias is None else bias.contiguous()
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    _launch("forward", input, weight, bias, output, weight.shape)
    return output


def _backward_impl(grad_output: torch.Tensor, weight_transposed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grad_input, sums = _empty_gradients(grad_output, weight_transposed)
    shape = weight_transposed.shape[::-1]
    if not _is_same_kind(grad_output, weight_transposed) or _parts(grad_output, grad_output.dtype, *shape) < 1:
        torch.sum(grad_output.flatten(0, -2), 0, keepdim=True, dtype=sums.dtype, out=sums)
        return torch.matmul(grad_output, weight_transposed.t(), out=grad_input), sums
    grad_output, weight_transposed = aligned(grad_output.contiguous()), aligned(weight_transposed.contiguous())
    _launch("backward", grad_output, weight_transposed, grad_input, sums, shape)
    return grad_input, sums


def _is_same_kind(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _empty_gradients(grad_output: torch.Tensor, weight_transposed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    in_features, out_features = weight_transposed.shape
    parts = max(_parts(grad_output, grad_output.dtype, out_features, in_features), 1)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    sums = grad_output.new_empty(parts, out_features, dtype=dtype)
    return grad_output.new_empty(*grad_output.shape[:-1], in_features), sums


def _launch(direction: str, left, weight, third, fourth, features: tuple[int, int]) -> None:
    """Calls the kernel: left is input or grad_output, features (out_features, in_features)."""
    found, device = native_library("cuda", left.dtype), left.get_device()
    run = getattr(found, f"dcngen_cuda_linear_{direction}")
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (left, weight, third, fourth))
    stream = torch._C._cuda_getCurrentRawStream(device)
    if run(*pointers, _rows(left), features[1], features[0], DTYPE_CODES[left.dtype], device, stream):
        raise cuda_error(found, device)


for _key in ("CPU", "CUDA"):
    library.impl("linear", _forward_impl, _key)
    library.impl("linear_backward", _backward_impl, _key)


@torch.library.register_fake("dcngen::linear", lib=library)
def _forward_fake(input, weight, bias):
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("dcngen::linear_backward", lib=library)
def _backward_fake(grad_output, weight_transposed):
    return _empty_gradients(grad_output, weight_transposed)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx, grad_output):
    return linear_gradients(*ctx.saved_tensors, grad_output, ctx.needs_input_grad)


torch.library.register_autograd("dcngen::linear", _gradients, setup_context=_setup_context, lib=library)


register_autocast("linear")
