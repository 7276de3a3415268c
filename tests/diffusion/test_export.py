"""The self-contained export, opened by a stranger: a process that cannot import dcngen."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dcngen.diffusion import LatentDiffusionPipeline, Objective, export_self_contained
from dcngen.diffusion.export import main
from dcngen.diffusion.loading import load_model

STRANGER = """if True:
    import sys
    sys.modules["dcngen"] = None  # as if it were not installed
    import numpy, torch
    from diffusers import DiffusionPipeline
    for folder in sys.argv[1:]:
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        run = dict(class_labels=[0, 2], seeds=[3, 4], guidance_scale=1.5, num_inference_steps=4)
        numpy.save(folder + ".npy", pipeline(**run, output_type="latent").images)
        assert pipeline(**run).images[0].size == (8, 8)
"""


def latents_of(pipeline):
    run = dict(class_labels=[0, 2], seeds=[3, 4], guidance_scale=1.5, num_inference_steps=4)
    return pipeline(**run, output_type="latent").images


def test_a_stranger_draws_the_same_latents(pipeline, dcn_pipeline, tmp_path):
    flow = Objective(prediction_type="flow").scheduler_config()
    stock = LatentDiffusionPipeline(pipeline.unet, pipeline.vae, flow, class_names=["sea", "coast", "land"])
    exported = {"dcn": dcn_pipeline, "stock": stock}
    for name, source in exported.items():
        assert export_self_contained(source, tmp_path / name) == tmp_path / name
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STRANGER, *(str(tmp_path / name) for name in exported)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, source in exported.items():
        latents = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
        torch.testing.assert_close(latents, latents_of(source), rtol=1e-3, atol=1e-4)


def test_the_folder_names_its_code(dcn_pipeline, pipeline, tmp_path):
    export_self_contained(dcn_pipeline, tmp_path / "dcn")
    index = json.loads((tmp_path / "dcn" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatentDiffusionPipeline"]
    assert index["unet"] == ["modeling_dcn_unet", "DCNUNet2DModel"]
    assert (tmp_path / "dcn" / "pipeline.py").is_file() and (tmp_path / "dcn/unet/modeling_dcn_unet.py").is_file()
    export_self_contained(pipeline, tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert "0 sea, 1 coast, 2 land" in (tmp_path / "stock" / "README.md").read_text()


def test_we_open_an_export_without_running_its_code(dcn_pipeline, tmp_path):
    dcn_pipeline.save_pretrained(tmp_path / "saved")
    folder = export_self_contained(LatentDiffusionPipeline.from_pretrained(tmp_path / "saved"), tmp_path / "x")
    assert not any("_name_or_path" in path.read_text() for path in folder.rglob("*.json"))
    for code in folder.rglob("*.py"):
        code.write_text("raise RuntimeError('ran')")
    loaded = load_model(folder)
    assert type(loaded.unet) is type(dcn_pipeline.unet)
    assert torch.equal(latents_of(loaded), latents_of(dcn_pipeline))


def test_the_command_exports_a_run_and_refuses_a_second_time(dcn_pipeline, tmp_path, capsys):
    dcn_pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="choose another folder"):
        main(arguments)


def test_foreign_unets_are_refused_and_leave_nothing(gaussian_pipeline, tmp_path):
    with pytest.raises(TypeError, match="GaussianModel"):
        export_self_contained(gaussian_pipeline(Objective()), tmp_path / "x")
    assert not list(tmp_path.iterdir())
