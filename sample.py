"""Draw pictures from a trained model.

    python sample.py --run runs/earth_dcn --num-images 64 --class-labels 0 1 2 3 --seed 0 --out samples/
    accelerate launch --multi_gpu --num_processes 4 sample.py --run runs/cifar10_dcn --num-images 50000 --out samples/

Picture i is drawn from seed + i and its label alone: the same with one process or many. Started again with the same
arguments, it draws only what is missing. One process on a CPU keeps all cores busy; more are for more machines (and
also need --multi_gpu, in spite of its name: without it accelerate starts a single process on a CPU).
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from dcngen.diffusion import SAMPLERS, LatentDiffusionPipeline, SamplePlan, sample_images
from dcngen.diffusion.loading import load_model, load_run, parse_class_labels


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    state = join_processes(args.device)
    try:
        pipeline = open_pipeline(args, state.device)
        plan = make_plan(args, pipeline)
        if state.is_main_process:
            print_plan(plan, pipeline, args.out)
        folder = sample_images(
            pipeline,
            plan,
            args.out,
            batch_size=args.batch_size,
            accelerator=state,
            save_npz=args.npz,
            progress=not args.quiet,
        )
        if state.is_main_process:
            print(f"{plan.num_images} pictures in {folder}, overview in {folder / 'grid.png'}")
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("DCNGEN_TRACEBACK"):
            raise
        print(f"sample.py: {error}\n(DCNGEN_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        return 1
    finally:
        state.destroy_process_group()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a training run; its EMA weights are used")
    source.add_argument("--model", help="a saved pipeline: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")

    plan = parser.add_argument_group("what to draw")
    plan.add_argument("--num-images", type=int, default=64)
    plan.add_argument("--class-labels", nargs="+", metavar="CLASS", help="ids or names, cycled; default: all classes")
    plan.add_argument("--seed", type=int, default=0, help="picture i has seed + i")
    plan.add_argument("--sampler", choices=SAMPLERS, default="dpm-solver++")
    plan.add_argument("--steps", type=int, default=50, help="solver steps; heun evaluates the model twice in each")
    plan.add_argument("--guidance-scale", type=float, default=1.0, help="g in uncond + g * (cond - uncond); 1: none")

    compute = parser.add_argument_group("how to compute it")
    compute.add_argument("--batch-size", type=int, help="pictures a batch; default 64 on a GPU, 8 on a CPU")
    compute.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="of the U-Net")
    compute.add_argument("--compile", action="store_true", help="compile the U-Net with torch.compile")
    compute.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU if there is one")
    compute.add_argument("--npz", action="store_true", help="write samples.npz (N, H, W, 3) uint8 besides the PNGs")
    compute.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def join_processes(device: str) -> PartialState:
    """This process's place among those that a launcher has started: its rank, their number, its device."""
    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu)
    if state.num_processes == 1 and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        print("note: accelerate has started one process only; on a CPU pass it --multi_gpu for more", file=sys.stderr)
    return state


def open_pipeline(args: argparse.Namespace, device: torch.device) -> LatentDiffusionPipeline:
    pipeline = load_run(args.run) if args.run else load_model(args.model)
    pipeline.to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    if args.compile:
        pipeline.unet.compile()
    return pipeline


def make_plan(args: argparse.Namespace, pipeline: LatentDiffusionPipeline) -> SamplePlan:
    return SamplePlan(
        num_images=args.num_images,
        seed=args.seed,
        class_labels=parse_class_labels(args.class_labels, pipeline),
        sampler=args.sampler,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        mixed_precision=args.mixed_precision,
    )


def print_plan(plan: SamplePlan, pipeline: LatentDiffusionPipeline, out: Path) -> None:
    if plan.class_labels is None:
        classes = f"all {pipeline.num_classes} in turn" if pipeline.num_classes else "none (unconditional)"
    else:
        classes = " ".join(map(str, plan.class_labels))
    print(
        f"{plan.num_images} pictures, seeds {plan.seed} to {plan.seed + plan.num_images - 1}, classes {classes}, "
        f"{plan.sampler} {plan.steps} steps, guidance {plan.guidance_scale:g}, on {pipeline.device} -> {out}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
