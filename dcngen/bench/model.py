"""One training step of the latent U-Net, the baseline beside the DCNv4 arm: milliseconds, images/s, peak memory.

Forward, backward and fused AdamW under bf16 autocast with torch.compile, on 4x32x32 latents, channels last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from dcngen.bench.operator import provenance
from dcngen.bench.timing import copy_bandwidth, median_microseconds
from dcngen.models import DCNUNet2DModel, count_parameters

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


def time_step(model: torch.nn.Module, batch: int, compiled: bool) -> dict[str, float]:
    """Milliseconds of one training step, of one forward without gradients, and the peak memory in GiB."""
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    latents = torch.randn(batch, 4, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (batch,), device="cuda")
    labels = torch.randint(0, 1000, (batch,), device="cuda")

    def step(_: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            prediction = run(latents, timesteps, class_labels=labels).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(_: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(latents, timesteps, class_labels=labels)

    torch.cuda.reset_peak_memory_stats()
    milliseconds = median_microseconds(step) / 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"step_ms": milliseconds, "forward_ms": median_microseconds(forward) / 1e3, "peak_gib": peak}


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns a process exit status."""
    parser = argparse.ArgumentParser(prog="python -m dcngen bench model", description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--group-channels", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench model needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    about = provenance(device, copy_bandwidth(device))
    rows = []
    for arm, width in [("baseline", 0), *(("dcn", d) for d in args.group_channels)]:
        model = build(arm, width)
        name = arm if arm == "baseline" else f"{arm} D={width}"
        row = {"arm": name, "parameters": count_parameters(model), **time_step(model, args.batch_size, not args.eager)}
        rows.append({**row, "images_per_second": args.batch_size / row["step_ms"] * 1e3})
        torch.compiler.reset()
    print(
        f"{about['device']}, commit {about['commit']}, batch {args.batch_size}, {'eager' if args.eager else 'compiled'}"
    )
    for r in rows:
        print(
            f"{r['arm']:>10}  {r['parameters'] / 1e6:7.1f}M  step {r['step_ms']:7.2f} ms  "
            f"{r['images_per_second']:7.0f} img/s  forward {r['forward_ms']:7.2f} ms  peak {r['peak_gib']:.2f} GiB"
        )
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
