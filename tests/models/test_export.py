"""The model as one file: it runs where dcngen is not installed and gives what the package gives."""

import ast
import subprocess
import sys
import types

import pytest
import torch

from dcngen.models import export

RUN_WITHOUT_DCNGEN = """
import importlib.abc, sys

class NoDcngen(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dcngen":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoDcngen())
folder = sys.argv[1]
sys.path.insert(0, folder)
import torch
from modeling_dcn_unet import DCNUNet2DModel, ModelMixin, dcnv4, dcnv4_reference
assert dcnv4 is dcnv4_reference and issubclass(DCNUNet2DModel, ModelMixin)
model = DCNUNet2DModel.from_pretrained(folder)
batch = torch.load(folder + "/batch.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(*batch).sample, folder + "/output.pt")
assert not any(name.split(".")[0] == "dcngen" for name in sys.modules)
"""


def test_runs_without_dcngen_and_agrees(tmp_path, make_unet, make_batch, randomize):
    model = randomize(make_unet(conv_operator=["dcnv4", "conv", "dcnv4"], resample_operator="dcnv4")).eval()
    model.save_pretrained(tmp_path)
    batch = make_batch()
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / f"{export.MODULE_NAME}.py").write_text(export.self_contained_model_source())
    command = [sys.executable, "-I", "-c", RUN_WITHOUT_DCNGEN, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(*batch).sample
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, rtol=1e-4, atol=1e-5)


def test_source_imports_dcngen_only_as_an_option():
    source = export.self_contained_model_source()
    tree = ast.parse(source)
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    packages = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in top}
    assert packages <= {"torch", "diffusers"} | set(sys.stdlib_module_names)
    assert source.count("from dcngen") == 1 and source == export.self_contained_model_source()


def test_clashing_names_are_refused(monkeypatch):
    clash = types.ModuleType("clash")
    texts = {clash: "def group_channels_for():\n    pass\n"}
    real = export.inspect.getsource
    monkeypatch.setattr(export.inspect, "getsource", lambda module: texts.get(module) or real(module))
    monkeypatch.setattr(export, "PARTS", (*export.PARTS, clash))
    with pytest.raises(ValueError, match="group_channels_for: defined by"):
        export.self_contained_model_source()


def test_imports_that_one_file_cannot_hold_are_refused(monkeypatch):
    aliased = types.ModuleType("aliased")
    texts = {aliased: "import dcngen.ops.geometry\n"}
    real = export.inspect.getsource
    monkeypatch.setattr(export.inspect, "getsource", lambda module: texts.get(module) or real(module))
    monkeypatch.setattr(export, "PARTS", (*export.PARTS, aliased))
    with pytest.raises(ValueError, match="expected `from dcngen"):
        export.self_contained_model_source()
