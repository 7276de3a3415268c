"""Inputs, the float64 reference and the error rules shared by the tests of the CUDA kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from dcngen.ops import dcnv4_reference, offset_mask_channels
from dcngen.ops.geometry import make_geometry
from dcngen.ops.reference import padded_rows, place_of, sampling_places, split_offset_mask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One unit in the last place at 1, by dtype: the scale on which "twice plain torch" is compared.
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def has_window_backward() -> bool:
    """Whether the library holds code of sm_90 or newer, and so more than the plain backward."""
    return any(int(re.match(r"\d+", name)[0]) >= 90 for name in _architectures().split())


def needs_window_backward() -> None:
    if not has_window_backward():
        pytest.skip(f"the window backward needs code of sm_90, the library was compiled for {_architectures()}")


def _architectures() -> str:
    from dcngen.ops import native

    return native.cuda_library().dcngen_cuda_architectures().decode()


@contextmanager
def reproducible() -> Iterator[None]:
    """Far samples add to the input gradient in no fixed order unless torch is asked for one."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Geometry:
    """The size of a problem: images, map, groups, channels a group, and the operator's geometry."""

    batch: int
    height: int
    width: int
    groups: int
    group_channels: int
    kernel_size: int | tuple[int, int] = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False

    @property
    def options(self) -> dict:
        return {
            "kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding,
            "dilation": self.dilation, "groups": self.groups, "offset_scale": self.offset_scale,
            "remove_center": self.remove_center, "softmax": self.softmax,
        }  # fmt: skip

    @property
    def kernel(self) -> tuple[int, int]:
        return (self.kernel_size,) * 2 if isinstance(self.kernel_size, int) else self.kernel_size

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] - int(self.remove_center)

    def output_size(self) -> tuple[int, int]:
        def extent(size: int, kernel: int) -> int:
            return (size + 2 * self.padding - (self.dilation * (kernel - 1) + 1)) // self.stride + 1

        return extent(self.height, self.kernel[0]), extent(self.width, self.kernel[1])


def make(geometry: Geometry, dtype: torch.dtype, *, offset_std: float = 0.4, seed: int = 0, device: str = "cuda"):
    """(input, offset_mask, grad_output); the padding channels hold NaN, which nobody may read."""
    g, generator = geometry, torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    h, w = g.output_size()
    p, used = offset_mask_channels(g.groups, g.kernel_size, g.remove_center), 3 * g.groups * g.taps
    offset_mask = torch.full((g.batch, h, w, p), float("nan"), device=device)
    per_group = torch.cat([normal(g.batch, h, w, g.groups, 2 * g.taps) * offset_std,
                           normal(g.batch, h, w, g.groups, g.taps)], -1)  # fmt: skip
    offset_mask[..., :used] = per_group.flatten(-2)
    channels = g.groups * g.group_channels
    value, grad = normal(g.batch, g.height, g.width, channels), normal(g.batch, h, w, channels)
    return value.to(dtype), offset_mask.to(dtype), grad.to(dtype)


def reference(geometry: Geometry, value, offset_mask, grad, dtype=torch.float64):
    """Output and gradients of the plain-torch formula computed in ``dtype``."""
    value = value.detach().to(dtype).requires_grad_()
    offset_mask = offset_mask.detach().to(dtype).requires_grad_()
    output = dcnv4_reference(value, offset_mask, **geometry.options)
    return (output, *torch.autograd.grad(output, (value, offset_mask), grad.to(dtype)))


def storage_dtype_formula(geometry: Geometry, value, offset_mask, grad):
    """Output and gradients of the plain formula with values, weights and sums in the storage dtype.

    Places alone are float32: a bfloat16 coordinate of 100 is wrong by half a pixel.
    """
    value, offset_mask = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    made = make_geometry(**geometry.options)
    offsets, masks = split_offset_mask(offset_mask, made)
    places, rows = sampling_places(offsets, made), padded_rows(value, geometry.groups, value.dtype)
    output = rows.new_zeros(*offsets.shape[:4], rows.shape[1])
    for k in range(geometry.taps):
        place = place_of(places[..., k, :], tuple(value.shape[1:3]))
        mask = torch.where(place.counts, masks[..., k], 0)
        for index, weight in zip(place.corners, place.weights, strict=True):
            output = output + torch.nn.functional.embedding(index, rows) * (mask * weight).to(rows.dtype).unsqueeze(-1)
    output = output.flatten(-2)
    return (output, *torch.autograd.grad(output, (value, offset_mask), grad))


