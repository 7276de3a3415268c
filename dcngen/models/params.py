"""Parameter counts: the paper-scale pair beside what the DCNv4 paper reports, or those of a saved model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from dcngen.models.swap import count_parameters, load_unet
from dcngen.models.unet import DCNUNet2DModel
from dcngen.nn.blocks import DCNv4Attention, DCNv4Conv2d

# Reported for the latent-diffusion U-Net on ImageNet-256 and the same with DCNv4 (arXiv 2401.06197), in millions.
PAPER_BASELINE, PAPER_DCN = 860, 566
# Stable Diffusion v1's U-Net, counted: its residual convolutions and self-attention are those of PAPER_SCALE.
STABLE_DIFFUSION = 859.5

PAPER_SCALE = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 64,
    "num_class_embeds": 1001,
}

VARIANTS = {
    "baseline": {"conv_operator": "conv", "attention_operator": "attention"},
    "dcnv4, 32 channels a group": {"dcn_group_channels": 32},
    "dcnv4, 16 channels a group": {"dcn_group_channels": 16},
    "dcnv4, 16 a group, resampling too": {"dcn_group_channels": 16, "resample_operator": "dcnv4"},
}

NOTE = """\
The paper's pair is {paper} M and {paper_dcn} M. {paper} M is the size of Stable Diffusion v1's U-Net ({sd} M): the
residual convolutions and self-attention of the baseline here, and besides them the cross-attention and feed-forward
layers of transformer blocks, which UNet2DModel does not have. The replacement at 16 channels a group saves
{saving:.1f} M; in a U-Net of {sd} M it would leave {left:.1f} M. How the paper placed its operator was not released.
Stock here: conv_in, conv_out, 1x1 shortcuts, embeddings and, unless said otherwise, the resampling convolutions."""


def count_by_kind(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of `model` by where they sit; the values sum to count_parameters(model).

    Returns:
        "convolutions" (the 3x3 ones of residual blocks and resampling, or what stands in their place), "attention"
        (or what stands in its place, with its norm) and "rest".
    """
    counts = {"convolutions": 0, "attention": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "attentions" in parts:
            counts["attention"] += parameter.numel()
        elif {"conv1", "conv2", "downsamplers", "upsamplers"} & set(parts):
            counts["convolutions"] += parameter.numel()
        else:
            counts["rest"] += parameter.numel()
    return counts


def paper_scale_counts() -> dict[str, dict[str, int]]:
    """For each variant at (320, 640, 1280, 1280) channels: count_by_kind plus "total". Allocates no weights."""
    counts = {}
    for name, operators in VARIANTS.items():
        with torch.device("meta"):
            model = DCNUNet2DModel(**PAPER_SCALE, **operators)
        counts[name] = count_by_kind(model) | {"total": count_parameters(model)}
    return counts


def describe_model(model: torch.nn.Module) -> dict[str, int]:
    """count_by_kind, "total" and the number of DCNv4 blocks of each kind."""
    modules = list(model.modules())
    return count_by_kind(model) | {
        "total": count_parameters(model),
        "dcnv4 convolutions": sum(isinstance(module, DCNv4Conv2d) for module in modules),
        "dcnv4 attentions": sum(isinstance(module, DCNv4Attention) for module in modules),
    }


def _print_table(counts: dict[str, dict[str, int]]) -> None:
    columns = ("convolutions", "attention", "rest", "total")
    print(f"{'millions of parameters':34}" + "".join(f"{column:>14}" for column in columns))
    for name, row in counts.items():
        print(f"{name:34}" + "".join(f"{row[column] / 1e6:>14.1f}" for column in columns))


def _comparison(counts: dict[str, dict[str, int]]) -> str:
    """How the paper's two figures and ours go together."""
    saving = (counts["baseline"]["total"] - counts["dcnv4, 16 channels a group"]["total"]) / 1e6
    return NOTE.format(
        paper=PAPER_BASELINE, paper_dcn=PAPER_DCN, sd=STABLE_DIFFUSION, saving=saving, left=STABLE_DIFFUSION - saving
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dcngen params [FOLDER] [--json]`: counts of a saved U-Net, or of the paper-scale pair."""
    parser = argparse.ArgumentParser(prog="dcngen params", description="Parameter counts of U-Nets.")
    parser.add_argument("folder", nargs="?", help="a saved U-Net (a pipeline's unet/); default: the paper-scale pair")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args(argv)
    counts = {args.folder: describe_model(load_unet(args.folder))} if args.folder else paper_scale_counts()
    if args.json:
        print(json.dumps(counts, indent=2))
        return 0
    _print_table(counts)
    if not args.folder:
        print("\n" + _comparison(counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
