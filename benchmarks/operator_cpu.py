"""DCNv4 on the CPU, side by side with what a CPU user has otherwise.

    python benchmarks/operator_cpu.py
    python benchmarks/operator_cpu.py --shape 1x56x56x128:16 --threads 2 --seconds 4 --json operator_cpu.json

Everything at one shape is timed in one loop, one call of each contestant after the other, so that all see the same
machine; the table gives the median and, in brackets, the fastest call, which other processes disturb least. The ratios
are taken between the fastest calls. Before any time is printed the results of all that compute DCNv4 are compared with
the float64 reference; on a wrong one nothing is printed for that shape and the exit status is 1.

Contestants: dcngen (the compiled kernels), reference (dcngen's plain torch), torchvision (deform_conv2d, where
torchvision is installed, with a depthwise weight of ones), grid_sample (what DCNv3's repository falls back to on the
CPU), and, for scale, a dense and a depthwise 3x3 convolution of the same channels. Each gets its tensors in the layout
it wants, converted beforehand.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dcngen.bench.competitors import torchvision_operator, torchvision_tensors
from dcngen.ops import backend, dcnv4, dcnv4_reference, native, offset_mask_channels
from dcngen.ops.geometry import make_geometry
from dcngen.ops.reference import split_offset_mask

DEFAULT_SHAPES = ("1x56x56x128:16", "8x32x32x256:32", "64x8x8x64:16")
TOLERANCE = {"dcngen": 1e-5}  # relative to the largest value; others 1e-4
TAPS = 9


@dataclass(frozen=True)
class Shape:
    batch: int
    height: int
    width: int
    channels: int
    group_channels: int

    @staticmethod
    def parse(text: str) -> Shape:
        try:
            sizes, group_channels = text.split(":")
            shape = Shape(*map(int, sizes.split("x")), int(group_channels))
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(
                f"expected NxHxWxC:D such as 1x56x56x128:16 (D channels a group), got {text!r}"
            ) from None
        if shape.group_channels < 1 or shape.channels % shape.group_channels:
            raise argparse.ArgumentTypeError(f"expected D that divides C, got {text!r}")
        return shape

    @property
    def groups(self) -> int:
        return self.channels // self.group_channels

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}x{self.channels}, D={self.group_channels}"


@dataclass(frozen=True)
class Contestant:
    """run() gives the output in `layout`; gradients are taken of `leaves`."""

    name: str
    run: Callable[[], torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    layout: str  # of its output: "NHWC" or "NCHW"
    computes_dcnv4: bool = True

    def grads(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.run(), self.leaves, grad_output)

    def grad_of(self, output: torch.Tensor) -> torch.Tensor:
        """The output's gradient, given channels last, in this contestant's layout."""
        return output if self.layout == "NHWC" else output.permute(0, 3, 1, 2).contiguous()


# --- contestants ---


def grid_sample_dcn(input: torch.Tensor, offset_mask: torch.Tensor, groups: int) -> torch.Tensor:
    """3x3, stride 1, padding 1 through F.grid_sample; channels last in and out."""
    batch, height, width, channels = input.shape
    offsets, masks = split_offset_mask(offset_mask, make_geometry(groups=groups))
    axis = torch.arange(-1.0, 2.0)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(TAPS, 2)  # (x, y), x outer
    x, y = torch.arange(width).float(), torch.arange(height).float()
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None, None, :]
    places = centers + grid + offsets  # in pixels
    normalised = (places * 2 + 1) / torch.tensor([width, height]) - 1  # align_corners=False
    normalised = normalised.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, TAPS, 2)
    images = input.permute(0, 3, 1, 2).reshape(batch * groups, channels // groups, height, width)
    samples = F.grid_sample(images, normalised, mode="bilinear", padding_mode="zeros", align_corners=False)
    masks = masks.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, TAPS)
    return (samples * masks).sum(-1).reshape(batch, channels, height, width).permute(0, 2, 3, 1)


def torchvision_contestant(input: torch.Tensor, offset_mask: torch.Tensor, shape: Shape) -> Contestant | None:
    deform_conv2d = torchvision_operator()
    if deform_conv2d is None:
        print("torchvision left out: none that fits this torch is installed", file=sys.stderr)
        return None
    images, offsets, weight, masks = torchvision_tensors(input, offset_mask, shape.groups)
    leaves = tuple(tensor.requires_grad_() for tensor in (images, offsets, masks))
    return Contestant("torchvision", lambda: deform_conv2d(*leaves[:2], weight, padding=1, mask=masks), leaves, "NCHW")


def contestants_for(shape: Shape, input: torch.Tensor, offset_mask: torch.Tensor) -> list[Contestant]:
    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        return input.clone().requires_grad_(), offset_mask.clone().requires_grad_()

    def of_function(name: str, function: Callable) -> Contestant:
        tensors = leaves()
        return Contestant(name, lambda: function(*tensors, groups=shape.groups), tensors, "NHWC")

    def of_convolution(name: str, groups: int) -> Contestant:
        images = input.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(shape.channels, shape.channels // groups, 3, 3)
        weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
        run = lambda: F.conv2d(images, weight, padding=1, groups=groups)  # noqa: E731
        return Contestant(name, run, (images, weight), "NCHW", computes_dcnv4=False)

    found = [
        of_function("dcngen", dcnv4),
        of_function("reference", dcnv4_reference),
        torchvision_contestant(input, offset_mask, shape),
        of_function("grid_sample", grid_sample_dcn),
        of_convolution("conv 3x3", 1),
        of_convolution("depthwise 3x3", shape.channels),
    ]
    return [c for c in found if c is not None]


# --- correctness ---


def worst_errors(contestants: list[Contestant], shape: Shape, input, offset_mask, grad_output) -> dict[str, float]:
    """Each DCNv4's largest error of output and gradients, relative to the float64 reference's largest value."""
    exact_input, exact_offset_mask = input.double().requires_grad_(), offset_mask.double().requires_grad_()
    output = dcnv4_reference(exact_input, exact_offset_mask, groups=shape.groups)
    grad_input, grad_offset_mask = torch.autograd.grad(output, (exact_input, exact_offset_mask), grad_output.double())

    def error(got: torch.Tensor, exact: torch.Tensor) -> float:
        return ((got.double() - exact).abs().max() / exact.abs().max()).item()

    worst = {}
    for contestant in contestants:
        if not contestant.computes_dcnv4:
            continue
        got = contestant.run().detach()
        grads = contestant.grads(contestant.grad_of(grad_output))
        if contestant.layout == "NCHW":
            got, grad = got.permute(0, 2, 3, 1), grads[0].permute(0, 2, 3, 1)
            errors = [error(got, output), error(grad, grad_input)]  # its offsets are in an order of their own
        else:
            errors = [error(got, output), error(grads[0], grad_input), error(grads[1], grad_offset_mask)]
        worst[contestant.name] = max(errors, key=lambda e: float("inf") if e != e else e)
    return worst


# --- timing ---


def time_in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, all in turn, until the time is up and each has run at least 3 times."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
        rounds += 1
    return times


def measure(shape: Shape, seconds: float, skip: list[str]) -> dict | None:
    """All times at one shape, or None where a result is wrong."""
    generator = torch.Generator().manual_seed(0)
    pixels = (shape.batch, shape.height, shape.width)
    input = torch.randn(*pixels, shape.channels, generator=generator)
    offset_mask = torch.randn(*pixels, offset_mask_channels(shape.groups), generator=generator)
    # At whole coordinates the derivative jumps, and each contestant's rounding falls on a side of its own: stay 1/128
    # of a pixel away from them.
    offset_mask = ((offset_mask * 64).round() + 0.5) / 64
    grad_output = torch.randn(*pixels, shape.channels, generator=generator)
    contestants = [c for c in contestants_for(shape, input, offset_mask) if c.name not in skip]

    errors = worst_errors(contestants, shape, input, offset_mask, grad_output)
    wrong = {name: e for name, e in errors.items() if not e <= TOLERANCE.get(name, 1e-4)}
    if wrong:
        print(f"{shape}: wrong results, nothing timed: {wrong}", file=sys.stderr)
        return None

    def forward(contestant: Contestant) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                contestant.run()

        return call

    def training(contestant: Contestant) -> Callable[[], object]:
        grad = contestant.grad_of(grad_output)
        return lambda: contestant.grads(grad)

    return {
        "shape": str(shape),
        "errors": errors,
        "forward_ms": time_in_turns({c.name: forward(c) for c in contestants}, seconds),
        "forward_backward_ms": time_in_turns({c.name: training(c) for c in contestants}, seconds),
    }


# --- report ---


def print_table(result: dict) -> None:
    forward, training = result["forward_ms"], result["forward_backward_ms"]
    ours_forward, ours_training = min(forward["dcngen"]), min(training["dcngen"])
    print(f"\n{result['shape']}")
    print(f"  {'':14}{'forward ms':>20}{'dcngen is':>11}   {'forward+backward ms':>20}{'dcngen is':>11}   error")
    for name in forward:
        cells = [f"{statistics.median(t[name]):9.2f} ({min(t[name]):7.2f})" for t in (forward, training)]
        ratios = [min(forward[name]) / ours_forward, min(training[name]) / ours_training]
        error = f"{result['errors'][name]:.0e}" if name in result["errors"] else "-"
        print(f"  {name:14}{cells[0]:>20}{ratios[0]:>9.1f} x   {cells[1]:>20}{ratios[1]:>9.1f} x   {error}")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, action="append", help="NxHxWxC:D, several times")
    parser.add_argument("--threads", type=int, default=0, help="cores to use (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each half of each table (default: 6)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave a contestant out")
    parser.add_argument("--json", type=Path, help="write every single time there")
    options = parser.parse_args()
    if "dcngen" in options.skip:
        parser.error("--skip: dcngen is what the others are compared with; skip one of those")
    if options.threads > 0:
        torch.set_num_threads(options.threads)

    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.cpu_library().dcngen_cpu_isa().decode(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("float32, 3x3; median of the calls in turn (the fastest in brackets); ratios of the fastest")
    shapes = options.shape or [Shape.parse(text) for text in DEFAULT_SHAPES]
    results = []
    with backend("native"):  # a missing library is an error here, not a slow path
        for shape in shapes:
            result = measure(shape, options.seconds, options.skip)
            if result is not None:
                print_table(result)
                results.append(result)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return 0 if len(results) == len(shapes) else 1


if __name__ == "__main__":
    sys.exit(main())
