"""Everything in this folder needs a CUDA device and the compiled CUDA library; elsewhere it is skipped, and says so."""

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    from dcngen.ops import native

    try:
        native.cuda_library()
    except Exception as error:  # whatever kept it from loading is the reason to print
        return f"CUDA library not loaded: {error}"
    return None


def pytest_collection_modifyitems(items):
    reason = _missing()
    for item in items:
        if _HERE not in Path(item.fspath).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
