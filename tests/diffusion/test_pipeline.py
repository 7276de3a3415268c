"""LatentDiffusionPipeline: what a picture depends on, guidance, decoding, saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import dcngen
from dcngen.diffusion import LatentDiffusionPipeline, Objective, make_scheduler, scale_latents, seeded_noise, to_uint8
from dcngen.diffusion import unscale_latents as unscale

ROOT = Path(dcngen.__file__).parents[1]


def latents_of(pipeline, labels, seeds, **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "latent"} | arguments
    return pipeline(class_labels=labels, seeds=seeds, **arguments).images


def test_a_picture_depends_on_its_seed_and_label_alone(pipeline):
    together = latents_of(pipeline, [0, 1, 2], [7, 8, 9], guidance_scale=2.0)
    torch.rand(5)
    for i in (2, 0, 1):
        alone = latents_of(pipeline, [i], [7 + i], guidance_scale=2.0)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents_of(pipeline, [1], [7]), latents_of(pipeline, [0], [7]), atol=1e-4)
    assert not torch.allclose(latents_of(pipeline, [0], [8]), latents_of(pipeline, [0], [7]), atol=1e-2)


def test_guidance_is_the_usual_convention_in_one_batched_call(pipeline, monkeypatch):
    sample, labels, timestep = torch.randn(2, 4, 4, 4), torch.tensor([0, 2]), torch.tensor(500)
    with torch.no_grad():
        cond = pipeline.unet(sample, timestep, class_labels=labels).sample
        uncond = pipeline.unet(sample, timestep, class_labels=torch.tensor([3, 3])).sample
        assert not torch.allclose(cond, uncond, atol=1e-3)
        batches = []
        forward = pipeline.unet.forward
        monkeypatch.setattr(pipeline.unet, "forward", lambda *a, **k: batches.append(len(a[0])) or forward(*a, **k))
        for scale, expected in ((1.0, cond), (0.0, uncond), (3.0, uncond + 3 * (cond - uncond))):
            torch.testing.assert_close(
                pipeline._predict(sample, timestep, labels, scale), expected, rtol=1e-4, atol=1e-5
            )
    assert batches == [2, 4, 4]


def test_no_label_is_the_null_class(pipeline):
    assert torch.equal(latents_of(pipeline, None, [3]), latents_of(pipeline, [3], [3]))


def test_sources_of_noise_agree(pipeline):
    seeds = [11, 12]
    expected = latents_of(pipeline, [0, 1], seeds)
    run = {"num_inference_steps": 4, "output_type": "latent"}
    noise = seeded_noise(pipeline.latent_shape, seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(pipeline([0, 1], latents=noise, **run).images, expected)
    assert torch.equal(pipeline([0, 1], generator=generators, **run).images, expected)
    one = [pipeline([0, 1], generator=torch.Generator().manual_seed(0), **run).images for _ in range(2)]
    assert torch.equal(*one) and not torch.equal(one[0][0], one[0][1])
    torch.manual_seed(3)
    first = pipeline(0, num_images_per_label=2, return_dict=False, **run)[0]
    assert first.shape == (2, 4, 4, 4)
    assert not torch.equal(first, pipeline(0, num_images_per_label=2, **run).images)


def test_the_call_leaves_the_registered_scheduler_alone(pipeline):
    before = {key: str(value) for key, value in vars(pipeline.scheduler).items()}
    first = latents_of(pipeline, [0], [0])
    assert {key: str(value) for key, value in vars(pipeline.scheduler).items()} == before
    assert torch.equal(latents_of(pipeline, [0], [0]), first)


def test_callback_sees_every_step_and_may_replace_the_latents(pipeline):
    seen = []

    def watch(_pipeline, step, timestep, state):
        seen.append((step, int(timestep), state["latents"].shape))
        return {}

    latents_of(pipeline, [0], [0], callback_on_step_end=watch)
    assert seen == [(i, t, (1, 4, 4, 4)) for i, t in enumerate([999, 749, 499, 249])]
    replaced = latents_of(pipeline, [0], [0], callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 4, 4)})
    assert torch.equal(replaced, torch.zeros(1, 4, 4, 4))


def test_output_types_show_one_picture(pipeline):
    def draw(output_type):
        return latents_of(pipeline, [0, 1], [0, 1], output_type=output_type)

    images = pipeline.decode(draw("latent"))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    expected = to_uint8(images)
    assert torch.equal(draw("uint8"), expected)
    for i, picture in enumerate(draw("pil")):
        assert np.array_equal(np.array(picture), expected[i].permute(1, 2, 0).numpy())
    unit = (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw("pt"), unit)
    np.testing.assert_allclose(draw("np"), unit.permute(0, 2, 3, 1).numpy(), rtol=1e-5, atol=1e-6)


def test_rounding_rule():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)  # what goes in comes out
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]  # 127.5 to even


def test_decoding_undoes_scale_and_shift_in_fp32_by_slices(pipeline, vae):
    raw = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    scaled = scale_latents(raw, vae)
    torch.testing.assert_close(scaled, (raw - 0.25) * 0.5)
    torch.testing.assert_close(unscale(scaled, vae), raw)
    with torch.no_grad():
        expected = vae.decode(raw).sample
    torch.testing.assert_close(pipeline.decode(scaled, batch_size=2), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pipeline.decode(scaled, batch_size=8), expected, rtol=1e-4, atol=1e-5)


def test_a_half_precision_pipeline_solves_and_decodes_in_fp32(pipeline, tmp_path):
    expected = latents_of(pipeline, [0], [0])
    pipeline.save_pretrained(tmp_path)
    half = LatentDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.unet.dtype == half.vae.dtype == torch.bfloat16
    latents = latents_of(half, [0], [0])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0.1, atol=0.1)
    assert half.decode(latents).dtype == torch.float32 and half.vae.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(class_labels=[4]), "0 to 2, or 3 for no class"),
        (dict(class_labels=[-1]), "0 to 2"),
        (dict(class_labels=[0.5]), "integer"),
        (dict(class_labels=[0, 1], seeds=[0]), "seeds expected 2"),
        (dict(class_labels=[]), "one integer or a list"),
        (dict(seeds=[]), "at least one"),
        (dict(class_labels=[0], seeds=[0], latents=torch.zeros(1, 4, 4, 4)), "seeds and latents"),
        (dict(class_labels=[0], latents=torch.zeros(1, 4, 8, 8)), r"shape \(1, 4, 4, 4\)"),
        (dict(class_labels=[0], seeds=[2**32]), r"2\*\*32"),
        (dict(guidance_scale=2.0), "pass class_labels"),
        (dict(class_labels=[0], output_type="jpg"), "pil, np, pt, uint8, latent"),
        (dict(class_labels=[0], num_inference_steps=30), "25 or 40"),
    ],
)
def test_refuses(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_parts_must_fit(unet, vae):
    scheduler = Objective().scheduler_config()
    with pytest.raises(ValueError, match="expected 3 names"):
        LatentDiffusionPipeline(unet, vae, scheduler, class_names=["sea"])
    narrow = type(unet)(**{**unet.config, "in_channels": 3, "out_channels": 3})
    with pytest.raises(ValueError, match="3, 3 and 4"):
        LatentDiffusionPipeline(narrow, vae, scheduler)


def test_unconditional_models(gaussian_pipeline):
    pipeline = gaussian_pipeline(Objective())
    assert pipeline.num_classes == 0 and pipeline.null_class is None
    assert pipeline(seeds=[0, 1], num_inference_steps=2, output_type="latent").images.shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="without classes"):
        pipeline(class_labels=[0])


@pytest.mark.parametrize(
    "objective",
    [Objective(prediction_type="v_prediction", beta_start=0.001), Objective(prediction_type="flow", flow_shift=2.0)],
    ids=["v", "flow"],
)
def test_round_trip(pipeline, objective, tmp_path):
    pipeline = LatentDiffusionPipeline(
        pipeline.unet, pipeline.vae, objective.scheduler_config(), ["sea", "coast", "land"]
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.class_names == ["sea", "coast", "land"]
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    for sampler in ("euler", "dpm-solver++"):
        assert make_scheduler(sampler, loaded.scheduler).config == make_scheduler(sampler, pipeline.scheduler).config
    assert torch.equal(latents_of(loaded, [0, 1], [0, 1]), latents_of(pipeline, [0, 1], [0, 1]))
    assert not list(tmp_path.rglob("*.bin"))


def test_dcn_pipeline_opens_in_a_fresh_process(dcn_pipeline, tmp_path):
    """Nothing but the pipeline's class is imported there; diffusers alone would refuse the U-Net's module."""
    dcn_pipeline.save_pretrained(tmp_path)
    script = """if True:
        import sys
        from dcngen.diffusion import LatentDiffusionPipeline
        assert "dcngen.models" not in sys.modules
        pipeline = LatentDiffusionPipeline.from_pretrained(sys.argv[1])
        import numpy
        latents = pipeline([0, 1], seeds=[0, 1], num_inference_steps=4, output_type="latent").images
        numpy.save(sys.argv[2], latents)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(tmp_path / "x.npy")], check=True, env=environment)
    expected = latents_of(dcn_pipeline, [0, 1], [0, 1])
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "x.npy")), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_that_names_the_wrong_unet_class_is_refused(dcn_pipeline, tmp_path):
    dcn_pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["dcngen.models.unet", "DCNUNet2DModel"]
    index["unet"] = ["diffusers", "UNet2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="saved by DCNUNet2DModel"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_is_a_diffusion_pipeline(pipeline):
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"unet", "vae", "scheduler"}
