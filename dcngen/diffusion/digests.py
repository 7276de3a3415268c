"""Fingerprints of what a picture depends on: plans, models, pipelines."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def module_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, dtypes, shapes and bytes.

    The memory format, the device and a wrapper of torch.compile do not count. About a second for each gigabyte.
    """
    module = getattr(module, "_orig_mod", module)
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pipeline_digest(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of everything in a pipeline that its pictures depend on, apart from the arguments of the call."""
    parts = {"scheduler": _settings(pipeline.scheduler)}
    for name in ("unet", "vae"):
        module = getattr(pipeline, name)
        parts[name] = {"settings": _settings(module), "weights": module_digest(module)}
    return json_digest(parts)


def _settings(component: Any) -> dict[str, Any]:
    """A component's configuration without what diffusers notes about its files and versions."""
    component = getattr(component, "_orig_mod", component)
    settings = {key: value for key, value in dict(component.config).items() if not key.startswith("_")}
    return {"class": type(component).__name__, **json.loads(json.dumps(settings, default=str))}
