"""Where the DCNv4 layers of a trained run sample, and with which weights.

    python benchmarks/learned_offsets.py runs/cifar10_dcn
    python benchmarks/learned_offsets.py runs/cifar10_dcn --num-images 256 --steps 25 --json learned_offsets.json

Draws pictures as sample.py does, with the averaged weights, and looks at every offset and mask on the way, at all noise
levels alike. One line a layer and one for all:

- std: standard deviation of the offsets in pixels, both axes together;
- |offset| 50 / 99 %: quantiles of the larger of the two axes' absolute offsets, in pixels;
- far: share of the samples at least a pixel from their place on the regular grid in one axis. The window kernels
  compute near samples by dense products and gather far ones one by one, so this share says what a layer costs;
- far weight: the far samples' share of the sum of the masks' absolute values;
- mask mean, std.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from dcngen.diffusion.loading import load_run
from dcngen.diffusion.schedulers import make_scheduler
from dcngen.nn import DCNv4
from dcngen.ops.reference import split_offset_mask

BINS, BINS_PER_PIXEL = 4096, 64  # of the quantiles' histogram: up to 64 pixels, the rest in the last bin


@dataclass
class LayerStatistics:
    """Sums over all that a layer has seen; shares and moments are read from them."""

    samples: int = 0
    far: int = 0
    offset_sum: float = 0.0
    offset_squares: float = 0.0
    mask_sum: float = 0.0
    mask_squares: float = 0.0
    mask_absolute: float = 0.0
    far_mask_absolute: float = 0.0
    histogram: torch.Tensor | None = None
    size: str = ""

    def add(self, offsets: torch.Tensor, masks: torch.Tensor) -> None:
        """Offsets (..., K, 2) in pixels and masks (..., K)."""
        offsets, masks = offsets.double(), masks.double()
        largest = offsets.abs().amax(-1)
        far = largest >= 1
        bins = (largest * BINS_PER_PIXEL).clamp(max=BINS - 1).long().flatten()
        histogram = torch.bincount(bins, minlength=BINS).cpu()
        self.histogram = histogram if self.histogram is None else self.histogram + histogram
        self.samples += masks.numel()
        self.far += int(far.sum())
        self.offset_sum += offsets.sum().item()
        self.offset_squares += offsets.square().sum().item()
        self.mask_sum += masks.sum().item()
        self.mask_squares += masks.square().sum().item()
        self.mask_absolute += masks.abs().sum().item()
        self.far_mask_absolute += masks.abs()[far].sum().item()

    def merge(self, other: LayerStatistics) -> None:
        for name in vars(self).keys() - {"histogram", "size"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram = other.histogram if self.histogram is None else self.histogram + other.histogram

    def quantile(self, share: float) -> float:
        """Upper end of the bin, in pixels, that the quantile falls into."""
        reached = self.histogram.cumsum(0) >= share * self.histogram.sum()
        return (int(reached.int().argmax()) + 1) / BINS_PER_PIXEL

    def row(self) -> dict[str, float | str]:
        offset_mean, mask_mean = self.offset_sum / (2 * self.samples), self.mask_sum / self.samples
        return {
            "size": self.size,
            "std": max(0.0, self.offset_squares / (2 * self.samples) - offset_mean**2) ** 0.5,
            "quantile_50": self.quantile(0.5),
            "quantile_99": self.quantile(0.99),
            "far": self.far / self.samples,
            "far_weight": self.far_mask_absolute / max(self.mask_absolute, 1e-30),
            "mask_mean": mask_mean,
            "mask_std": max(0.0, self.mask_squares / self.samples - mask_mean**2) ** 0.5,
        }


def watch(unet: torch.nn.Module) -> dict[str, LayerStatistics]:
    """Statistics of every DCNv4 layer of the model, by its name, which its calls fill."""
    statistics: dict[str, LayerStatistics] = defaultdict(LayerStatistics)

    def hook_of(name: str, layer: DCNv4):
        def hook(projection: torch.nn.Linear, arguments: tuple, offset_mask: torch.Tensor) -> None:
            offsets, masks = split_offset_mask(offset_mask, layer.geometry)
            statistics[name].size = f"{offset_mask.shape[1]}x{offset_mask.shape[2]}x{layer.channels}"
            statistics[name].add(layer.geometry.offset_scale * offsets, masks)

        return hook

    for name, layer in unet.named_modules():
        if isinstance(layer, DCNv4):  # the hook keeps the projections apart: offset_mask is called by itself
            layer.offset_mask.register_forward_hook(hook_of(name, layer))
    return statistics


def print_table(rows: dict[str, dict]) -> None:
    width = max(map(len, rows))
    print(f"{'layer':{width}}  {'map':>11} {'std':>6}  {'|offset| 50 / 99 %':>18}  far %  far weight %  mask mean, std")
    for name, row in rows.items():
        quantiles = f"{row['quantile_50']:8.2f} / {row['quantile_99']:7.2f}"
        print(
            f"{name:{width}}  {row['size']:>11} {row['std']:6.2f}  {quantiles}  "
            f"{100 * row['far']:5.1f}  {100 * row['far_weight']:12.1f}  {row['mask_mean']:9.3f}, {row['mask_std']:.3f}"
        )


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25, help="steps of dpm-solver++")
    parser.add_argument("--seed", type=int, default=0, help="picture i has seed + i")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()

    pipeline = load_run(options.run).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.scheduler = make_scheduler("dpm-solver++", pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    statistics = watch(pipeline.unet)
    labels = [i % pipeline.num_classes for i in range(options.num_images)] if pipeline.num_classes else None
    seeds = list(range(options.seed, options.seed + options.num_images))
    pipeline(labels, seeds=seeds, num_inference_steps=options.steps, output_type="latent")
    if not statistics:
        print(f"{options.run}: expected a model with DCNv4 layers, found none that ran", file=sys.stderr)
        return 1
    everything = LayerStatistics()
    for layer in statistics.values():
        everything.merge(layer)
    rows = {name: layer.row() for name, layer in statistics.items()} | {"all": everything.row()}
    print(f"{options.run}: {options.num_images} pictures, {options.steps} steps")
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options), "layers": rows}, indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
