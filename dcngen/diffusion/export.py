"""Export a pipeline to a folder that loads with diffusers alone, in a process where dcngen is not installed."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from pathlib import Path

from dcngen.data.files import atomic_directory
from dcngen.diffusion import pipeline as pipeline_module
from dcngen.diffusion.loading import load_model, load_run
from dcngen.diffusion.pipeline import LatentDiffusionPipeline

# diffusers finds custom code by name: <name>.py beside model_index.json, or in the component's own folder.
PIPELINE_MODULE = "pipeline"
UNET_MODULE = "modeling_dcn_unet"

README = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {title}

Class-conditional latent diffusion with a {unet} of {parameters:,} parameters, exported by dcngen.
This folder carries its code (`pipeline.py`{modeling}): read it, then

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/or/name", trust_remote_code=True)
images = pipeline(class_labels=[0, 1], seeds=[0, 1], num_inference_steps=50, guidance_scale=1.0).images
```

Classes: {classes}.

Needs torch and diffusers. Where dcngen is installed too, its compiled operator is used: the same pictures, faster.
"""


def export_self_contained(pipeline: LatentDiffusionPipeline, folder: str | Path) -> Path:
    """Write `pipeline` with all the code it needs to `folder`, which must not exist yet; whole or not at all.

    The folder is that of `save_pretrained` plus pipeline.py, for a DCNUNet2DModel unet/modeling_dcn_unet.py, a
    model_index.json naming both, and a README.md. `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`
    then loads it; the same seeds give the same latents as here.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is there already.
        TypeError: a U-Net class that is neither diffusers' own nor DCNUNet2DModel.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} expected not to exist; choose another folder, or delete this one")
    source = _unet_source(pipeline)
    with atomic_directory(folder) as scratch:
        pipeline.save_pretrained(scratch)
        (scratch / f"{PIPELINE_MODULE}.py").write_text(inspect.getsource(pipeline_module), encoding="utf-8")
        if source is not None:
            (scratch / "unet" / f"{UNET_MODULE}.py").write_text(source, encoding="utf-8")
        _name_code(scratch / "model_index.json", custom_unet=source is not None)
        for config in scratch.rglob("*.json"):
            _forget_origin(config)
        (scratch / "README.md").write_text(_readme(pipeline, folder.name, source is not None), encoding="utf-8")
    return folder


def _unet_source(pipeline: LatentDiffusionPipeline) -> str | None:
    """The code of the U-Net's class as one file; None for a class that diffusers itself has."""
    unet_class = type(getattr(pipeline.unet, "_orig_mod", pipeline.unet))
    if unet_class.__module__.startswith("diffusers."):
        return None
    if unet_class.__name__ != "DCNUNet2DModel":
        raise TypeError(
            f"the U-Net expected to be a DCNUNet2DModel or one of diffusers' own, got {unet_class.__qualname__}; "
            "export it with code of your own, after pipeline.save_pretrained()"
        )
    # Only here does this package ask for the models: everything else knows the U-Net as a callable.
    return importlib.import_module("dcngen.models.export").self_contained_model_source()


def _name_code(model_index: Path, custom_unet: bool) -> None:
    index = json.loads(model_index.read_text(encoding="utf-8"))
    index["_class_name"] = [PIPELINE_MODULE, LatentDiffusionPipeline.__name__]
    if custom_unet:
        index["unet"] = [UNET_MODULE, "DCNUNet2DModel"]
    model_index.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_origin(config: Path) -> None:
    """Remove the path that a part was loaded from: it means nothing elsewhere, and tells about this machine."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _readme(pipeline: LatentDiffusionPipeline, title: str, custom_unet: bool) -> str:
    names = pipeline.config.get("class_names") or [str(label) for label in range(pipeline.num_classes)]
    return README.format(
        title=title,
        unet=type(getattr(pipeline.unet, "_orig_mod", pipeline.unet)).__name__,
        parameters=sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        modeling=f", `unet/{UNET_MODULE}.py`" if custom_unet else "",
        classes=", ".join(f"{i} {name}" for i, name in enumerate(names)) or "none",
    )


def main(argv: list[str] | None = None) -> int:
    """`python -m dcngen export`: export a run or a saved pipeline."""
    parser = argparse.ArgumentParser(prog="python -m dcngen export", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="a training run; its EMA weights are exported")
    source.add_argument("--model", help="a saved pipeline: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    args = parser.parse_args(argv)
    pipeline = load_run(args.run) if args.run else load_model(args.model)
    folder = export_self_contained(pipeline, args.out)
    print(
        f"wrote {folder}\nload it anywhere: DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )
    return 0