def native(geometry: Geometry, value, offset_mask, grad):
    """Output and gradients of the compiled operator, through the public function and autograd."""
    from dcngen.ops import dcnv4

    # What the allocator hands out next holds NaN, so that an element nobody wrote shows.
    for like in (grad, value, offset_mask):
        torch.full_like(like, float("nan"))
    value, offset_mask = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = dcnv4(value, offset_mask, **geometry.options)
    return (output, *torch.autograd.grad(output, (value, offset_mask), grad))


def assert_close(geometry: Geometry, got, exact, plain, dtype: torch.dtype, *, units: float = 2) -> None:
    """The worst error of each result is at most twice the plain-torch formula's, plus `units` in the last place.

    Half a unit is what the rounding of the result costs, where the formula happens to hit the exact value.
    """
    for name, ours, best, same_dtype in zip(
        ("output", "grad_input", "grad_offset_mask"), got, exact, plain, strict=True
    ):
        assert ours.dtype == dtype and ours.shape == best.shape, f"{name}: {ours.dtype} {tuple(ours.shape)}"
        if best.numel() == 0:
            continue
        assert not torch.isnan(ours).any(), f"{name} of {geometry}: NaN"
        scale = best.detach().abs().max().item()
        error = (ours.detach().double() - best.detach()).abs().max().item()
        allowed = 2 * (same_dtype.detach().double() - best.detach()).abs().max().item() + units * EPSILON[dtype] * scale
        assert error <= allowed, f"{name} of {geometry} in {dtype}: error {error:.3e}, allowed {allowed:.3e}"


def assert_sums(geometry: Geometry, got, value, offset_mask, grad, dtype: torch.dtype) -> None:
    """As exact as sums of independently rounded numbers: a few units of what rounding each of them alone gives.

    And twice what the plain formula errs in float32, which may see a place on the other side of a line of the grid.
    """
    _, of_value, of_numbers = reference(geometry, value, offset_mask, grad)
    plain = reference(geometry, value, offset_mask, grad, dtype=torch.float32)
    masks = offset_mask.double().unflatten(-1, (geometry.groups, 27))[..., 18:].abs().sum(-1)
    of_pixels = grad.double().unflatten(-1, (geometry.groups, -1)) * masks.nan_to_num().unsqueeze(-1)
    used, end = of_numbers.shape[3], len(got) - value.shape[3]
    for part, exact, single, terms in (
        (got[end:], of_value, plain[1], of_pixels.flatten(-2)),
        (got[:used], of_numbers, plain[2], of_numbers),
    ):
        scale = EPSILON[dtype] * (terms.square().sum((0, 1, 2)) + exact.square().sum((0, 1, 2))).sqrt()
        exact = exact.sum((0, 1, 2))
        error, of_plain = (part.double() - exact).abs(), (single.double().sum((0, 1, 2)) - exact).abs()
        usual = (of_plain / (scale + 1e-30)).median()  # of all channels: a place on the other side is one channel's
        allowed = (4 + 16 * usual) * scale + 2 * of_plain + 2 * EPSILON[dtype] * exact.abs() + 1e-6
        assert (error <= allowed).all(), (error / allowed).max()
    assert (got[used:end] == 0).all()


def check(geometry: Geometry, dtype: torch.dtype, **options) -> None:
    """The compiled operator against the float64 reference on fresh inputs."""
    tensors = make(geometry, dtype, **options)
    check_tensors(geometry, tensors, reference(geometry, *tensors, dtype=dtype), dtype)


def check_tensors(geometry: Geometry, tensors, plain, dtype: torch.dtype, *, units: float = 2) -> None:
    """The compiled operator against the float64 reference, and `plain`, on these inputs: alone and among many images.

    Small problems have a forward kernel of their own, so the images are repeated until the problem is none.
    """
    exact = reference(geometry, *tensors)
    assert_close(geometry, native(geometry, *tensors), exact, plain, dtype, units=units)
    if copies := copies_that_are_many(geometry):
        many = native(geometry, *(t.repeat(copies, 1, 1, 1) for t in tensors))
        of_last = [t[-geometry.batch :] for t in many]
        assert_close(geometry, of_last, exact, plain, dtype, units=units)


def copies_that_are_many(geometry: Geometry) -> int:
    """How often to repeat the images so that their tiles are more than a small problem's (`is_small` of kernels/cuda).

    0 where they are more by themselves, and where there are none.
    """
    height, width = geometry.output_size()
    tiles = geometry.batch * -(-height // 8) * -(-width // 8)
    most = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    return most // tiles + 1 if 0 < tiles <= most else 0
