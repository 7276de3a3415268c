"""The operator against what is installed: the released DCNv4, torchvision, cuDNN convolution, attention, and the floor.

A time is printed only after the result passed a check against the float64 reference. A floor is the fewest bytes the
operator can move (each input read once, each output written once) over the measured copy bandwidth of the device.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcngen.bench.checks import relative_error
from dcngen.bench.competitors import competitors, released_operator
from dcngen.bench.timing import copy_bandwidth, geometric_mean, median_microseconds, rotation_count
from dcngen.ops import dcnv4_reference, offset_mask_channels

# Batch, height, width, channels: backbone stages, a detector's first stages, and the levels of a latent U-Net.
SHAPES = [
    (64, 56, 56, 128), (64, 28, 28, 256), (64, 14, 14, 512), (64, 7, 7, 1024), (64, 14, 14, 768),
    (1, 200, 320, 128), (1, 100, 160, 256), (128, 32, 32, 256), (128, 16, 16, 512), (128, 8, 8, 1024),
]  # fmt: skip
QUICK_SHAPES = [(64, 56, 56, 128), (64, 7, 7, 1024), (128, 32, 32, 256), (128, 16, 16, 512)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative to the largest magnitude of the reference; a wrong tap or border is far above, rounding far below.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_SAME_FUNCTION = 0.05  # largest relative error of another implementation beside ours
_CHECKED_IMAGES = 2
_GEOMETRY = (3, 3, 1, 1, 1, 1, 1, 1)  # kernel, stride, padding, dilation; height before width


@dataclass
class Case:
    """One row of the table; times in microseconds, None where a competitor is absent or cannot run the case."""

    batch: int
    height: int
    width: int
    channels: int
    group_channels: int
    dtype: str
    offset_std: float
    forward_us: float = math.nan
    backward_us: float = math.nan
    forward_floor_us: float = math.nan
    backward_floor_us: float = math.nan
    error: dict[str, float] = field(default_factory=dict)
    others: dict[str, float | None] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return self.channels // self.group_channels

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}x{self.channels}"


@dataclass
class Inputs:
    """One set of tensors of a case."""

    value: torch.Tensor
    offset_mask: torch.Tensor
    grad_output: torch.Tensor


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs; offsets uniform in (-1, 1) pixel for ``offset_std`` 0, else normal with that deviation."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    pixels = (case.batch, case.height, case.width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    offset_mask = torch.zeros(*pixels, offset_mask_channels(case.groups), device=device)
    per_group = offset_mask[..., : 27 * case.groups].unflatten(-1, (case.groups, 27))
    if case.offset_std == 0:
        near = torch.rand(*pixels, case.groups, 18, generator=generator, device=device) * 2 - 1
        per_group[..., :18] = near * 0.999  # stays inside after rounding to a half dtype
    else:
        per_group[..., :18] = normal(*pixels, case.groups, 18) * case.offset_std
    per_group[..., 18:] = normal(*pixels, case.groups, 9) * 0.5
    value, grad_output = normal(*pixels, case.channels), normal(*pixels, case.channels)
    return Inputs(value.to(dtype), offset_mask.to(dtype), grad_output.to(dtype))


def ours_forward(case: Case, x: Inputs) -> torch.Tensor:
    return torch.ops.dcngen.dcnv4(x.value, x.offset_mask, *_GEOMETRY, case.groups, 1.0, False, False)


def ours_backward(case: Case, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    backward = torch.ops.dcngen.dcnv4_backward
    return backward(x.grad_output, x.value, x.offset_mask, *_GEOMETRY, case.groups, 1.0, False, False)


def check(case: Case, x: Inputs) -> dict[str, float]:
    """Largest error of output and gradients relative to the reference's largest magnitude, on the outermost images.

    Raises:
        RuntimeError: a result is off by more than the dtype's tolerance; no time is worth printing then.
    """
    got = (ours_forward(case, x), *ours_backward(case, x))
    chosen = sorted({*range(min(_CHECKED_IMAGES, case.batch)), case.batch - 1})
    value = x.value[chosen].double().requires_grad_()
    offset_mask = x.offset_mask[chosen].double().requires_grad_()
    expected = dcnv4_reference(value, offset_mask, groups=case.groups)
    gradients = torch.autograd.grad(expected, (value, offset_mask), x.grad_output[chosen].double())
    errors = {}
    for name, ours, reference in zip(
        ("output", "grad_input", "grad_offset_mask"), got, (expected, *gradients), strict=True
    ):
        difference = (ours[chosen].double() - reference.detach()).abs().max() / reference.detach().abs().max()
        errors[name] = float(difference)
        if not errors[name] <= TOLERANCE[DTYPES[case.dtype]]:
            raise RuntimeError(
                f"dcnv4 {name} at {case.shape} D={case.group_channels} {case.dtype} offset std {case.offset_std}: "
                f"relative error {errors[name]:.2e}, allowed {TOLERANCE[DTYPES[case.dtype]]:.0e}; not timed"
            )
    return errors


def _time(function: Callable[[Any], object], sets: Sequence) -> float:
    """Median microseconds of ``function`` over input sets that take turns, so that none is still in the cache."""
    return median_microseconds(lambda i: function(sets[i % len(sets)]))


def time_released(case: Case, sets: list[Inputs]) -> None:
    """Fills ``released_forward`` and ``released_backward``, and ``released_error`` where its output is wrong.

    Such a time is shown with a mark and stays out of the means.
    """
    released = released_operator(case.batch, case.height, case.width, case.groups, case.group_channels)
    for direction in ("forward", "backward"):
        case.others[f"released_{direction}"] = None
    if released is None:
        return
    forward, backward = released
    runs = {
        "forward": lambda x: forward(x.value, x.offset_mask),
        "backward": lambda x: backward(x.value, x.offset_mask, x.grad_output),
    }
    for direction, run in runs.items():
        try:
            if direction == "forward":
                difference = relative_error(run(sets[0]), ours_forward(case, sets[0]))
                if not difference <= _SAME_FUNCTION:
                    case.others["released_error"] = difference
            case.others[f"released_{direction}"] = _time(run, sets)
        except RuntimeError as error:  # its bf16 backward, for one
            print(f"released {direction} at {case.shape} {case.dtype}: {error}", file=sys.stderr)


def time_competitors(case: Case, sets: list[Inputs]) -> None:
    """Fills the forward times of the other operators; one that should compute dcnv4 and does not has none."""
    device = sets[0].value.device
    for name, competitor in competitors(case.channels, case.groups, DTYPES[case.dtype], device).items():
        prepared = [competitor.prepare(x.value, x.offset_mask) for x in sets]
        if competitor.computes_dcnv4:
            difference = relative_error(competitor.run(prepared[0]), ours_forward(case, sets[0]))
            if not difference <= _SAME_FUNCTION:
                print(f"{name} at {case.shape} {case.dtype}: off by {difference:.1e}, not timed", file=sys.stderr)
                continue
        case.others[name] = _time(competitor.run, prepared)


def time_case(case: Case, device: torch.device, bandwidth: float, with_competitors: bool) -> Case:
    """Checks one case against the reference, then times it beside what is installed."""
    first = make_inputs(case, device, seed=0)
    element = first.value.element_size()
    activation, offsets = first.value.numel() * element, first.offset_mask.numel() * element
    sets = [first] + [
        make_inputs(case, device, seed) for seed in range(1, rotation_count(2 * activation + offsets, device))
    ]
    case.error = check(case, first)
    case.forward_floor_us = (2 * activation + offsets) / bandwidth * 1e6
    case.backward_floor_us = (3 * activation + 2 * offsets) / bandwidth * 1e6
    case.forward_us = _time(partial(ours_forward, case), sets)
    case.backward_us = _time(partial(ours_backward, case), sets)
    time_released(case, sets)
    if with_competitors:
        time_competitors(case, sets)
    return case


def cases(shapes, group_channels, dtypes, offset_stds) -> list[Case]:
    """Every combination in which the group width divides the channels."""
    return [
        Case(*shape, d, dtype, std)
        for dtype in dtypes
        for d in group_channels
        for std in offset_stds
        for shape in shapes
        if shape[3] % d == 0
    ]


def _released_is_right(case: Case, direction: str) -> bool:
    """False where its output is wrong; its gradients are not checked."""
    return direction == "backward" or "released_error" not in case.others


def _ratio(case: Case, direction: str) -> float | None:
    other = case.others.get(f"released_{direction}")
    return None if other is None else other / getattr(case, f"{direction}_us")


def format_table(rows: list[Case]) -> str:
    """The table a person reads."""
    head = (
        f"{'shape':>16} {'D':>3} {'type':>4} {'std':>4} | {'fwd us':>8} {'x floor':>7} {'released':>9} {'gain':>6}"
        f" | {'bwd us':>8} {'x floor':>7} {'released':>9} {'gain':>6} | other forwards us"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        line = f"{r.shape:>16} {r.group_channels:>3} {r.dtype:>4} {r.offset_std:>4g}"
        for direction in ("forward", "backward"):
            time, floor = getattr(r, f"{direction}_us"), getattr(r, f"{direction}_floor_us")
            other, gain = r.others.get(f"released_{direction}"), _ratio(r, direction)
            mark = " " if _released_is_right(r, direction) else "*"
            line += f" | {time:8.1f} {time / floor:7.2f} {other or math.nan:8.1f}{mark} {gain or math.nan:6.2f}"
        rest = {k: v for k, v in r.others.items() if not k.startswith("released_") and v is not None}
        lines.append(line + " | " + " ".join(f"{name} {value:.0f}" for name, value in rest.items()))
    if not all(_released_is_right(r, "forward") for r in rows):
        lines.append("* the released operator's output is wrong here: its blocks cross images")
    return "\n".join(lines)


def format_summary(rows: list[Case]) -> str:
    """Geometric means and worst cases of the gain over the released operator, by dtype, D and offsets."""
    lines = []
    for key in sorted({(r.dtype, r.group_channels, r.offset_std) for r in rows}):
        chosen = [r for r in rows if (r.dtype, r.group_channels, r.offset_std) == key]
        parts = []
        for direction in ("forward", "backward"):
            right = [r for r in chosen if _released_is_right(r, direction)]
            gains = [g for r in right if (g := _ratio(r, direction)) is not None]
            if gains:
                parts.append(f"{direction} {geometric_mean(gains):.2f}x (least {min(gains):.2f}x, {len(gains)} shapes)")
        if parts:
            lines.append(f"{key[0]} D={key[1]} offset std {key[2]:g}: " + ", ".join(parts))
    return "\n".join(lines)


def source_commit() -> str | None:
    """The commit of this file's checkout, "-dirty" where tracked files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() or None


