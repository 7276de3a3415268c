"""Calls into the compiled kernels: one plan per distinct call, then pointers and a stream.

The host's time matters here (small maps, many layers), so everything that depends on shapes alone is worked out once
and kept: a call is a look-up, the allocation of the results and one C call.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from .backends import native_library
from .fallback import reference_backward
from .geometry import Geometry, check_tensors, make_geometry
from .native import DCNv4Params
from .reference import reference_forward

try:  # what the code of torch.compile allocates with, for the host's time; not a public name
    from torch._C._dynamo.guards import _empty_strided_cuda
except ImportError:
    _empty_strided_cuda = None

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # dcngen_dtype
_MAX_PLANS = 4096

_plans: dict[tuple, Plan] = {}

Gradients = tuple[torch.Tensor, torch.Tensor]  # of input and of offset_mask


@functools.lru_cache(maxsize=_MAX_PLANS)
def geometry_of(scalars: tuple) -> Geometry:
    """The operator's arguments after the tensors, in the order of its schema, checked; kept, since layers ask often."""
    kh, kw, sh, sw, ph, pw, dh, dw, groups, offset_scale, remove_center, softmax = scalars
    return make_geometry((kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, offset_scale, remove_center, softmax)


def forward_cpu(input: torch.Tensor, offset_mask: torch.Tensor, scalars: tuple) -> torch.Tensor:
    library = native_library("cpu", input.dtype, scalars[0] * scalars[1])
    if library is None:
        return _forward_reference(input, offset_mask, scalars)
    plan, input, offset_mask, _ = _prepare(input, offset_mask, None, scalars)
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
    plan, input, offset_mask, grad_output = _prepare(input, offset_mask, grad_output, scalars, into)
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
    plan, input, offset_mask, _ = _prepare(input, offset_mask, None, scalars)
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
        raise _cuda_error(library, device)
    return output


def backward_cuda(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    scalars: tuple,
    into: Gradients | None = None,
) -> Gradients:
    """As backward_cpu; the tensors of `into` begin on 16 bytes."""
    library = native_library("cuda", input.dtype)
    if library is None:
        return _backward_reference(grad_output, input, offset_mask, scalars, into)
    grad_output, input, offset_mask = _aligned(grad_output), _aligned(input), _aligned(offset_mask)
    plan, input, offset_mask, grad_output = _prepare(input, offset_mask, grad_output, scalars, into)
    grad_input, grad_offset_mask = into or (input.new_empty(input.shape), offset_mask.new_empty(offset_mask.shape))
    device = input.get_device()
    if plan.workspace_bytes is None:
        with torch.cuda.device(device):  # the library asks the current device what it can do
            plan.workspace_bytes = library.dcngen_cuda_dcnv4_backward_workspace_size(plan.address)
        if plan.workspace_bytes < 0:
            raise _cuda_error(library, device)
    # Allocated per call: the caching allocator then orders its reuse on the stream that is current here.
    workspace = input.new_empty(plan.workspace_bytes, dtype=torch.uint8) if plan.workspace_bytes else None
    if library.dcngen_cuda_dcnv4_backward(
        plan.address,
        grad_output.data_ptr(),
        input.data_ptr(),
        offset_mask.data_ptr(),
        grad_input.data_ptr(),
        grad_offset_mask.data_ptr(),
        None if workspace is None else workspace.data_ptr(),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    ):
        raise _cuda_error(library, device)
    return grad_input, grad_offset_mask


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
        plan, input, offset_mask, _ = _prepare(input, offset_mask, None, scalars)
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
                raise _cuda_error(library, device)
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
    params = DCNv4Params(1, 8, 8, 8, 8, 128, 56, 128, 128, 56, 56, 2, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1.0)
    params.dtype = _DTYPE_CODES[torch.bfloat16]
    return bool(library.dcngen_cuda_dcnv4_projected_applies(ctypes.addressof(params), device))


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where it does not begin on the 16 bytes that the copy engine of the backward needs."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.contiguous_format)


class Plan:
    """One call's checked shapes and its C parameters, at an address that lives as long as the plan."""

    __slots__ = (
        "address", "copies", "geometry", "output_is_like_input", "output_shape", "output_strides", "params", "projects",
        "workspace_bytes",
    )  # fmt: skip

    def __init__(self, input, offset_mask, grad_output, scalars: tuple, into: Gradients | None):
        self.geometry = geometry_of(scalars)
        height_out, width_out = check_tensors(input, offset_mask, self.geometry)
        self.output_shape = (input.shape[0], height_out, width_out, input.shape[3])
        if grad_output is not None:
            _check_gradient(grad_output, input, self.output_shape)
        channels, row = input.shape[3], width_out * input.shape[3]
        self.output_strides = (height_out * row, row, channels, 1)
        self.output_is_like_input = input.shape == self.output_shape and input.is_contiguous()
        strides = [pixel_stride(t) for t in (input, offset_mask, grad_output) if t is not None]
        self.copies = tuple(stride is None for stride in strides) if None in strides else None
        self.params = _params(input, offset_mask, self.output_shape, self.geometry, strides)
        self.params.deterministic = grad_output is not None and torch.are_deterministic_algorithms_enabled()
        if into is not None:
            self.params.grad_input_pixel_stride = into[0].stride(2)
            self.params.grad_offset_mask_pixel_stride = into[1].stride(2)
            self.params.offset_mask_channels = into[1].shape[3]
        self.address = ctypes.addressof(self.params)
        self.workspace_bytes: int | None = None  # asked of the CUDA library at the first backward
        self.projects: bool | None = None  # likewise at the first forward_projected


def _check_gradient(grad_output: torch.Tensor, input: torch.Tensor, output_shape: tuple[int, ...]) -> None:
    """Raises unless grad_output is of the output's shape, dtype and device: the kernels read it as such."""
    if tuple(grad_output.shape) != tuple(output_shape):
        raise ValueError(
            f"grad_output: expected the output's shape {tuple(output_shape)}, got {tuple(grad_output.shape)}"
        )
    if grad_output.dtype != input.dtype or grad_output.device != input.device:
        raise TypeError(
            f"grad_output: expected {input.dtype} on {input.device} as input, got {grad_output.dtype} on "
            f"{grad_output.device}; convert it with .to(input)"
        )


def pixel_stride(tensor: torch.Tensor) -> int | None:
    """Elements from pixel to pixel of a channels-last tensor whose pixels are dense among themselves, else None.

    It is the number of channels where the tensor is contiguous, more where it is a slice of a wider one.
    """
    if tensor.is_contiguous():
        return tensor.shape[3]
    _, height, width, channels = tensor.shape
    strides = tensor.stride()
    pixel = strides[2] if width > 1 else strides[1] if height > 1 else strides[0]
    expected = (height * width * pixel, width * pixel, pixel, 1)
    regular = all(n == 1 or s == e for n, s, e in zip(tensor.shape, strides, expected, strict=True))
    return pixel if regular and pixel >= channels else None


def _params(input, offset_mask, output_shape, geometry: Geometry, strides: list[int | None]) -> DCNv4Params:
    batch, height, width, channels = input.shape
    sizes = (batch, height, width, *output_shape[1:3])
    # Where a tensor is copied first its copy is contiguous; results are always allocated so.
    contiguous = (channels, offset_mask.shape[3], channels)
    strides = [c if s is None else s for c, s in zip(contiguous, strides, strict=False)]
    if len(strides) == 2:
        strides.append(channels)
    pairs = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    return DCNv4Params(
        *sizes,
        *strides,
        channels,
        offset_mask.shape[3],
        offset_mask.shape[3],
        geometry.groups,
        channels // geometry.groups,
        *(value for pair in pairs for value in pair),
        geometry.offset_scale,
        geometry.remove_center,
        geometry.softmax,
        _DTYPE_CODES[input.dtype],
    )


def _prepare(input, offset_mask, grad_output, scalars: tuple, into: Gradients | None = None):
    """The plan of this call, and the tensors as the kernels can read them."""
    key = (
        input.shape,
        input.stride(),
        input.dtype,
        input.get_device(),
        offset_mask.shape,
        offset_mask.stride(),
        offset_mask.dtype,
        offset_mask.get_device(),
        scalars,
    )
    if grad_output is not None:
        of_grad = grad_output.shape, grad_output.stride(), grad_output.dtype, grad_output.get_device()
        of_results = None if into is None else (into[0].stride(2), into[1].stride(2), into[1].shape[3])
        key = (key, of_grad, of_results, torch.are_deterministic_algorithms_enabled())
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(input, offset_mask, grad_output, scalars, into)
        if len(_plans) >= _MAX_PLANS:  # a plan is cheap to make again
            _plans.clear()
        _plans[key] = plan
    if plan.copies is not None:
        tensors = (input, offset_mask, grad_output)
        copied = [t.contiguous() if copy else t for t, copy in zip(tensors, plan.copies, strict=False)]
        input, offset_mask, grad_output = (*copied, None) if len(copied) == 2 else copied
    return plan, input, offset_mask, grad_output


def _cuda_error(library: ctypes.CDLL, device: int) -> RuntimeError:
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
