"""Finding, loading and choosing the compiled libraries, with small libraries compiled here."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import dcngen.ops
from dcngen.ops import FallbackWarning, NativeLibraryError, backends, dcnv4, dcnv4_reference, native

HEADER = Path(__file__).resolve().parents[2] / "kernels" / "include" / "dcngen_kernels.h"
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
needs_header = pytest.mark.skipif(not HEADER.is_file(), reason="no source checkout")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test searches anew, and leaves the next one to search anew."""
    monkeypatch.setattr(backends, "_said", set())
    native.forget()
    yield
    native.forget()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that alone is searched."""
    monkeypatch.setattr(native, "search_path", lambda: [tmp_path])
    return tmp_path


def _compile(folder, code, kind="cpu"):
    source = folder / "library.cpp"
    source.write_text(code)
    subprocess.run(
        ["c++", "-shared", "-fPIC", f"-I{HEADER.parent}", source, "-o", folder / f"libdcngen_{kind}.so"], check=True
    )


def _stub(version="DCNGEN_ABI_VERSION", forward="return 0;"):
    return f"""
    #include "dcngen_kernels.h"
    extern "C" {{
    int dcngen_cpu_abi_version(void) {{ return {version}; }}
    const char* dcngen_cpu_last_error(void) {{ return "the reason"; }}
    const char* dcngen_cpu_isa(void) {{ return "stub"; }}
    int dcngen_cpu_dcnv4_forward(const dcngen_dcnv4_params* p, const void*, const void*, void* output, int) {{
      {forward}
    }}
    int dcngen_cpu_dcnv4_backward(const dcngen_dcnv4_params*, const void*, const void*, const void*, void*, void*,
                                  int) {{ return 1; }}
    }}"""


def _call(dtype=torch.float32):
    return dcnv4(torch.ones(1, 4, 4, 8, dtype=dtype), torch.ones(1, 4, 4, 56, dtype=dtype), groups=2)


def test_missing_library_names_the_folders_and_the_remedy(folder):
    with pytest.raises(NativeLibraryError) as caught:
        native.cpu_library()
    for part in ("libdcngen_cpu.so", str(folder), "C++ compiler", "DCNGEN_LIBRARY_DIR"):
        assert part in str(caught.value)


def test_missing_library_falls_back_and_says_so_once(folder):
    with pytest.warns(FallbackWarning, match="plain torch.*libdcngen_cpu.so"):
        output = _call()
    torch.testing.assert_close(output, dcnv4_reference(torch.ones(1, 4, 4, 8), torch.ones(1, 4, 4, 56), groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call()


def test_forced_native_raises_the_reason(folder):
    with dcngen.ops.backend("native"), pytest.raises(NativeLibraryError, match="were not found"):
        _call()
    with dcngen.ops.backend("native"), pytest.raises(TypeError, match="got float64"):
        _call(torch.float64)


def test_a_broken_file_is_kept_and_raised_whole_at_each_call(folder):
    (folder / "libdcngen_cpu.so").write_bytes(b"not a library")
    for _ in range(2):
        with dcngen.ops.backend("native"), pytest.raises(NativeLibraryError, match="cannot be used") as caught:
            _call()
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value.__cause__) in str(caught.value)
    assert "libdcngen_cpu.so" in next(s.error for s in native.status() if s.kind == "cpu")


@needs_compiler
@needs_header
def test_a_missing_symbol_is_named(folder):
    _compile(folder, 'extern "C" int dcngen_cpu_abi_version(void) { return 0; }')
    with pytest.raises(NativeLibraryError, match="undefined symbol: dcngen_cpu_last_error"):
        native.cpu_library()


@needs_compiler
@needs_header
def test_another_abi_is_refused(folder):
    _compile(folder, _stub(version="DCNGEN_ABI_VERSION + 1"))
    ours = native.ABI_VERSION
    with pytest.raises(NativeLibraryError, match=f"expected ABI version {ours}, got {ours + 1}"):
        native.cpu_library()


@needs_compiler
@needs_header
def test_a_failing_kernel_raises_its_message(folder):
    _compile(folder, _stub(forward="return 7;"))
    with pytest.raises(RuntimeError, match="the reason"):
        _call()


@needs_compiler
@needs_header
def test_the_kernel_receives_the_parameters(folder):
    """Every field of the C structure, through the C header's own eyes."""
    fields = [name for name, _ in native.DCNv4Params._fields_]
    writes = "\n".join(f"out[{i}] = (float)p->{name};" for i, name in enumerate(fields))
    _compile(folder, _stub(forward=f"float* out = (float*)output; {writes} return 0;"))
    wide = torch.zeros(2, 9, 8, 40)
    output = dcnv4(
        wide[..., 4:16],
        torch.zeros(2, 4, 3, 112)[..., :96],
        kernel_size=(5, 3),
        stride=(3, 2),
        padding=(3, 1),
        dilation=(1, 2),
        groups=2,
        offset_scale=0.75,
        softmax=True,
    )
    got = dict(zip(fields, output.flatten().tolist(), strict=False))
    assert got == dict(
        batch=2, height_in=9, width_in=8, height_out=4, width_out=3, input_pixel_stride=40,
        offset_mask_pixel_stride=112, output_pixel_stride=12, grad_input_pixel_stride=12,
        grad_offset_mask_pixel_stride=96, offset_mask_channels=96, groups=2, group_channels=6, kernel_h=5, kernel_w=3,
        stride_h=3, stride_w=2, pad_h=3, pad_w=1, dilation_h=1, dilation_w=2, offset_scale=0.75, remove_center=0,
        softmax=1, dtype=0, deterministic=0,
    )  # fmt: skip


