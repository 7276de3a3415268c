"""The compare command from run folders to the report, with tiny untrained models and a feature network of six."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from dcngen.diffusion import LatentDiffusionPipeline, Objective
from dcngen.evaluation import cli
from dcngen.models import DCNUNet2DModel

UNET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "num_class_embeds": 3,
    "conv_operator": "conv",
    "attention_operator": "attention",
}


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DCNGEN_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 24)):
        for index in range(count):
            folder = tmp_path / "data" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        pipeline = LatentDiffusionPipeline(DCNUNet2DModel(**UNET), vae, Objective().scheduler_config())
        pipeline.save_pretrained(tmp_path / name / "pipeline")
        config = {
            "name": name,
            "seed": seed,
            "data": {"name": str(tmp_path / "data"), "image_size": 8},
            "objective": {},
        }
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    return [str(tmp_path / "first"), str(tmp_path / "second")]


def test_compare_samples_scores_reports_and_reuses(two_runs, tmp_path, monkeypatch, capsys, colour_network):
    network = colour_network()
    monkeypatch.setattr(cli, "load_network", lambda _: network)
    page = tmp_path / "out" / "report.html"
    arguments = [*two_runs, "--num-images", "24", "--steps", "2", "--device", "cpu", "--quiet", "--out", str(page)]
    assert cli.main(arguments) == 0
    assert str(page) in capsys.readouterr().out and page.is_file()
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [arm["name"] for arm in numbers["arms"]] == ["first", "second"]
    assert numbers["arms"][1]["verdict"]["outcome"] in ("better", "worse", "inconclusive")
    assert numbers["differences"] == {"seed": [0, 1]}
    assert numbers["reference"]["num_images"] == 24 and numbers["reference"]["split"] == "held-out"
    assert set(numbers["floors"]) == {"train", "reconstruction"}
    assert all(arm["flops"] > 0 and arm["num_parameters"] > 0 for arm in numbers["arms"])

    batches = len(network.batches)
    assert cli.main(arguments) == 0
    assert len(network.batches) == batches
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["arms"] == numbers["arms"]


def test_training_seeds_of_a_recipe_are_judged_together(two_runs, tmp_path, monkeypatch, capsys, colour_network):
    monkeypatch.setattr(cli, "load_network", lambda _: colour_network())
    third = tmp_path / "third"
    shutil.copytree(two_runs[0], third)
    config = yaml.safe_load((third / "config.yaml").read_text()) | {"name": "third", "train": {"max_train_steps": 7}}
    (third / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = [*two_runs, str(third), "--num-images", "20", "--steps", "1", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--out", str(tmp_path / "r.html")]) == 0
    assert "against first, 2 training seeds" in capsys.readouterr().out
    repeats = json.loads((tmp_path / "compare.json").read_text())["repeats"]
    assert [group["runs"] for group in repeats] == [["first", "second"], ["third"]]
    assert repeats[0]["verdict"] is None and repeats[1]["verdict"]["outcome"] in ("better", "worse", "inconclusive")


def test_a_run_against_itself_is_inconclusive(two_runs, tmp_path, monkeypatch, capsys, colour_network):
    monkeypatch.setattr(cli, "load_network", lambda _: colour_network())
    arguments = [two_runs[0], two_runs[0], "--num-images", "20", "--steps", "1", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--floors", "--out", str(tmp_path / "r.html")]) == 0
    assert "INCONCLUSIVE" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["floors"] == {}


def test_compare_in_dinov2_features_speaks_of_fd_dinov2_alone(two_runs, dinov2_folder, tmp_path, capsys):
    arguments = [*two_runs, "--num-images", "20", "--steps", "1", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--features", "dinov2", "--dinov2-weights", str(dinov2_folder)]) == 0
    table = capsys.readouterr().out
    folder = tmp_path / "compare-first-second-dinov2"  # beside the report of FID, not over it
    page, numbers = (folder / "report.html").read_text(), json.loads((folder / "compare.json").read_text())
    page = re.sub(r"base64,[^\"]*", "", page)
    for text in (table, page):
        assert "FD-DINOv2" in text and "autoencoder alone (rFD-DINOv2)" in text and "KD-DINOv2" in text
        text = text.replace("with another seed moves FID", "")  # the verdict says where its 1.3 % comes from
        assert "FID" not in text and "KID" not in text and "Inception" not in text
    assert numbers["feature_network"]["name"] == "DINOv2"
    assert numbers["arms"][1]["scores"]["fd_dinov2"] > 0 and "fd_dinov2_difference" in numbers["arms"][1]["verdict"]
