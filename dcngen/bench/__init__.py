"""Benchmarks behind ``python -m dcngen bench``; each refuses to print a speed for a wrong result."""

from __future__ import annotations

import importlib
import sys

_BENCHMARKS = {
    "operator": "dcngen.bench.operator",
    "layer": "dcngen.bench.layer",
    "model": "dcngen.bench.model",
}


def main(argv: list[str] | None = None) -> int:
    """``python -m dcngen bench NAME [options]``: runs one benchmark and returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in _BENCHMARKS:
        print(f"usage: python -m dcngen bench {{{','.join(_BENCHMARKS)}}} [options]", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return importlib.import_module(_BENCHMARKS[argv[0]]).main(argv[1:])