@needs_header
def test_the_structure_mirrors_the_header():
    text = HEADER.read_text()
    body = re.search(r"typedef struct \{(.*?)\} dcngen_dcnv4_params;", text, re.DOTALL).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    declared = []
    for kind, names in re.findall(r"(int64_t|int32_t|float) ([^;]+);", body):
        declared += [(name.strip(), kind) for name in names.split(",")]
    kinds = {ctypes.c_int64: "int64_t", ctypes.c_int32: "int32_t", ctypes.c_float: "float"}
    assert declared == [(name, kinds[kind]) for name, kind in native.DCNv4Params._fields_]
    assert f"#define DCNGEN_ABI_VERSION {native.ABI_VERSION}\n" in text


@needs_header
def test_every_declared_function_is_in_the_header():
    declared = set(re.findall(r"(dcngen_(?:cpu|cuda)_\w+)\(", HEADER.read_text()))
    assert declared == {name for signatures in native._SIGNATURES.values() for name in signatures}


def test_library_dir_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DCNGEN_LIBRARY_DIR", str(tmp_path))
    assert native.search_path()[0] == tmp_path
    assert native.search_path()[1:] == [Path(p) / "lib" for p in dcngen.__path__]


def test_backend_switch():
    before = dcngen.ops.current_backend()
    with dcngen.ops.backend("reference"):
        assert dcngen.ops.current_backend() == "reference"
        with dcngen.ops.backend("auto"):
            assert dcngen.ops.current_backend() == "auto"
        assert dcngen.ops.current_backend() == "reference"
    assert dcngen.ops.current_backend() == before
    with (
        pytest.raises(ValueError, match="expected one of auto, native, reference, got 'fast'"),
        dcngen.ops.backend("fast"),
    ):
        pass


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_backend_variable():
    result = _run("import dcngen.ops; print(dcngen.ops.current_backend())", DCNGEN_BACKEND="reference")
    assert result.stdout.strip() == "reference", result.stderr
    result = _run("import dcngen.ops; dcngen.ops.current_backend()", DCNGEN_BACKEND="nonsense")
    assert "DCNGEN_BACKEND" in result.stderr and "ValueError" in result.stderr


def test_importing_the_package_imports_no_torch():
    result = _run("import dcngen, sys; print(dcngen.__version__, 'torch' in sys.modules)")
    assert result.stdout.split()[1:] == ["False"], result.stderr


def test_importing_the_operator_loads_no_library():
    result = _run(
        "import dcngen.ops; from dcngen.ops import native; print(native._loaded)", DCNGEN_LIBRARY_DIR="/nowhere"
    )
    assert result.stdout.strip() == "{}", result.stderr


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
def test_info_says_what_is_missing_and_why():
    result = _run("import dcngen.info; dcngen.info.main([])", DCNGEN_LIBRARY_DIR="/nowhere", DCNGEN_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    for part in (
        "version",
        "backend",
        "cpu kernels",
        "cuda kernels",
        "torch",
        "diffusers",
        "DCNGEN_LIBRARY_DIR  /nowhere",
    ):
        assert part in result.stdout
