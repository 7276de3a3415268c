"""`python -m dcngen.ops.build`: compiles the libraries from a source checkout into a folder, for development and CI.

Installing the package does the same through pip. Nothing here runs at import or at first use of the operator.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import native

SOURCES = Path(__file__).resolve().parents[2] / "kernels"


def main(argv: list[str] | None = None) -> int:
    """Builds the libraries asked for, loads each, and prints what they hold; 1 where one does not load."""
    parser = argparse.ArgumentParser(prog="python -m dcngen.ops.build", description=__doc__)
    parser.add_argument("--libraries", default="cuda", help="cpu, cuda or cpu,cuda (default: cuda)")
    parser.add_argument("--cuda-architectures", default="", help='such as "90" or "80;90" (default: all supported)')
    parser.add_argument("--out", type=Path, default=Path("build/kernels"), help="folder of the build")
    arguments = parser.parse_args(argv)
    if not SOURCES.is_dir():
        parser.error(f"expected the kernels' sources at {SOURCES}; run this from a source checkout")
    kinds = arguments.libraries.split(",")
    build(arguments.out, kinds, arguments.cuda_architectures)

    os.environ[native.LIBRARY_DIR_VARIABLE] = str(arguments.out.resolve())
    native.forget()
    failed = False
    for library in native.status():
        if library.kind in kinds:
            failed |= library.error is not None
            print(f"{library.kind}: {library.error or f'{library.path} ({library.details})'}")
    return int(failed)


def build(out: Path, kinds: list[str], cuda_architectures: str = "") -> None:
    """Configures and compiles; raises subprocess.CalledProcessError where CMake or a compiler fails."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake, ninja = shutil.which("cmake", path=tools), shutil.which("ninja", path=tools)
    if cmake is None:
        raise FileNotFoundError("cmake was not found; install it with: pip install cmake ninja")
    configure = [
        *(cmake, "-S", str(SOURCES), "-B", str(out), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DDCNGEN_REQUIRE={','.join(kinds)}",
        f"-DDCNGEN_CPU={'ON' if 'cpu' in kinds else 'OFF'}",
        f"-DDCNGEN_CUDA={'ON' if 'cuda' in kinds else 'OFF'}",
        f"-DDCNGEN_CUDA_ARCHITECTURES={cuda_architectures}",
    ]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(out), "--parallel", str(os.cpu_count() or 1)], check=True)


if __name__ == "__main__":
    sys.exit(main())
