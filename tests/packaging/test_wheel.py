"""`pip install .` with and without a C++ compiler and nvcc."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")

CALL = """
import torch, dcngen.ops as ops
input, offset_mask = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4, 56)
with ops.backend({backend!r}):
    output = ops.dcnv4(input, offset_mask, groups=2)
torch.testing.assert_close(output, ops.dcnv4_reference(input, offset_mask, groups=2), rtol=1e-4, atol=1e-5)
print("right")
"""


def _wheel(tmp_path, result):
    assert result.returncode == 0, result.stdout
    (wheel,) = (tmp_path / "wheels").iterdir()
    return wheel


def _libraries(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if name.startswith("dcngen/lib/"))


def test_without_a_compiler_it_installs_and_runs_in_plain_torch(machine, build_wheel, new_venv, tmp_path):
    result = build_wheel(machine())
    wheel = _wheel(tmp_path, result)
    assert "cpu kernels are left out: no working C++ compiler" in result.stdout
    assert _libraries(wheel) == []
    new_venv.install(wheel)
    called = new_venv.run("-c", CALL.format(backend="auto"))
    assert called.stdout.strip() == "right" and "plain torch" in called.stderr, called.stderr
    forced = new_venv.run("-c", CALL.format(backend="native"))
    assert forced.returncode != 0 and "NativeLibraryError" in forced.stderr and "DCNGEN_REQUIRE" in forced.stderr
    info = new_venv.run("-m", "dcngen", "info")
    assert "not found" in info.stdout and info.returncode == 0, info.stderr


@needs_compiler
def test_without_nvcc_it_installs_the_cpu_kernels(machine, build_wheel, new_venv, tmp_path):
    result = build_wheel(machine("compiler"))
    wheel = _wheel(tmp_path, result)
    assert "cuda kernels are left out" in result.stdout
    assert _libraries(wheel) == ["dcngen/lib/libdcngen_cpu.so"]
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    new_venv.install(wheel)
    called = new_venv.run("-W", "error", "-c", CALL.format(backend="native"))
    assert called.stdout.strip() == "right", called.stderr
    info = new_venv.run("-m", "dcngen", "info")
    assert str(new_venv.site / "dcngen" / "lib" / "libdcngen_cpu.so") in info.stdout, info.stderr


def _spills(build_log, architecture):
    """Entry function -> bytes of local memory (stack frame, spill stores, spill loads), from ptxas's account."""
    found, entry = {}, None
    for line in build_log.splitlines():
        if named := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry = named[1] if named[2] == architecture else None
        elif "bytes stack frame" in line and entry:
            found[entry] = sum(int(n) for n in re.findall(r"(\d+) bytes", line))
            entry = None
    return found


def test_the_account_of_spills_is_understood():
    log = """ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelv
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_90'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"""
    assert _spills(log, "sm_80") == {}
    assert _spills(log, "sm_90") == {"_Z6kernelv": 48, "_Z5otherv": 0}


@needs_compiler
@needs_nvcc
def test_with_nvcc_it_installs_cuda_kernels_that_load_without_a_gpu(machine, build_wheel, new_venv, tmp_path):
    # The CPU kernels are the test above: left out here to spare the time. sm_80 has branches of its own.
    choice = {"DCNGEN_CUDA_ARCHITECTURES": "80,90", "DCNGEN_REQUIRE": "cuda", "DCNGEN_CPU": "OFF"}
    result = build_wheel(machine("compiler", "nvcc") | choice)
    wheel = _wheel(tmp_path, result)
    spills = _spills(result.stdout, "sm_90") | _spills(result.stdout, "sm_90a")
    for kernel in ("forward_window_kernel", "forward_gather_kernel", "forward_projected_kernel", "tile_kernel",
                   "sum_kernel", "far_kernel", "small_map", "medium_map", "forward_plain_kernel",
                   "linear_forward_kernel", "linear_backward_kernel"):  # fmt: skip
        assert any(kernel in name for name in spills), f"{kernel} is not in the build log"
    assert not {name: size for name, size in spills.items() if size}
    assert _libraries(wheel) == ["dcngen/lib/libdcngen_cuda.so"]
    new_venv.install(wheel)
    code = """
from dcngen.ops import native
library = native.cuda_library()
print(library.dcngen_cuda_architectures().decode())
params = native.DCNv4Params(batch=1, height_in=1, width_in=1, height_out=1, width_out=1, input_pixel_stride=1,
    offset_mask_pixel_stride=3, output_pixel_stride=1, offset_mask_channels=3, groups=1, group_channels=1, kernel_h=1,
    kernel_w=1, stride_h=1, stride_w=1, dilation_h=1, dilation_w=1, offset_scale=1.0)
import ctypes
if library.dcngen_cuda_device_count() <= 0:
    assert library.dcngen_cuda_dcnv4_forward(ctypes.addressof(params), None, None, None, 0, None) != 0
    print(library.dcngen_cuda_last_error().decode())
"""
    loaded = new_venv.run("-c", code, CUDA_VISIBLE_DEVICES="")
    architectures, message = loaded.stdout.splitlines()
    assert architectures == "80 90" and "dcnv4 forward" in message and "CUDA" in message, loaded.stderr


