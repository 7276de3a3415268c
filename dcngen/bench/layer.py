"""The whole DCNv4 layer (three projections and the operator) against the 3x3 convolution whose place it takes.

Forward plus backward under bf16 autocast and torch.compile, channels last, both with the same input and gradient, each
captured in a CUDA graph and replayed, so that the device is timed and not the host.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn

from dcngen.bench.checks import require_same_layer
from dcngen.bench.operator import provenance
from dcngen.bench.timing import captured, copy_bandwidth, geometric_mean, median_microseconds
from dcngen.nn import DCNv4

SHAPES = [(128, 32, 32, 256), (128, 16, 16, 512), (128, 8, 8, 1024), (64, 64, 64, 128)]


def forward_backward(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    """A callable that runs one training pass of ``layer`` on ``x`` (any float dtype) and drops the gradients."""
    inputs = [x, *layer.parameters()]

    def step(_: int) -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = layer(x)
        torch.autograd.grad(out, inputs, grad.to(out.dtype))

    return step


def dcn_layer(channels: int, group_channels: int, fused: bool) -> DCNv4:
    """A DCNv4 layer away from its zero initialisation, so that offsets and masks do real work."""
    layer = DCNv4(channels, group=channels // group_channels, fuse_projections=fused).cuda()
    with torch.no_grad():
        layer.offset_mask.weight.normal_(std=0.2 / channels**0.5)
        layer.offset_mask.bias.normal_(std=0.1)
    return layer


def arm_name(group_channels: int, fused: bool) -> str:
    """Key of one DCNv4 arm; "fused" has value_proj and offset_mask as one product."""
    return f"dcnv4_d{group_channels}{'_fused' if fused else ''}_us"


def time_layer(name: str, layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> float:
    """Microseconds of one training pass of the compiled layer, after a check against the plain one."""
    run = torch.compile(layer, dynamic=False, fullgraph=True)
    require_same_layer(name, layer, run, x, grad)
    return median_microseconds(captured(forward_backward(run, x, grad)))


def time_shape(shape: tuple[int, int, int, int], group_channels: list[int]) -> dict[str, object]:
    """Microseconds of forward plus backward of the convolution and of DCNv4 at each group width, plain and fused."""
    n, h, w, c = shape
    x = torch.randn(n, h, w, c, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    image = x.detach().permute(0, 3, 1, 2).requires_grad_()
    convolution = nn.Conv2d(c, c, 3, padding=1).cuda().to(memory_format=torch.channels_last)
    row: dict[str, object] = {"shape": "x".join(map(str, shape))}
    row["conv3x3_us"] = time_layer("conv3x3", convolution, image, grad.permute(0, 3, 1, 2))
    for d, fused in itertools.product(group_channels, (False, True)):
        torch.compiler.reset()  # each layer is a new set of shapes for the same code, which dynamo counts
        row[arm_name(d, fused)] = time_layer(arm_name(d, fused), dcn_layer(c, d, fused), x, grad)
    return row


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns a process exit status."""
    parser = argparse.ArgumentParser(prog="python -m dcngen bench layer", description=__doc__)
    parser.add_argument("--group-channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench layer needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    about = provenance(device, copy_bandwidth(device))
    widths = [arm_name(d, fused) for d, fused in itertools.product(args.group_channels, (False, True))]
    print(
        f"{about['device']}, commit {about['commit']}: forward + backward, bf16 autocast, torch.compile, microseconds"
    )
    rows = []
    for shape in SHAPES:
        row = time_shape(shape, args.group_channels)
        rows.append(row)
        figures = "  ".join(f"{key[:-3]} {row[key]:8.1f}" for key in widths)
        print(f"{row['shape']:>16}  conv3x3 {row['conv3x3_us']:8.1f}  {figures}", flush=True)
    for key in widths:
        ratio = geometric_mean([row[key] / row["conv3x3_us"] for row in rows])
        print(f"{key[:-3]}: {ratio:.2f} times the convolution's time (geometric mean)")
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
