"""``python -m dcngen evaluate``: FID and KID (or FD-DINOv2) of pictures against a data set or stored statistics."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dcngen.data import DataConfig, ImageSet, open_images
from dcngen.evaluation.features import extract_features, matching_reference, open_generated
from dcngen.evaluation.inception_weights import export_weights
from dcngen.evaluation.metrics import torchmetrics_image
from dcngen.evaluation.networks import add_network_arguments, load_network
from dcngen.evaluation.scores import Scores, load_statistics, save_statistics, score
from dcngen.evaluation.statistics import Z95


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dcngen evaluate", description=__doc__.split(": ", 1)[1])
    parser.add_argument("images", nargs="?", help="folder written by sample.py, a flat folder of pictures, or an .npz")
    parser.add_argument("--data", help="reference pictures: earth, fashion-mnist, a folder, or a hub data set")
    parser.add_argument("--data-split", choices=["reference", "train"], default="reference")
    parser.add_argument("--source", help="a local copy of what the preset in --data would fetch")
    parser.add_argument("--statistics", type=Path, help="stored reference statistics instead of --data")
    parser.add_argument("--all-reference", action="store_true", help="compare with every reference picture, not with N")
    parser.add_argument("--num-images", type=int, help="use the first so many generated pictures")
    add_network_arguments(parser)
    parser.add_argument("--no-errors", action="store_true", help="skip the error bars (20 times less linear algebra)")
    parser.add_argument("--save-statistics", type=Path, help="write the statistics of IMAGES, or else of --data")
    parser.add_argument("--json", type=Path, dest="json_path", help="write the scores as JSON")
    parser.add_argument("--export-inception", type=Path, help="write Inception's weights to this file and stop")
    parser.add_argument("--half", action="store_true", help="with --export-inception: convolutions as float16")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.export_inception:
        weights = export_weights(options.export_inception, half=options.half, source=options.inception_weights)
        print(f"wrote {options.export_inception} ({options.export_inception.stat().st_size / 1e6:.0f} MB)")
        print(f"digest {weights.digest}")
        return 0
    if options.images is None and not (options.data and options.save_statistics):
        parser.error("name the pictures to evaluate (or give --data and --save-statistics, or --export-inception)")
    if options.images is not None and not (options.data or options.statistics or options.save_statistics):
        parser.error("give what to compare with: --data NAME or --statistics FILE")
    network = load_network(options)
    if options.images is None:
        return _save_data_statistics(options, network)
    return _evaluate(options, network)


def _data_config(options, image_size: int) -> DataConfig:
    return DataConfig(name=options.data, image_size=image_size, source=options.source)


def _save_data_statistics(options, network) -> int:
    images = open_images(_data_config(options, 32), options.data_split)
    save_statistics(extract_features(images, network), options.save_statistics)
    print(f"wrote {options.save_statistics}: {len(images):,} pictures of {images.name} ({images.split})")
    return 0


def _evaluate(options, network) -> int:
    if options.data or options.statistics:
        torchmetrics_image()  # what is broken should say so before the features are computed
    images = open_generated(options.images)
    real = None
    if options.data and not options.statistics:
        real = open_images(_data_config(options, images.image_size), options.data_split)
        images = labelled(images, labels_for(options.images, images, real.num_classes))
    indices = range(min(len(images), options.num_images or len(images)))
    generated = extract_features(images, network, indices=list(indices), described=str(options.images))
    if options.save_statistics:
        save_statistics(generated, options.save_statistics)
        print(f"wrote {options.save_statistics}")
        if not (options.data or options.statistics):
            return 0
    started = time.perf_counter()
    if options.statistics:
        reference, provenance = load_statistics(options.statistics, generated.provenance)
        described = provenance.described if provenance else f"{options.statistics} (no provenance)"
    else:
        chosen, described = None, f"all of {real.name} ({real.split})"
        if not options.all_reference:
            labels = None if images.class_names == ["all"] else images.labels[: len(indices)]
            chosen, described = matching_reference(real, labels, len(indices))
        reference = extract_features(real, network, indices=chosen)
    scores = score(generated, reference, device=options.device, errors=not options.no_errors, progress=True)
    print_scores(scores, described)
    print(f"({time.perf_counter() - started:.1f} s)")
    if options.json_path:
        content = {**scores.to_dict(), "provenance": asdict(generated.provenance), "reference": described}
        options.json_path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    return 0


def labels_for(path: str, images: ImageSet, num_classes: int) -> np.ndarray | None:
    """Labels of generated pictures: their own, or those of the plan beside them; None when neither is known."""
    if images.class_names != ["all"]:
        return images.labels
    plan_file = Path(path) / "plan.json"
    if not plan_file.is_file():
        return None
    from dcngen.diffusion.plan import SamplePlan

    plan = SamplePlan.from_dict(json.loads(plan_file.read_text())["plan"])
    labels = plan.labels(num_classes)
    return None if labels is None or len(labels) != len(images) else np.asarray(labels)


def labelled(images: ImageSet, labels: np.ndarray | None) -> ImageSet:
    """The pictures with these labels, by which choices and error bars are spread over the classes."""
    if labels is not None and images.class_names == ["all"]:
        images.labels = np.asarray(labels, dtype=np.int64)
        images.class_names = [str(label) for label in range(int(images.labels.max(initial=0)) + 1)]
    return images


def print_scores(scores: Scores, reference: str) -> None:
    """The scores as text, caveats below."""
    print(f"N = {scores.num_images:,} generated, {scores.num_reference:,} reference: {reference}")
    frechet, kernel = scores.space.frechet, scores.space.kernel
    error = "" if np.isnan(scores.frechet_error) else f" +- {Z95 * scores.frechet_error:.3f}"
    print(f"{frechet:<15}{scores.frechet:.3f}{error}")
    if scores.kernel is not None:
        error = f" +- {Z95 * scores.kernel_error:.5f}" if scores.kernel_error is not None else ""
        print(f"{kernel:<15}{scores.kernel:.5f}{error}")
    if scores.frechet_infinity is not None:
        print(f"{frechet + '-infinity ':<15}{scores.frechet_infinity:.3f}")
    for note in scores.notes:
        print(f"note: {note}")