@pytest.mark.parametrize(
    "kinds,required,message",
    [
        ((), "cpu", "the cpu kernels are required.*no working C\\+\\+ compiler"),
        pytest.param(("compiler",), "cpu,cuda", "the cuda kernels are required", marks=needs_compiler),
        ((), "gpu", "expected cpu, cuda or cpu,cuda, got gpu"),
    ],
)
def test_a_required_library_that_cannot_be_built_is_an_error(kinds, required, message, machine, build_wheel):
    result = build_wheel(machine(*kinds) | {"DCNGEN_REQUIRE": required})
    assert result.returncode != 0
    assert re.search(message, " ".join(result.stdout.split())), result.stdout


@needs_compiler
def test_an_nvcc_that_does_not_work_is_left_out_with_its_message(machine, source, tmp_path):
    environment = machine("compiler")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in *list-gpu-arch*) echo compute_90;; *) echo "bad host" >&2; exit 1;; esac\n'
    )
    nvcc.chmod(0o755)
    configure = ["cmake", "-S", source / "kernels", "-B", tmp_path / "build", "-G", "Ninja", "-DDCNGEN_CPU=OFF"]
    result = subprocess.run(
        configure, env=environment | {"CUDACXX": str(nvcc)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "cuda kernels are left out" in result.stdout and "bad host" in result.stdout


@needs_compiler
@needs_nvcc
def test_the_default_architectures_are_those_that_nvcc_knows(machine, source, tmp_path):
    configure = ["cmake", "-S", source / "kernels", "-B", tmp_path / "build", "-G", "Ninja", "-DDCNGEN_CPU=OFF"]
    environment = machine("compiler", "nvcc")
    result = subprocess.run(configure, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    known = subprocess.run([environment["CUDACXX"], "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    expected = [a for a in ("80", "86", "89", "90", "100", "120") if f"compute_{a}" in known]
    assert f"compiled for {' '.join(expected)} {expected[-1]}+PTX\n" in result.stdout


@needs_compiler
def test_an_editable_install_finds_its_compiled_library(machine, source, new_venv):
    new_venv.install("-e", source, environment=machine("compiler"))
    called = new_venv.run("-W", "error", "-c", CALL.format(backend="native"))
    assert called.stdout.strip() == "right", called.stderr
    where = new_venv.run("-c", "import dcngen; print(dcngen.__file__)")
    assert where.stdout.strip() == str(source / "dcngen" / "__init__.py")


def test_the_source_archive_is_complete(source, tmp_path):
    import tarfile

    code = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.split()[-1]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    needed = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "train_ldm.py", "sample.py", "dcngen/ops/dcnv4.py")
    kernels = ("kernels/CMakeLists.txt", "kernels/cmake/compilers.cmake", "kernels/include/dcngen_kernels.h")
    assert not set(needed + kernels) - names
    assert any(n.startswith("kernels/cuda/") and n.endswith(".cu") for n in names)
    assert any(n.startswith("kernels/cpu/") and n.endswith(".cpp") for n in names)
