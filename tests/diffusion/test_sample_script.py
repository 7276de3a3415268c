"""sample.py from the command line, alone and shared by two processes; and how it opens models."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

import dcngen
from dcngen.diffusion.loading import load_model, load_run, parse_class_labels

ROOT = Path(dcngen.__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture
def run_folder(dcn_pipeline, tmp_path):
    dcn_pipeline.register_to_config(class_names=["sea", "coast", "land"])
    dcn_pipeline.save_pretrained(tmp_path / "runs" / "earth" / "pipeline")
    return tmp_path / "runs" / "earth"


@pytest.fixture
def sample_main():
    """sample.py's main; accelerate's idea of this process is put back afterwards."""
    spec = importlib.util.spec_from_file_location("sample_script", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = dict(PartialState._shared_state)
    yield module.main
    PartialState._shared_state.clear()
    PartialState._shared_state.update(before)


def test_one_process_and_two_draw_the_same_pictures(run_folder, sample_main, tmp_path, capsys):
    plan = "--num-images 9 --class-labels sea 2 --steps 3 --guidance-scale 1.4 --batch-size 2 --device cpu --npz"
    arguments = ["--run", str(run_folder), *plan.split(), "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(ROOT / "sample.py"), *arguments, str(tmp_path / "two")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr
    torch.set_num_threads(2)
    try:
        assert sample_main([*arguments, str(tmp_path / "one")]) == 0
    finally:
        torch.set_num_threads(1)
    for name in [*(f"{i:06d}.png" for i in range(9)), "grid.png"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_1"].tolist() == [0, 2] * 4 + [0]
    assert json.loads((tmp_path / "two" / "plan.json").read_text())["num_processes"] == 2
    line = "9 pictures, seeds 0 to 8, classes 0 2, dpm-solver++ 3 steps, guidance 1.4"
    assert capsys.readouterr().out.count(line) == output.stdout.count(line) == 1


def test_mistakes_are_told_in_a_line(run_folder, sample_main, tmp_path, capsys):
    model = ["--model", str(run_folder / "pipeline"), "--device", "cpu", "--out", str(tmp_path / "out")]
    for mistake, message in (
        (["--class-labels", "lend"], "did you mean 'land'?"),
        (["--class-labels", "7"], "0 to 2 for this model, got [7]"),
        (["--steps", "0"], "steps expected at least 1"),
        (["--sampler", "ddim", "--steps", "30"], "25 or 40"),
    ):
        assert sample_main([*model, *mistake]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png"))


def test_labels_by_id_and_name(pipeline):
    assert parse_class_labels(None, pipeline) is None
    assert parse_class_labels(["coast", "0", "land"], pipeline) == (1, 0, 2)
    with pytest.raises(ValueError, match="the model has sea, coast, land"):
        parse_class_labels(["zzz"], pipeline)


def test_what_cannot_be_opened(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="has earth"):
        load_run(run_folder.parent / "erth")
    with pytest.raises(FileNotFoundError, match="opened with --model"):
        load_run(run_folder / "pipeline")
    with pytest.raises(FileNotFoundError, match="use --run"):
        load_model(run_folder)
    with pytest.raises(FileNotFoundError, match="folder or a hub id"):
        load_model(tmp_path / "nothing")
    assert load_model(run_folder / "pipeline").config.class_names == load_run(run_folder).config.class_names
