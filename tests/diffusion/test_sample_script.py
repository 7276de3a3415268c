"""sample.py from the command line, alone and shared by two processes; and how it opens models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dcngen
from dcngen.diffusion.loading import load_model, load_run, parse_class_labels

ROOT = Path(dcngen.__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "0"]  # fmt: skip


@pytest.fixture
def run_folder(dcn_pipeline, tmp_path):
    dcn_pipeline.register_to_config(class_names=["sea", "coast", "land"])
    dcn_pipeline.save_pretrained(tmp_path / "runs" / "earth" / "pipeline")
    return tmp_path / "runs" / "earth"


def start(command, threads):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_process_and_two_draw_the_same_pictures(run_folder, tmp_path):
    arguments = [str(ROOT / "sample.py"), "--run", str(run_folder), "--num-images", "9", "--class-labels", "sea", "2",
                 "--steps", "3", "--guidance-scale", "1.4", "--batch-size", "2", "--device", "cpu", "--npz", "--out"]  # fmt: skip
    started = {
        "one": start([sys.executable, *arguments, str(tmp_path / "one")], threads=2),
        "two": start([*LAUNCH, *arguments, str(tmp_path / "two")], threads=1),
        "bad": start([sys.executable, *arguments, str(tmp_path / "bad"), "--class-labels", "lend"], threads=1),
    }
    outputs = {name: process.communicate(timeout=300)[0] for name, process in started.items()}
    assert started["one"].returncode == started["two"].returncode == 0, outputs["one"] + outputs["two"]
    names = [f"{i:06d}.png" for i in range(9)]
    for name in [*names, "grid.png"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_1"].tolist() == [0, 2] * 4 + [0]
    assert json.loads((tmp_path / "two" / "plan.json").read_text())["num_processes"] == 2
    assert outputs["two"].count("9 pictures, seeds 0 to 8, classes 0 2, dpm-solver++ 3 steps, guidance 1.4") == 1
    assert started["bad"].returncode == 1 and "did you mean 'land'?" in outputs["bad"]
    assert "Traceback" not in outputs["bad"] and not (tmp_path / "bad").exists()


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
