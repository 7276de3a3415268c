"""Builds of the package on machines that lack a compiler, played by a PATH that holds only chosen programs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    "dcngen",
    "kernels",
    "configs",
    "train_ldm.py",
    "sample.py",
)
BASICS = ("sh", "env", "cat", "uname", "sed", "grep", "rm", "mkdir", "ls", "cp", "mv")
COMPILER = ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "nm", "objcopy", "strip")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    missing = [name for name in ("scikit_build_core", "pip") if importlib.util.find_spec(name) is None]
    missing += [name for name in ("cmake", "ninja") if _which(name) is None]
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.slow)
            if missing or not (ROOT / "kernels").is_dir():
                item.add_marker(pytest.mark.skip(reason=f"needs a source checkout and the dev extras: {missing}"))


def _which(name):
    beside_python = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath)]))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the sources: builds leave nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """machine("compiler", "nvcc") -> the environment of a machine that has these, and CMake and Ninja."""

    def environment(*kinds):
        folder = tmp_path_factory.mktemp("bin")
        names = (*BASICS, "cmake", "ninja", *(COMPILER if "compiler" in kinds else ()))
        for name in names:
            if found := _which(name):
                (folder / name).symlink_to(found)
        variables = {"HOME": str(folder), "PATH": str(folder), "TMPDIR": str(folder)}
        # Named, since CMake also looks in the usual places of the system.
        variables["CUDACXX"] = _which("nvcc") if "nvcc" in kinds else str(folder / "no-nvcc")
        if "compiler" not in kinds:
            variables["CXX"] = str(folder / "no-compiler")
        return variables

    return environment


@pytest.fixture
def build_wheel(source, tmp_path):
    """build_wheel(environment) -> the completed pip process, all it said in stdout; the wheel is in tmp_path/wheels."""

    def build(environment):
        command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-v"]
        command += ["--disable-pip-version-check", "-w", str(tmp_path / "wheels")]
        return subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )

    return build


@pytest.fixture
def new_venv(tmp_path):
    """An environment of its own that sees this one's packages (torch is large), and installs into it."""

    class Venv:
        python = tmp_path / "venv" / "bin" / "python"

        def __init__(self):
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
            paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
            self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
            (self.site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")

        def install(self, *arguments, environment=None):
            command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps"]
            command += ["--disable-pip-version-check", "--no-build-isolation", *map(str, arguments)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
            assert result.returncode == 0, result.stdout + result.stderr

        def run(self, *arguments, **variables):
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("DCNGEN_", "PYTHON"))}
            return subprocess.run(
                [str(self.python), *arguments],
                env=environment | variables,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )

    return Venv()
