"""Comparing trained runs under one plan: sample what is missing, score, judge."""

import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

import dcngen
from dcngen.data import ImageSet, open_images
from dcngen.evaluation.features import Features, extract_features, matching_reference, open_generated
from dcngen.evaluation.metrics import torchmetrics_image
from dcngen.evaluation.networks import FeatureNetwork
from dcngen.evaluation.repeats import Repeats, group_repeats
from dcngen.evaluation.runs import Run, config_differences, require_comparable, unequal_training, unet_flops
from dcngen.evaluation.scores import Scores, score
from dcngen.evaluation.spaces import INCEPTION, FeatureSpace
from dcngen.evaluation.verdict import Verdict, judge

FLOORS = {
    "train": "real (training split)",
    "reconstruction": "autoencoder alone (r{frechet})",
}


def floor_label(name: str, space: FeatureSpace) -> str:
    """The row's name in tables: rFID, or rFD-DINOv2."""
    return FLOORS[name].format(frechet=space.frechet)


@dataclass
class Arm:
    """One run, measured.

    Attributes:
        run: the run; name and folder are its.
        scores: both distances of its samples.
        verdict: against the first arm; None for the first arm itself.
        samples: its pictures.
        num_parameters, flops: of the U-Net; flops of one evaluation on one sample.
        sampling: images a second and seconds, from the time they were drawn.
    """

    run: Run
    scores: Scores
    samples: ImageSet
    num_parameters: int
    flops: int | None
    sampling: dict
    verdict: Verdict | None = None

    @property
    def name(self) -> str:
        return self.run.name


@dataclass
class Comparison:
    """Everything a report shows; ``to_dict`` is what ``compare.json`` holds."""

    plan: object
    arms: list[Arm]
    floors: dict[str, Scores]
    reference: ImageSet
    reference_indices: np.ndarray
    reference_note: str
    differences: dict[str, list]
    warnings: list[str]
    weights_digest: str
    weights_origin: str
    device: str
    space: FeatureSpace = INCEPTION
    seconds: float = 0.0
    command: str = ""
    versions: dict = field(default_factory=dict)
    repeats: list[Repeats] = field(default_factory=list)

    @property
    def judged(self) -> list:
        """What is judged, the baseline first: recipes of several training seeds where there are any, else the arms."""
        return self.repeats or self.arms

    def style(self, arm: Arm) -> str:
        """The class that colours an arm in the report, one a recipe."""
        recipes = [group.arms for group in self.repeats] or [[other] for other in self.arms]
        return f"arm{next(i for i, arms in enumerate(recipes) if any(arm is other for other in arms)) % 4}"

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan.digest(),
            "arms": [_arm_dict(arm) for arm in self.arms],
            "repeats": [group.to_dict() for group in self.repeats],
            "floors": {name: scores.to_dict() for name, scores in self.floors.items()},
            "reference": {
                "name": self.reference.name,
                "split": self.reference.split,
                "digest": self.reference.digest,
                "num_images": len(self.reference_indices),
                "choice": self.reference_note,
            },
            "feature_network": {
                "name": self.space.network,
                "digest": self.weights_digest,
                "origin": self.weights_origin,
                "resize": self.space.resize,
            },
            "differences": self.differences,
            "warnings": self.warnings,
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "command": self.command,
            "versions": self.versions,
        }


def _arm_dict(arm: Arm) -> dict:
    return {
        "name": arm.run.name,
        "folder": str(arm.run.folder),
        "scores": arm.scores.to_dict(),
        "verdict": arm.scores.space.named(asdict(arm.verdict)) if arm.verdict else None,
        "num_parameters": arm.num_parameters,
        "flops": arm.flops,
        "training": arm.run.training,
        "sampling": arm.sampling,
    }


