"""Calls of the emulated kernels, with every tensor watched: what lies around it is neither read nor written."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from gpu.helpers import Geometry, assert_close, assert_sums, reference

from dcngen.ops import native
from dcngen.ops.plan import DTYPE_CODES, pixel_stride

ORDERS = 4
_AROUND = 64  # values before and behind a tensor; a multiple of 16 bytes


class Watched:
    """A tensor with the strides of another one, in memory of its own that is otherwise NaN."""

    def __init__(self, like: torch.Tensor, *, filled: bool, begin: int = 0):
        span = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1
        memory = torch.full((span + begin + 2 * _AROUND,), float("nan"), dtype=like.dtype)
        self.tensor = memory.as_strided(like.shape, like.stride(), _AROUND + begin)
        self._range = (self.tensor.data_ptr(), span * like.element_size())
        if filled:
            self.tensor.copy_(like)
        self._filled, self._memory, self._before = filled, memory, memory.clone()

    def announce(self, library: ctypes.CDLL) -> None:
        library.emulation_announce(*self._range)

    def check(self) -> None:
        """Nothing around it has changed, nor the tensor if it was there before."""
        if not self._filled:
            before = self._before.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())
            before.copy_(self.tensor)
        as_bits = torch.int32 if self._memory.element_size() == 4 else torch.int16
        assert torch.equal(self._memory.view(as_bits), self._before.view(as_bits)), "written outside a result"


class Results(NamedTuple):
    output: torch.Tensor
    grad_input: torch.Tensor
    grad_offset_mask: torch.Tensor
    sums: torch.Tensor | None


class Emulated:
    """The emulated library as a function of tensors on the CPU."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def _params(self, geometry: Geometry, value, offset_mask, grad, deterministic: bool) -> native.DCNv4Params:
        g = geometry
        strides = [pixel_stride(t) for t in (value, offset_mask, grad, value, offset_mask)]
        pairs = [g.kernel, *((one, one) for one in (g.stride, g.padding, g.dilation))]
        return native.DCNv4Params(
            *value.shape[:3], *g.output_size(), *strides, offset_mask.shape[3], g.groups, g.group_channels,
            *(number for pair in pairs for number in pair), g.offset_scale, g.remove_center, g.softmax,
            DTYPE_CODES[value.dtype], deterministic,
        )  # fmt: skip

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self.library.dcngen_cuda_last_error().decode())

    def __call__(
        self, geometry: Geometry, value, offset_mask, grad, *, deterministic=False, begin=0, order=0
    ) -> Results:
        """Forward and backward; gradients get the strides of what they belong to. The sums where there are any.

        begin: by how many values the tensors lie beside a multiple of 16 bytes.
        order: one of the ORDERS in which threads run that nothing keeps in order. Blocks begin with different ones.
        """
        library, params = self.library, self._params(geometry, value, offset_mask, grad, deterministic)
        address = ctypes.addressof(params)
        inputs = [Watched(t, filled=True, begin=begin) for t in (value, offset_mask)]
        grad_output = Watched(grad, filled=True, begin=begin)
        output, *gradients = (Watched(t, filled=False, begin=begin) for t in (grad, value, offset_mask))
        sums = None
        if library.dcngen_cuda_dcnv4_backward_has_sums(address):
            sums = Watched(torch.empty(offset_mask.shape[3] + value.shape[3]), filled=False)
        size = library.dcngen_cuda_dcnv4_backward_workspace_size(address, sums is not None)
        workspace = Watched(torch.empty(-(-size // 4)), filled=False) if size else None
        watched = [w for w in (*inputs, grad_output, output, *gradients, sums, workspace) if w is not None]
        for each in watched:
            each.announce(library)

        def pointer(of: Watched | None) -> int | None:
            return None if of is None else of.tensor.data_ptr()

        library.emulation_order(order)
        try:
            self._check(library.dcngen_cuda_dcnv4_forward(address, *map(pointer, (*inputs, output)), 0, None))
            arguments = (grad_output, *inputs, *gradients, sums, workspace)
            self._check(library.dcngen_cuda_dcnv4_backward(address, *map(pointer, arguments), 0, None))
        finally:
            library.emulation_forget()
        for each in watched:
            each.check()
        return Results(output.tensor, *(w.tensor for w in gradients), None if sums is None else sums.tensor)

    def check(self, geometry: Geometry, tensors, *, plain=None, reproducible=False, **options) -> Results:
        """Against float64, and `plain`, the formula in the tensors' dtype; twice, with opposite orders of threads.

        reproducible: whether the results have to be the same in both.
        """
        value, offset_mask, grad = tensors
        exact, used = reference(geometry, *tensors), 3 * geometry.groups * geometry.taps
        plain = plain or reference(geometry, *tensors, dtype=value.dtype)
        first = self(geometry, *tensors, **options)
        if first.sums is not None:
            assert_sums(geometry, first.sums, value, offset_mask[..., :used], grad, value.dtype)
        for got in (first, self(geometry, *tensors, order=ORDERS - 1, **options)):
            assert (got.grad_offset_mask[..., used:] == 0).all(), "the padding's gradient"
            assert_close(geometry, got[:3], exact, plain, value.dtype)
            if reproducible:
                assert all(map(torch.equal, got[:3], first[:3]))
            if got.sums is not None:  # added in a fixed order, whatever else is not
                assert torch.equal(got.sums, first.sums)
        return first