def provenance(device: torch.device, bandwidth: float) -> dict[str, object]:
    """Where the figures come from: commit, device, versions, measured copy bandwidth."""
    return {
        "commit": source_commit(),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bandwidth_bytes_per_second": bandwidth,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dcngen bench operator", description=__doc__)
    parser.add_argument("--group-channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16"])
    parser.add_argument("--offset-stds", type=float, nargs="+", default=[0.0], help="0: uniform within one pixel")
    parser.add_argument("--quick", action="store_true", help="four shapes instead of ten")
    parser.add_argument("--no-competitors", action="store_true", help="skip torchvision, convolution and attention")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, help="draw the figures here (PNG or SVG)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns a process exit status."""
    args = parse_arguments(argv)
    if not torch.cuda.is_available():
        print("bench operator needs a CUDA device; on a CPU run benchmarks/operator_cpu.py", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = copy_bandwidth(device)
    about = provenance(device, bandwidth)
    print(f"{about['device']}, commit {about['commit']}, torch {about['torch']}, copy {bandwidth / 1e12:.2f} TB/s")
    shapes = QUICK_SHAPES if args.quick else SHAPES
    rows, failures = [], []
    for case in cases(shapes, args.group_channels, args.dtypes, args.offset_stds):
        try:
            rows.append(time_case(case, device, bandwidth, not args.no_competitors))
        except RuntimeError as error:
            failures.append(str(error))
            print(f"FAILED {error}", file=sys.stderr)
        torch.cuda.empty_cache()
    print(format_table(rows))
    print(format_summary(rows))
    if args.json:
        args.json.write_text(json.dumps({**about, "cases": [asdict(r) for r in rows], "failures": failures}, indent=1))
    if args.plot:
        from dcngen.bench.plot import draw_operator

        draw_operator(rows, str(about["device"]), args.plot)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
