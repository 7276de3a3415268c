"""One training step of the latent U-Net, the baseline beside the DCNv4 arm: milliseconds, images/s, peak memory.

Forward, backward and fused AdamW under bf16 autocast with torch.compile, on 4x32x32 latents, channels last. Without
CUDA graphs (mode reduce-overhead) the host's launches limit both arms, and the DCNv4 arm has more of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from dcngen.bench.checks import require_close
from dcngen.bench.operator import provenance
from dcngen.bench.timing import copy_bandwidth, median_microseconds
from dcngen.models import DCNUNet2DModel, count_parameters
from dcngen.models.compiled import compile_model

_ARCHITECTURE = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 384, 512),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "num_class_embeds": 1001,
}


def build(arm: str, group_channels: int) -> DCNUNet2DModel:
    """The two arms of the comparison; ``arm`` is "baseline" or "dcn"."""
    operators = {
        "baseline": {"conv_operator": "conv", "attention_operator": "attention"},
        "dcn": {"conv_operator": "dcnv4", "attention_operator": "dcnv4", "dcn_group_channels": group_channels},
    }
    return DCNUNet2DModel(**_ARCHITECTURE, **operators[arm])


def time_step(model: torch.nn.Module, batch: int, mode: str) -> dict[str, float]:
    """Milliseconds of one training step, of one forward without gradients, and the peak memory in GiB.

    ``mode`` is one of torch.compile, or "eager".

    Raises:
        RuntimeError: the prediction is not that of the plain model in float32.
    """
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = model if mode == "eager" else compile_model(model, mode, fullgraph=True)
    latents = torch.randn(batch, 4, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (batch,), device="cuda")
    labels = torch.randint(0, 1000, (batch,), device="cuda")

    def step(_: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            prediction = run(latents, timesteps, class_labels=labels).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(_: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(latents, timesteps, class_labels=labels)

    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_microseconds(step) / 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30
    with torch.no_grad():  # after the peak was read: this needs memory of its own
        expected = model.forward(latents, timesteps, class_labels=labels).sample  # not compiled
        with torch.autocast("cuda", dtype=torch.bfloat16):
            require_close("prediction", run(latents, timesteps, class_labels=labels).sample, expected, 0.05)
    return {"step_ms": milliseconds, "forward_ms": median_microseconds(forward) / 1e3, "peak_gib": peak}


def describe(row: dict) -> str:
    """One line of the table."""
    return (
        f"{row['mode']:>16}  {row['arm']:>10}  {row['parameters'] / 1e6:7.1f}M  step {row['step_ms']:7.2f} ms  "
        f"{row['images_per_second']:7.0f} img/s  forward {row['forward_ms']:7.2f} ms  peak {row['peak_gib']:.2f} GiB"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns a process exit status."""
    parser = argparse.ArgumentParser(prog="python -m dcngen bench model", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--group-channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--arms", nargs="+", choices=["baseline", "dcn"], default=["baseline", "dcn"])
    parser.add_argument(
        "--modes", nargs="+", default=["reduce-overhead"], help='modes of torch.compile ("default", ...), or "eager"'
    )
    parser.add_argument("--unfused", action="store_true", help="value_proj and offset_mask of DCNv4 as two products")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench model needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    about = provenance(device, copy_bandwidth(device))
    unfused = ", projections not fused" if args.unfused else ""
    print(f"{about['device']}, commit {about['commit']}, batch {args.batch_size}{unfused}", flush=True)
    arms = [(arm, d) for arm in args.arms for d in (args.group_channels if arm == "dcn" else [0])]
    rows = []
    for mode, (arm, width) in itertools.product(args.modes, arms):
        model = build(arm, width).fuse_projections(not args.unfused)
        name = arm if arm == "baseline" else f"{arm} D={width}"
        row = {"mode": mode, "arm": name, "parameters": count_parameters(model)}
        row |= time_step(model, args.batch_size, mode)
        rows.append({**row, "images_per_second": args.batch_size / row["step_ms"] * 1e3})
        print(describe(rows[-1]), flush=True)
        torch.compiler.reset()
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
