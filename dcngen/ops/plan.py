"""The plan of a call: everything that depends on shapes alone.

The host's time matters here (small maps, many layers), so it is worked out once for each distinct call and kept: a call
is a look-up, the allocation of the results and one C call (launch.py).
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .geometry import Geometry, check_tensors, make_geometry
from .native import DCNv4Params

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # dcngen_dtype
_MAX_PLANS = 4096

_plans: dict[tuple, Plan] = {}

Gradients = tuple[torch.Tensor, torch.Tensor]  # of input and of offset_mask


@functools.lru_cache(maxsize=_MAX_PLANS)
def geometry_of(scalars: tuple) -> Geometry:
    """The operator's arguments after the tensors, in the order of its schema, checked; kept, since layers ask often."""
    kh, kw, sh, sw, ph, pw, dh, dw, groups, offset_scale, remove_center, softmax = scalars
    return make_geometry((kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, offset_scale, remove_center, softmax)


class Plan:
    """One call's checked shapes and its C parameters, at an address that lives as long as the plan."""

    __slots__ = (
        "address", "copies", "geometry", "output_is_like_input", "output_shape", "output_strides", "params", "projects",
        "sums", "workspace_bytes",
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
        # Asked of the CUDA library at the first backward: whether it has the gradients' sums; without and with them.
        self.sums: bool | None = None
        self.workspace_bytes: tuple[int, int] | None = None
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
        DTYPE_CODES[input.dtype],
    )


def prepare(input, offset_mask, grad_output, scalars: tuple, into: Gradients | None = None):
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
