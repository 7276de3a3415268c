"""Small cases through every kernel, to be run under compute-sanitizer (`make memory-check`); computes, checks nothing.

The maps are odd and smaller than a block's tile, so most copies and stores meet a border. Without torch's allocator
cache (the environment variable PYTORCH_NO_CUDA_MEMORY_CACHING) every tensor has an allocation of its own, beyond which
the checker sees an access.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch

from dcngen.ops import dcnv4_packed, has_linear_kernel, launch, linear_layer, native, projected

from . import helpers
from .helpers import DTYPES, Geometry, make, reproducible

SIZES = [(1, 1, 1), (3, 7, 9), (2, 13, 21)]
OFFSET_STDS = [0.2, 0.45, 1.0, 8.0]  # all near, few far, about half, nearly all
OTHER_GEOMETRIES = [
    Geometry(2, 13, 9, 4, 16, stride=2), Geometry(2, 12, 11, 2, 32, kernel_size=5, padding=2),
    Geometry(2, 9, 9, 2, 16, kernel_size=(3, 5)), Geometry(1, 9, 8, 2, 16, kernel_size=1, padding=0),
    Geometry(2, 10, 10, 2, 32, dilation=2, padding=2), Geometry(2, 10, 10, 2, 32, padding=0),
    Geometry(2, 9, 9, 2, 32, padding=2), Geometry(2, 9, 9, 4, 16, remove_center=True),
    Geometry(2, 9, 9, 4, 16, softmax=True), Geometry(2, 9, 9, 4, 32, offset_scale=2.0), Geometry(2, 5, 5, 5, 3),
]  # fmt: skip

Case = tuple[str, Callable[[], object]]


def operator_cases() -> Iterator[Case]:
    """Forward and backward: the window kernels, what they leave to others, and the plain kernels."""
    for dtype, group_channels, size, std in product(DTYPES, [8, 16, 32, 64], SIZES, OFFSET_STDS):
        geometry = Geometry(*size, 3, group_channels)
        yield f"{geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call(g, d, s)
    for dtype, geometry in product(DTYPES, OTHER_GEOMETRIES):
        yield f"{geometry} {dtype}", lambda g=geometry, d=dtype: call(g, d, 0.45)
    for dtype, group_channels, std in product(DTYPES, [16, 64], [0.45, 3.0]):
        geometry = Geometry(2, 13, 21, 3, group_channels)
        yield f"deterministic {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call_reproducibly(g, d, s)
        yield f"not finite {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call(g, d, s, not_finite=True)
    # Enough images and groups for the gradients' sums; in the second, several images a block.
    sums = [(43, 9, 10), (400, 5, 4)]
    for dtype, group_channels, size, std in product(DTYPES[1:], [16, 32, 64], sums, [0.2, 0.3, 3.0]):
        geometry = Geometry(*size, 3, group_channels)
        yield f"packed {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call_packed(g, d, s)


def many_cases() -> Iterator[Case]:
    """As operator_cases, with more tiles than a small problem's: the window forward and the kernel after it."""
    for dtype, group_channels, std in product(DTYPES, [8, 16, 32, 64], [0.2, 0.45, 1.0]):
        geometry = Geometry(1, 5, 9, 3, group_channels)
        geometry = replace(geometry, batch=helpers.copies_that_are_many(geometry))
        yield f"many {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call(g, d, s)


def whole_map_cases() -> Iterator[Case]:
    """The kernels for maps of at most 4x4 and 8x8 pixels."""
    sizes = [(3, 4, 4), (5, 3, 2), (3, 8, 8), (5, 7, 3)]
    for dtype, group_channels, size, std in product(DTYPES[1:], [16, 32, 64], sizes, [0.2, 8.0]):
        geometry = Geometry(*size, 3, group_channels)
        yield f"whole map {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call(g, d, s)
        yield f"whole map, packed {geometry} {dtype} {std}", lambda g=geometry, d=dtype, s=std: call_packed(g, d, s)


