"""Opening a trained pipeline from a run, a folder or the hub, with errors that say what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL

from dcngen.diffusion.pipeline import LatentDiffusionPipeline

RUN_PIPELINE = "pipeline"


def load_run(run: str | Path) -> LatentDiffusionPipeline:
    """The pipeline of a training run, with its EMA weights, on the CPU.

    Raises:
        FileNotFoundError: no such run, or one that has not written its pipeline yet.
    """
    run = Path(run)
    if not run.is_dir():
        siblings = [path.parent.name for path in run.parent.glob(f"*/{RUN_PIPELINE}")] if run.parent.is_dir() else []
        known = f"; {run.parent} has {', '.join(sorted(siblings))}" if siblings else ""
        raise FileNotFoundError(f"--run expected a run folder, got {run}, which does not exist{known}")
    folder = run / RUN_PIPELINE
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{run} expected a folder {RUN_PIPELINE}/ with the trained pipeline, found none; the run has not written "
            "it yet, or this is no run folder (a saved pipeline is opened with --model)"
        )
    return LatentDiffusionPipeline.from_pretrained(folder, use_safetensors=True)


def load_model(name_or_path: str | Path) -> LatentDiffusionPipeline:
    """A saved pipeline by folder or hub id, on the CPU. Only safetensors weights are read.

    A self-contained export is opened with this package's classes: the code that lies in it is not run.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a pipeline.
    """
    path = Path(name_or_path)
    if path.is_dir() and not (path / "model_index.json").is_file():
        hint = f"; for a training run use --run {path}" if (path / RUN_PIPELINE).is_dir() else ""
        raise FileNotFoundError(f"{path} expected a model_index.json, found none{hint}")
    if not path.is_dir() and (path.is_absolute() or str(name_or_path).count("/") != 1):
        raise FileNotFoundError(f"--model expected a folder or a hub id (owner/name), got {name_or_path}")
    index = LatentDiffusionPipeline.load_config(name_or_path)
    if isinstance(index["_class_name"], list):
        return _load_export(name_or_path, index)
    return LatentDiffusionPipeline.from_pretrained(name_or_path, use_safetensors=True)


def _load_export(name_or_path: str | Path, index: dict[str, Any]) -> LatentDiffusionPipeline:
    library, unet_class = index["unet"]
    # Only here and in the export does this package ask for the models: elsewhere the U-Net is a callable.
    classes = {
        "unet": getattr(
            importlib.import_module("diffusers" if library == "diffusers" else "dcngen.models"), unet_class
        ),
        "vae": AutoencoderKL,
        "scheduler": getattr(diffusers, index["scheduler"][1]),
    }
    arguments = {"unet": {"use_safetensors": True}, "vae": {"use_safetensors": True}, "scheduler": {}}
    parts = {
        name: part.from_pretrained(name_or_path, subfolder=name, **arguments[name]) for name, part in classes.items()
    }
    return LatentDiffusionPipeline(**parts, class_names=index.get("class_names"))


def parse_class_labels(names: Sequence[str] | None, pipeline: LatentDiffusionPipeline) -> tuple[int, ...] | None:
    """Class ids from the command line's ids or names; None stays None.

    Raises:
        ValueError: a name that the pipeline does not have; the message names the nearest.
    """
    if names is None:
        return None
    class_names = list(pipeline.config.get("class_names") or [])
    labels = []
    for name in names:
        if name in class_names:
            labels.append(class_names.index(name))
        elif name.isdigit():
            labels.append(int(name))
        else:
            close = difflib.get_close_matches(name, class_names, n=1)
            known = f"did you mean {close[0]!r}?" if close else f"the model has {', '.join(class_names) or 'no names'}"
            raise ValueError(f"class label expected a number or a class name, got {name!r}; {known}")
    return tuple(labels)
