"""``python -m dcngen compare``: sample trained runs under one plan, score them, and write a report."""

import argparse
import hashlib
import shlex
from pathlib import Path

from dcngen.evaluation.comparison import FLOORS, compare
from dcngen.evaluation.networks import add_network_arguments, load_network
from dcngen.evaluation.report import terminal_table, write_report


def build_parser() -> argparse.ArgumentParser:
    from dcngen.diffusion import SAMPLERS

    parser = argparse.ArgumentParser(prog="python -m dcngen compare", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "runs", nargs="+", help="run folders; the first is the baseline, training seeds of one recipe go together"
    )
    plan = parser.add_argument_group("plan", "one for all runs")
    plan.add_argument("--num-images", type=int, default=2048, help="pictures from each run (default: 2048)")
    plan.add_argument("--seed", type=int, default=0, help="seed of the first picture; picture i has seed + i")
    plan.add_argument("--class-labels", type=int, nargs="+", help="labels to cycle through (default: all)")
    plan.add_argument("--sampler", choices=SAMPLERS, default="dpm-solver++")
    plan.add_argument("--steps", type=int, default=50)
    plan.add_argument("--guidance-scale", type=float, default=1.0)
    plan.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--out", type=Path, help="the page (default: compare-<runs>/report.html beside the first run)")
    parser.add_argument("--batch-size", type=int, help="of sampling")
    parser.add_argument("--floors", nargs="*", choices=FLOORS, default=list(FLOORS), help="bounds to score as well")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare runs that differ in autoencoder or data"
    )
    add_network_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: list[str] | None = None) -> int:
    from dcngen.diffusion.plan import SamplePlan

    options = build_parser().parse_args(argv)
    plan = SamplePlan(
        num_images=options.num_images,
        seed=options.seed,
        class_labels=options.class_labels,
        sampler=options.sampler,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        mixed_precision=options.mixed_precision,
    )
    network = load_network(options)
    result = compare(
        options.runs,
        plan,
        network,
        batch_size=options.batch_size,
        floors=tuple(options.floors),
        allow_different=options.allow_different,
        progress=not options.quiet,
    )
    result.command = "python -m dcngen compare " + shlex.join(argv or [])
    print("\n" + terminal_table(result) + "\n")
    page, numbers = write_report(result, options.out or default_page(options.runs, options.features))
    print(f"numbers  {numbers}\nreport   {page.resolve()}")
    return 0


def default_page(runs: list[str], features: str = "inception") -> Path:
    """``compare-<first>-<second>/report.html`` beside the first run; other features than Inception's add their name.

    Of many runs the name tells the first, how many there are, and a digest.
    """
    folders = [Path(run).resolve() for run in runs]
    name = "-".join(folder.name for folder in folders)
    if len(name) > 100:
        name = f"{folders[0].name[:60]}-and-{len(folders) - 1}-more-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    suffix = "" if features == "inception" else f"-{features}"
    return folders[0].parent / f"compare-{name}{suffix}" / "report.html"