def compare(
    run_folders: list[str | Path],
    plan,
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    floors: tuple[str, ...] = tuple(FLOORS),
    allow_different: bool = False,
    progress: bool = True,
) -> Comparison:
    """Score runs under one plan against the held-out part of their data set; the first run is the baseline.

    Runs that differ in the training seed alone are judged together, by their mean and the scatter between them.

    Args:
        run_folders: one or more run folders.
        plan: a :class:`dcngen.diffusion.plan.SamplePlan`; at least 20 pictures, for the error bars.
        network: from :func:`dcngen.evaluation.load_inception` or ``load_dinov2``; its device also draws the pictures.
        batch_size: of sampling.
        floors: bounds to score beside the runs: ``train`` (real training pictures: what perfect samples would score)
            and ``reconstruction`` (what the autoencoder alone costs, rFID).
        allow_different: compare runs of another autoencoder, data set or objective too.

    Raises:
        FileNotFoundError: a folder is no finished run.
        ValueError: the runs cannot be compared, or the plan does not fit them.
        RuntimeError: torchmetrics cannot be imported.
    """
    from dcngen.diffusion.digests import module_digest

    torchmetrics_image()  # what is broken should say so before the pictures are drawn
    started = time.perf_counter()
    device = next(network.parameters()).device
    runs = [Run.open(folder) for folder in run_folders]
    pipelines = [run.load_pipeline() for run in runs]
    train_sets = [open_images(run.data_config, "train", progress=progress) for run in runs]
    vae_digests = [module_digest(pipeline.vae) for pipeline in pipelines]
    warnings = require_comparable(runs, vae_digests, [images.digest for images in train_sets], allow_different)

    warnings += unequal_training(runs)

    reference = open_images(runs[0].data_config, "reference", progress=progress)
    labels = plan.labels(getattr(pipelines[0], "num_classes", 0))
    indices, note = matching_reference(reference, None if labels is None else np.asarray(labels), plan.num_images)
    real = extract_features(reference, network, indices=indices, progress=progress, cache_root=_cache(runs[0]))

    arms = []
    for run, pipeline in zip(runs, pipelines, strict=True):
        arms.append(_measure(run, pipeline.to(device), plan, network, real, batch_size, progress))
        if arms[0] is not arms[-1]:
            arms[-1].verdict = judge(arms[0].scores, arms[-1].scores)
        pipeline.to("cpu")

    result = Comparison(
        plan=plan,
        arms=arms,
        floors={},
        reference=reference,
        reference_indices=indices,
        reference_note=note,
        differences=config_differences(runs),
        warnings=warnings,
        weights_digest=network.weights_digest,
        weights_origin=network.weights_origin,
        device=_device_name(device),
        space=network.space,
        versions=_versions(),
        repeats=group_repeats(arms),
    )
    cache = _cache(runs[0])
    if "train" in floors and reference.split != "train":  # else the pictures would be compared with themselves
        result.floors["train"] = _train_floor(train_sets[0], reference, indices, network, real, cache, progress)
    if "reconstruction" in floors:
        vae = pipelines[0].vae.to(device)
        reconstructed = reconstruct(reference, indices, vae, vae_digests[0], progress)
        features = extract_features(reconstructed, network, progress=progress, cache_root=cache)
        result.floors["reconstruction"] = score(features, real, device=device, errors=False)
    result.seconds = time.perf_counter() - started
    return result


def _cache(run: Run) -> Path:
    return run.data_config.cache_root


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    versions = {"dcngen": dcngen.__version__, "torch": torch.__version__, "torchmetrics": version("torchmetrics")}
    return versions | {"python": platform.python_version()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _measure(run: Run, pipeline, plan, network, real: Features, batch_size, progress: bool) -> Arm:
    from dcngen.diffusion.digests import pipeline_digest
    from dcngen.diffusion.sampling import sample_images
    from dcngen.models import count_parameters

    # The scheduler belongs to the model: another sampler of the same weights lands in another folder by its plan.
    folder = run.folder / "evaluation" / f"{plan.digest()[:12]}-{pipeline_digest(pipeline)[:12]}"
    if progress:
        tqdm.write(f"{run.name}: {plan.num_images:,} pictures in {folder}")
    sample_images(pipeline, plan, folder, batch_size=batch_size, save_png=False, save_npz=True, progress=progress)
    samples = open_generated(folder)
    features = extract_features(samples, network, described=run.name, progress=progress, cache_root=_cache(run))
    return Arm(
        run=run,
        scores=score(features, real, device=next(network.parameters()).device, progress=progress),
        samples=samples,
        num_parameters=count_parameters(pipeline.unet),
        flops=unet_flops(pipeline.unet),
        sampling=_sampling_speed(folder),
    )


def _sampling_speed(folder: Path) -> dict:
    import json

    record = json.loads((folder / "plan.json").read_text())
    seconds, drawn = record.get("seconds"), record.get("num_drawn")
    rate = drawn / seconds if seconds and drawn else None
    return {"images_per_second": rate, "seconds": seconds, "device": record.get("device"), "folder": str(folder)}


def _train_floor(train: ImageSet, reference: ImageSet, indices, network, real, cache, progress: bool) -> Scores:
    """As many training pictures of each class as the reference has; where a class lacks them, the set's own mixture."""
    chosen, _ = matching_reference(train, reference.labels[indices], len(indices))
    features = extract_features(train, network, indices=chosen, progress=progress, cache_root=cache)
    return score(features, real, device=next(network.parameters()).device, errors=False)


@torch.inference_mode()
def reconstruct(images: ImageSet, indices: np.ndarray, vae, vae_digest: str, progress: bool = True) -> ImageSet:
    """Pictures encoded (to the posterior's mean) and decoded again, rounded by the same rule as samples are."""
    import hashlib

    from dcngen.diffusion import to_uint8

    device = next(vae.parameters()).device
    pixels = np.empty((len(indices), 3, images.image_size, images.image_size), dtype=np.uint8)
    bar = tqdm(total=len(indices), desc="autoencoder reconstructions", unit="img", disable=not progress)
    with bar:
        for start in range(0, len(indices), 32):
            chunk = indices[start : start + 32]
            x = images.batch(chunk)[0].to(device).float() / 127.5 - 1
            decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample
            pixels[start : start + len(chunk)] = to_uint8(decoded).cpu().numpy()
            bar.update(len(chunk))
    digest = hashlib.sha256(f"{images.digest} through {vae_digest}".encode() + pixels.tobytes()).hexdigest()
    name = f"{images.name} through the autoencoder"
    return ImageSet(
        pixels, images.labels[indices], images.class_names, digest=digest, name=name, split="reconstruction"
    )
