"""Where the time of a training step goes, with layers that sample as far from the grid as trained ones do.

    python benchmarks/unet_step.py --config configs/cifar10_dcn_wide.yaml
    python benchmarks/unet_step.py --config configs/cifar10_dcn_wide.yaml --offset-stds 16:0.42 8:0.65 4:0.95

Builds the configuration's U-Net, untrained, and times forward, backward and AdamW as the trainer runs them (bf16,
torch.compile, CUDA graphs) on noise. `--offset-stds side:deviation ...` gives the offsets of the DCNv4 layers on maps
of so many pixels a side that standard deviation, in pixels; learned_offsets.py prints those of a trained run. Then the
profiler's sums over the kernels of one step, by kind. Further arguments override the configuration as for train_ldm.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from dcngen.bench.timing import median_microseconds
from dcngen.config import TrainConfig, load_config
from dcngen.models import DCNUNet2DModel
from dcngen.models.compiled import compile_model
from dcngen.nn import DCNv4
from dcngen.training.build import build_optimizer, build_unet, shrink_factor

# Of a kernel's name, first match first.
KINDS = {
    "medium_map": "DCNv4, maps of at most 8x8",
    "small_map": "DCNv4, maps of at most 4x4",
    "dcngen::linear": "projections",
    "forward_projected": "DCNv4 and output_proj",
    "far_kernel": "DCNv4, far samples",
    "wide_kernel": "DCNv4, far samples",
    "gather": "DCNv4, far samples",
    "sum_kernel": "DCNv4, the biases' gradients",
    "dcngen": "DCNv4",
    "nvjet": "matrix products",
    "gemm": "matrix products",
    "cutlass": "matrix products",
    "cudnn": "convolutions",
    "triton_poi": "elementwise (torch.compile)",
    "triton": "reductions (torch.compile)",
    "multi_tensor": "AdamW",
    "flash": "attention",
    "fmha": "attention",
}


def offset_std(text: str) -> tuple[int, float]:
    try:
        side, deviation = text.split(":")
        return int(side), float(deviation)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected side:deviation such as 8:0.65, got {text!r}") from None


@torch.no_grad()
def spread_offsets(model: DCNUNet2DModel, inputs: tuple, deviations: dict[int, float]) -> None:
    """Random weights for the offsets of every DCNv4 layer, scaled to the deviation for the side of its map."""

    def hook_of(layer: DCNv4):
        groups, taps = layer.geometry.groups, layer.geometry.taps
        rows = torch.arange(3 * groups * taps).view(groups, 3 * taps)[:, : 2 * taps].flatten()

        def hook(projection: torch.nn.Linear, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
            (x,) = arguments
            side = max(output.shape[1:3])
            if side not in deviations:
                return output
            weight = torch.randn(len(rows), x.shape[-1], device=x.device)
            scale = deviations[side] / layer.geometry.offset_scale / (x.float() @ weight.t()).std()
            projection.weight[rows.to(x.device)] = weight * scale
            projection.bias[rows.to(x.device)] = 0
            return torch.nn.functional.linear(x, projection.weight, projection.bias)

        return hook

    layers = [module for module in model.modules() if isinstance(module, DCNv4)]
    hooks = [layer.offset_mask.register_forward_hook(hook_of(layer)) for layer in layers]
    model(*inputs)
    for hook in hooks:
        hook.remove()


def make_step(config: TrainConfig, num_classes: int, deviations: dict[int, float]) -> Callable[[int], None]:
    """One training step on noise, compiled; its learning rate is 0, so the offsets stay."""
    side = config.data.image_size // shrink_factor(config.autoencoder)
    shape = (config.autoencoder.latent_channels, side, side)
    model = build_unet(
        config.model, latent_shape=shape, num_classes=num_classes, num_train_timesteps=1000, seed=config.seed
    )
    model = model.cuda().to(memory_format=torch.channels_last)
    batch = config.train.train_batch_size
    latents = torch.randn(batch, *shape, device="cuda").contiguous(memory_format=torch.channels_last)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device="cuda")
    labels = torch.randint(0, num_classes, (batch,), device="cuda")
    spread_offsets(model, (latents, timesteps, labels), deviations)
    optimizer = build_optimizer(model, config.optimizer, torch.device("cuda"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run = compile_model(model, config.train.compile_mode)

    def step(_: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast("cuda", torch.bfloat16):
            prediction = run(latents, timesteps, labels).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def kernels_by_kind(step: Callable[[int], None], steps: int = 3) -> tuple[Counter, Counter]:
    """Milliseconds and launches of one step, by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
    times, launches = Counter(), Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("##", "Mem")):
            kind = next((kind for part, kind in KINDS.items() if part in event.name), "other")
            times[kind] += event.device_time / 1e3 / steps
            launches[kind] += 1 / steps
    return times, launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--offset-stds", type=offset_std, nargs="+", default=[], metavar="SIDE:STD")
    options, overrides = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    config = load_config(["--config", options.config, *overrides])
    step = make_step(config, options.num_classes, dict(options.offset_stds))
    milliseconds = median_microseconds(step) / 1e3
    times, launches = kernels_by_kind(step)
    batch, offsets = config.train.train_batch_size, dict(options.offset_stds) or "as initialised"
    print(f"{options.config}, batch {batch}, offsets {offsets}, {torch.cuda.get_device_name()}")
    print(f"step {milliseconds:.2f} ms, {batch / milliseconds * 1e3:.0f} images/s, kernels {times.total():.2f} ms:")
    for kind, time in times.most_common():
        print(f"  {kind:32} {time:7.2f} ms in {launches[kind]:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
