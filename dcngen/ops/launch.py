"""Calls into the compiled kernels: a plan (plan.py), the allocation of the results, pointers and a stream."""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from .backends import native_library
from .fallback import reference_backward
from .native import DCNv4Params
from .plan import DTYPE_CODES, Gradients, Plan, geometry_of, prepare
from .reference import reference_forward

try:  # what the code of torch.compile allocates with, for the host's time; not a public name
    from torch._C._dynamo.guards import _empty_strided_cuda
except ImportError:
    _empty_strided_cuda = None


def forward_cpu(input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple) -> torch.Tensor:
    library = native_library("cpu", input.dtype, scalars[0] * scalars[1])
    if library is None:
        return _forward_reference(input, offset_mask, scalars)
    plan, input, offset_mask, _ = prepare(input, offset_mask, None, scalars)
    output = _new_output(plan, input)
    if library.dcngen_cpu_dcnv4_forward(
        plan.address, input.data_ptr(), offset_mask.data_ptr(), output.data_ptr(), torch.get_num_threads()
    ):
        raise RuntimeError(f"dcnv4 on the CPU: {library.dcngen_cpu_last_error().decode()}")
    return output


def backward_cpu(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    scalars: tuple,
    into: Gradients | None = None,
) -> Gradients:
    """The gradients of input and offset_mask, written to the tensors of `into` where there are some."""
    library = native_library("cpu", input.dtype, scalars[0] * scalars[1])
    if library is None:
        return _backward_reference(grad_output, input, offset_mask, scalars, into)
    plan, input, offset_mask, grad_output = prepare(input, offset_mask, grad_output, scalars, into)
    grad_input, grad_offset_mask = into or (input.new_empty(input.shape), offset_mask.new_empty(offset_mask.shape))
    if library.dcngen_cpu_dcnv4_backward(
        plan.address,
        grad_output.data_ptr(),
        input.data_ptr(),
        offset_mask.data_ptr(),
        grad_input.data_ptr(),
        grad_offset_mask.data_ptr(),
        torch.get_num_threads(),
    ):
        raise RuntimeError(f"dcnv4 backward on the CPU: {library.dcngen_cpu_last_error().decode()}")
    return grad_input, grad_offset_mask


def forward_cuda(input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple) -> torch.Tensor:
    library = native_library("cuda", input.dtype)
    if library is None:
        return _forward_reference(input, offset_mask, scalars)
    plan, input, offset_mask, _ = prepare(input, offset_mask, None, scalars)
    device = input.get_device()
    output = _new_cuda_output(plan, input, device)
    if library.dcngen_cuda_dcnv4_forward(
        plan.address,
        input.data_ptr(),
        offset_mask.data_ptr(),
        output.data_ptr(),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    ):
        raise cuda_error(library, device)
    return output


def backward_cuda(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    scalars: tuple,
    into: Gradients | None = None,
) -> Gradients:
    """As backward_cpu; the tensors of `into` begin on 16 bytes."""
    return _backward_cuda(grad_output, input, offset_mask, scalars, into, False)[0]


def backward_with_sums(
    grad_output: torch.Tensor, input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple, into: Gradients
) -> torch.Tensor | None:
    """Writes the gradients of input and offset_mask to `into`; returns their sums over all pixels, float32.

    Those of offset_mask come first. None where the kernels have none.
    """
    if input.is_cuda:
        return _backward_cuda(grad_output, input, offset_mask, scalars, into, True)[1]
    backward_cpu(grad_output, input, offset_mask, scalars, into)
    return None


def _backward_cuda(
    grad_output, input, offset_mask, scalars: tuple, into: Gradients | None, with_sums: bool
) -> tuple[Gradients, torch.Tensor | None]:
    """The gradients, and their sums where they are asked for and the kernels have them."""
    library = native_library("cuda", input.dtype)
    if library is None:
        return _backward_reference(grad_output, input, offset_mask, scalars, into), None
    grad_output, input, offset_mask = aligned(grad_output), aligned(input), aligned(offset_mask)
    plan, input, offset_mask, grad_output = prepare(input, offset_mask, grad_output, scalars, into)
    gradients = into or (input.new_empty(input.shape), offset_mask.new_empty(offset_mask.shape))
    device = input.get_device()
    if plan.workspace_bytes is None:
        _ask_about_backward(library, plan, device)
    with_sums = with_sums and plan.sums
    sums = input.new_empty(sum(g.shape[3] for g in gradients), dtype=torch.float32) if with_sums else None
    # Allocated per call: the caching allocator then orders its reuse on the stream that is current here.
    size = plan.workspace_bytes[with_sums]
    workspace = input.new_empty(size, dtype=torch.uint8) if size else None
    if library.dcngen_cuda_dcnv4_backward(
        plan.address,
        grad_output.data_ptr(),
        input.data_ptr(),
        offset_mask.data_ptr(),
        gradients[0].data_ptr(),
        gradients[1].data_ptr(),
        None if sums is None else sums.data_ptr(),
        None if workspace is None else workspace.data_ptr(),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    ):
        raise cuda_error(library, device)
    return gradients, sums


