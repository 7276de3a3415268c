"""torch.compile for U-Nets that stay as they are, without asking all their modules at every call whether they do."""

from __future__ import annotations

import torch

FROM = "skip_guard_on_all_nn_modules_unsafe"  # of torch.compiler: torch has filters for guards where it has this


def compile_model(model: torch.nn.Module, mode: str = "default", *, fullgraph: bool = False) -> torch.nn.Module:
    """Compiles the model's calls in place, with static shapes, as `model.compile(dynamic=False, mode=mode)` does.

    Before each call torch otherwise checks every module for new hooks, attributes and types: 11,600 checks for the
    U-Net of `bench model`, 2 to 4 ms on a CPU core. Here it checks the arguments, the global state and the modules'
    `training` alone. Changed in another way after its first call, by hooks, swapped or frozen modules, the model must
    be compiled again (`torch.compiler.reset()` first).

    Args:
        model: any module.
        mode: of torch.compile.
        fullgraph: raise where the model is not one graph.

    Returns:
        The model.
    """
    if not hasattr(torch.compiler, FROM):
        model.compile(dynamic=False, fullgraph=fullgraph, mode=mode)
        return model
    options = {**torch._inductor.list_mode_options(mode), "guard_filter_fn": _guards_to_keep}
    model.compile(dynamic=False, fullgraph=fullgraph, options=options)
    return model


def _guards_to_keep(guards) -> list[bool]:
    keep = getattr(torch.compiler, FROM)(guards)
    return [kept or guard.name.endswith(".training") for kept, guard in zip(keep, guards, strict=True)]