def projected_cases() -> Iterator[Case]:
    """The forward with output_proj, where the device has it."""
    if not launch.has_projected_kernel(native.cuda_library(), torch.cuda.current_device()):
        return
    dtypes = [torch.float16, torch.bfloat16]
    for dtype, group_channels, size, std, save in product(dtypes, [32, 64], SIZES, OFFSET_STDS, [True, False]):
        geometry = Geometry(*size, 128 // group_channels, group_channels)
        run = lambda g=geometry, d=dtype, s=std, save=save: call_projected(g, d, s, save)  # noqa: E731
        yield f"projected {geometry} {dtype} {std} save={save}", run


def linear_cases() -> Iterator[Case]:
    """The linear layer's kernels, where the device has them: one row, a tile in part, several tiles a warpgroup."""
    one = torch.empty(1, 128, device="cuda", dtype=torch.bfloat16)
    if not has_linear_kernel(one, one.expand(128, 128)):
        return
    sizes = [*product([128], [128, 192, 256, 320, 384]), (256, 256), (256, 384), (256, 704)]
    for dtype, rows, size in product(DTYPES[1:], [1, 100, 70000], sizes):
        yield f"linear {rows} {size} {dtype}", lambda d=dtype, r=rows, s=size: call_linear(r, *s, d)


def call(geometry: Geometry, dtype: torch.dtype, std: float, not_finite: bool = False) -> None:
    value, offset_mask, grad = make(geometry, dtype, offset_std=std)
    if not_finite:
        offset_mask[:, ::3, ::2, ::5] = float("nan")
        offset_mask[:, 1::3, ::2, 1::7] = float("inf")
    helpers.native(geometry, value, offset_mask, grad)


def call_reproducibly(geometry: Geometry, dtype: torch.dtype, std: float) -> None:
    with reproducible():
        call(geometry, dtype, std)


def call_packed(geometry: Geometry, dtype: torch.dtype, std: float) -> None:
    value, offset_mask, grad = make(geometry, dtype, offset_std=std)
    packed = torch.cat([offset_mask, value], -1).requires_grad_()
    bias = torch.zeros_like(packed[0, 0, 0], requires_grad=True)
    dcnv4_packed(packed, bias, channels=value.shape[-1], **geometry.options).backward(grad)


def call_projected(geometry: Geometry, dtype: torch.dtype, std: float, save_output: bool) -> None:
    value, offset_mask, _ = make(geometry, dtype, offset_std=std)
    packed, weight = torch.cat([offset_mask, value], -1), torch.randn(128, 128, device="cuda").to(dtype)
    options = {name: geometry.options[name] for name in ("groups", "offset_scale")}
    with torch.set_grad_enabled(save_output):
        projected.dcnv4_packed_linear(packed.requires_grad_(save_output), weight, weight[0], channels=128, **options)


def call_linear(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    """By the operators: racecheck itself breaks at the product of cuBLAS that the weight's gradient is."""
    shapes = (rows, in_features), (out_features, in_features), (out_features,), (rows, out_features)
    input, weight, bias, grad = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in shapes)
    torch.ops.dcngen.linear(input, weight, bias)
    if has_linear_kernel(input, weight, backward=True):
        torch.ops.dcngen.linear_backward(grad, weight.t().contiguous())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="run every n-th case only")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    options = parser.parse_args()
    projected.LEAST_PIXELS, linear_layer.LEAST_ROWS = 0, 1
    cases = [*operator_cases(), *many_cases(), *whole_map_cases(), *projected_cases(), *linear_cases()]
    cases = [case for case in cases if options.only in case[0]][:: options.every]
    for name, run in cases:
        try:
            run()
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise RuntimeError(f"in case {name}") from error
    print(f"{len(cases)} cases ran")


if __name__ == "__main__":
    main()