def _ask_about_backward(library: ctypes.CDLL, plan: Plan, device: int) -> None:
    with torch.cuda.device(device):  # the library asks the current device what it can do
        plan.sums = bool(library.dcngen_cuda_dcnv4_backward_has_sums(plan.address))
        size = library.dcngen_cuda_dcnv4_backward_workspace_size
        without, with_sums = size(plan.address, 0), size(plan.address, 1)
    if min(without, with_sums) < 0:
        raise cuda_error(library, device)
    plan.workspace_bytes = without, with_sums


def forward(input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple) -> torch.Tensor:
    return (forward_cuda if input.is_cuda else forward_cpu)(input, offset_mask, scalars)


def backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    scalars: tuple,
    into: Gradients | None = None,
) -> Gradients:
    return (backward_cuda if input.is_cuda else backward_cpu)(grad_output, input, offset_mask, scalars, into)


def _new_output(plan: Plan, input: torch.Tensor) -> torch.Tensor:
    # empty_like takes half the host's time of new_empty, but copies the strides of its model too.
    return torch.empty_like(input) if plan.output_is_like_input else input.new_empty(plan.output_shape)


def _new_cuda_output(plan: Plan, input: torch.Tensor, device: int) -> torch.Tensor:
    # Two thirds of empty_like's time; it knows the current device only.
    if _empty_strided_cuda is not None and torch._C._cuda_getDevice() == device:
        return _empty_strided_cuda(plan.output_shape, plan.output_strides, input.dtype)
    return _new_output(plan, input)


def forward_projected(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    save_output: bool,
    scalars: tuple,
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear(forward(...), weight, bias), in one kernel where there is one, and the forward's output.

    The output is empty unless `save_output`: then the one kernel need not write it.
    """
    library = native_library("cuda", input.dtype) if input.is_cuda else None
    if library is not None:
        plan, input, offset_mask, _ = prepare(input, offset_mask, None, scalars)
        if _projects(library, plan, input, offset_mask, weight, bias):
            output = input.new_empty(plan.output_shape if save_output else 0)
            device = input.get_device()
            projected = _new_cuda_output(plan, input, device)
            if library.dcngen_cuda_dcnv4_forward_projected(
                plan.address,
                input.data_ptr(),
                offset_mask.data_ptr(),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                output.data_ptr() if save_output else None,
                projected.data_ptr(),
                device,
                torch._C._cuda_getCurrentRawStream(device),
            ):
                raise cuda_error(library, device)
            return projected, output
    output = forward(input, offset_mask, scalars)
    return F.linear(output, weight, bias), output if save_output else output.new_empty(0)


def _projects(library: ctypes.CDLL, plan: Plan, input, offset_mask, weight, bias) -> bool:
    """Whether the kernel with the product takes these tensors."""
    if plan.projects is None:
        plan.projects = bool(library.dcngen_cuda_dcnv4_projected_applies(plan.address, input.get_device()))
    channels = input.shape[3]
    parameters = (weight,) if bias is None else (weight, bias)
    return (
        plan.projects
        and weight.shape == (channels, channels)
        and (bias is None or bias.shape == (channels,))
        and all(t.dtype is input.dtype and t.device == input.device and t.is_contiguous() for t in parameters)
        and all(t.data_ptr() % 16 == 0 for t in (input, offset_mask, weight))
    )


@functools.lru_cache
def has_projected_kernel(library: ctypes.CDLL, device: int) -> bool:
    """Whether forward_projected is one kernel on this device for shapes that fit it."""
    params = _params_that_fit()
    return bool(library.dcngen_cuda_dcnv4_projected_applies(ctypes.addressof(params), device))


@functools.lru_cache
def has_sums(library: ctypes.CDLL, device: int) -> bool:
    """Whether the backward has the gradients' sums on this device for shapes that fit it."""
    params = _params_that_fit()
    with torch.cuda.device(device):
        return bool(library.dcngen_cuda_dcnv4_backward_has_sums(ctypes.addressof(params)))


def _params_that_fit() -> DCNv4Params:
    params = DCNv4Params(1, 16, 16, 16, 16, 128, 56, 128, 128, 56, 56, 2, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1.0)
    params.dtype = DTYPE_CODES[torch.bfloat16]
    return params


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where it does not begin on the 16 bytes that the copy engine of the backward needs."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


def cuda_error(library: ctypes.CDLL, device: int) -> RuntimeError:
    message = library.dcngen_cuda_last_error().decode()
    major, minor = torch.cuda.get_device_capability(device)
    compiled = library.dcngen_cuda_architectures().decode()
    hint = ""
    if "kernel image" in message:  # cudaErrorNoKernelImageForDevice
        hint = f"; rebuild with DCNGEN_CUDA_ARCHITECTURES={major}{minor}, or use DCNGEN_BACKEND=reference"
    return RuntimeError(
        f"dcnv4 on cuda:{device} (compute capability {major}.{minor}, kernels compiled for {compiled}): {message}{hint}"
    )


# Below autograd nothing may record, whoever calls.
@torch.no_grad()
def _forward_reference(input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple) -> torch.Tensor:
    return reference_forward(input, offset_mask, geometry_of(scalars)).contiguous()


@torch.no_grad()
def _backward_reference(grad_output, input, offset_mask, scalars: tuple, into: Gradients | None) -> Gradients:
    grads = reference_backward(grad_output, input, offset_mask, geometry_of(scalars))
    if into is None:
        return grads
    into[0].copy_(grads[0])
    used = grads[1].shape[3]
    into[1][..., :used].copy_(grads[1])
    into[1][..., used:].zero_()
    return into
