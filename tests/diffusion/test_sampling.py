"""Sampling to a folder: resumable, never mixed, and independent of batches, threads and processes."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import TqdmWarning

from dcngen.diffusion import (
    LatentDiffusionPipeline,
    Objective,
    SamplePlan,
    image_grid,
    make_scheduler,
    sample_images,
    to_uint8,
)
from dcngen.diffusion.images import png_path, read_png, write_npz

PLAN = SamplePlan(num_images=7, seed=5, sampler="euler", steps=3, guidance_scale=2.0)


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.fixture
def sampled(pipeline, tmp_path):
    return sample_images(pipeline, PLAN, tmp_path / "a", batch_size=4, save_npz=True, progress=False)


@pytest.mark.parametrize("sampler, steps", [("euler", 9), ("heun", 5), ("euler", 1)])
def test_the_progress_bar_ends_at_the_total(pipeline, tmp_path, capsys, recwarn, sampler, steps):
    """9 evaluations: sums of ninths of four pictures are more than eight, of which tqdm warns."""
    plan = replace(PLAN, num_images=8, sampler=sampler, steps=steps)
    sample_images(pipeline, plan, tmp_path / "a", batch_size=4, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100% |" in last and "| 8/8 [" in last and "image/s]" in last
    assert not [warning for warning in recwarn if warning.category is TqdmWarning]


def test_writes_what_the_pipeline_draws(pipeline, sampled):
    assert sorted(path.name for path in sampled.iterdir()) == [
        *(f"{i:06d}.png" for i in range(7)), "grid.png", "plan.json", "samples.npz",
    ]  # fmt: skip
    with np.load(sampled / "samples.npz") as archive:
        assert archive["arr_0"].shape == (7, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        for i, pixels in enumerate(archive["arr_0"]):
            assert np.array_equal(pixels, np.array(Image.open(sampled / f"{i:06d}.png")))
    pipeline.scheduler = make_scheduler("euler", pipeline.scheduler)
    alone = pipeline(class_labels=1, seeds=[9], num_inference_steps=3, guidance_scale=2.0, output_type="pt").images[0]
    difference = to_uint8(alone * 2 - 1).int() - read_png(png_path(sampled, 4)).int()
    assert difference.abs().max() <= 1


def test_record_says_whose_pictures_these_are(sampled):
    record = json.loads((sampled / "plan.json").read_text())
    assert record["complete"] and record["num_drawn"] == 7
    assert SamplePlan.from_dict(record["plan"]) == PLAN and record["plan_digest"] == PLAN.digest()
    assert record["model_evaluations_per_image"] == 6


def test_draws_only_what_is_missing(pipeline, sampled):
    before = pictures(sampled)
    times = {path.name: path.stat().st_mtime_ns for path in sampled.iterdir()}
    (sampled / "000005.png").unlink()
    (sampled / "grid.png").unlink()
    sample_images(pipeline, PLAN, sampled, batch_size=4, progress=False)
    assert pictures(sampled) == before
    assert json.loads((sampled / "plan.json").read_text())["num_drawn"] == 3  # its batch: pictures 4, 5, 6
    assert all((sampled / name).stat().st_mtime_ns == times[name] for name in ("000000.png", "000003.png"))
    assert (sampled / "grid.png").is_file()
    record = (sampled / "plan.json").read_bytes()
    sample_images(pipeline, PLAN, sampled, batch_size=4, progress=False)
    assert (sampled / "plan.json").read_bytes() == record


def test_an_interrupted_call_is_finished_by_the_next(pipeline, tmp_path, monkeypatch, sampled):
    import dcngen.diffusion.folder as folder_module

    def fail_at_five(path, image, write=folder_module.write_png):
        if path.name == "000005.png":
            raise OSError("disk full")
        write(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_png", fail_at_five)
        with pytest.raises(OSError, match="disk full"):
            sample_images(pipeline, PLAN, tmp_path / "b", batch_size=4, progress=False)
    assert not json.loads((tmp_path / "b" / "plan.json").read_text())["complete"]
    assert not (tmp_path / "b" / "grid.png").exists()
    sample_images(pipeline, PLAN, tmp_path / "b", batch_size=4, progress=False)
    assert pictures(tmp_path / "b") == pictures(sampled)


def test_never_mixes(pipeline, sampled, tmp_path, vae):
    with pytest.raises(ValueError, match="steps 3, now 4"):
        sample_images(pipeline, replace(PLAN, steps=4), sampled, progress=False)
    torch.manual_seed(9)
    other = type(pipeline.unet)(**pipeline.unet.config).eval()
    with pytest.raises(ValueError, match="another model"):
        sample_images(LatentDiffusionPipeline(other, vae, pipeline.scheduler), PLAN, sampled, progress=False)
    with pytest.raises(ValueError, match="another model"):
        linear = Objective(beta_schedule="linear").scheduler_config()
        sample_images(LatentDiffusionPipeline(pipeline.unet, vae, linear), PLAN, sampled, progress=False)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "holiday.png")
    with pytest.raises(ValueError, match="unknown origin"):
        sample_images(pipeline, PLAN, tmp_path / "photos", progress=False)
    with pytest.raises(ValueError, match="got a file"):
        sample_images(pipeline, PLAN, tmp_path / "photos" / "holiday.png", progress=False)
    with pytest.raises(ValueError, match="got neither"):
        sample_images(pipeline, PLAN, tmp_path / "c", save_png=False)
    with pytest.raises(ValueError, match="batch_size"):
        sample_images(pipeline, PLAN, tmp_path / "c", batch_size=0)
    assert not (tmp_path / "c").exists()


def test_npz_alone(pipeline, sampled, tmp_path):
    folder = tmp_path / "npz"
    for _ in range(2):  # the second call finds everything done
        sample_images(pipeline, PLAN, folder, batch_size=4, save_png=False, save_npz=True, progress=False)
        assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "plan.json", "samples.npz"]
    with np.load(folder / "samples.npz") as one, np.load(sampled / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"]) and np.array_equal(one["arr_1"], other["arr_1"])
    assert (folder / "grid.png").read_bytes() == (sampled / "grid.png").read_bytes()


def test_batch_size_moves_no_grey_level_by_more_than_one(pipeline, sampled, tmp_path):
    other = sample_images(pipeline, PLAN, tmp_path / "b", batch_size=3, progress=False)
    for i in range(7):
        difference = read_png(png_path(sampled, i)).int() - read_png(png_path(other, i)).int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01


def test_number_of_threads_changes_nothing(pipeline, sampled, tmp_path):
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            folder = sample_images(pipeline, PLAN, tmp_path / str(number), batch_size=4, progress=False)
            assert torch.get_num_threads() == number
            assert pictures(folder) == pictures(sampled)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [2, 3])
def test_shares_make_up_the_whole(pipeline, sampled, tmp_path, world):
    """Threads stand for processes here; real ones are started in test_sample_script.py."""
    barrier = Barrier(world, timeout=60)
    shares = [
        SimpleNamespace(process_index=rank, num_processes=world, wait_for_everyone=barrier.wait)
        for rank in range(world)
    ]
    with ThreadPoolExecutor(world) as pool:
        run = partial(sample_images, pipeline, PLAN, tmp_path / "b", batch_size=4, progress=False)
        folders = list(pool.map(lambda share: run(accelerator=share), shares))
    assert set(folders) == {tmp_path / "b"}
    assert pictures(tmp_path / "b") == pictures(sampled)
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["num_drawn"] == 7


def test_two_commands_at_once_draw_the_pictures_once(pipeline, sampled, tmp_path, monkeypatch, capsys):
    import dcngen.diffusion.folder as folder_module

    written, both = [], Barrier(2, timeout=60)

    def write_slowly(*arguments, write=folder_module.write_npz):
        written.append(arguments[0])
        time.sleep(0.5)  # long enough for the other one to get as far, were it not waiting
        write(*arguments)

    def sample(_):
        both.wait()
        return sample_images(pipeline, PLAN, tmp_path / "b", batch_size=4, save_png=False, save_npz=True)

    monkeypatch.setattr(folder_module, "write_npz", write_slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(sample, range(2))) == [tmp_path / "b"] * 2
    assert len(written) == 1 and "another command samples into" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["grid.png", "plan.json", "samples.npz"]
    with np.load(tmp_path / "b" / "samples.npz") as one, np.load(sampled / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])


def test_dropout_is_off_while_sampling(pipeline, sampled, tmp_path, vae):
    unet = type(pipeline.unet)(**{**pipeline.unet.config, "dropout": 0.5})
    unet.load_state_dict(pipeline.unet.state_dict())
    assert unet.train().training
    training = LatentDiffusionPipeline(unet, vae, pipeline.scheduler)
    folder = sample_images(training, PLAN, tmp_path / "b", batch_size=4, progress=False)
    assert pictures(folder) == pictures(sampled) and unet.training


def test_mixed_precision_runs_the_unet_in_bf16(pipeline, sampled, tmp_path):
    folder = sample_images(
        pipeline, replace(PLAN, mixed_precision="bf16"), tmp_path / "b", batch_size=4, progress=False
    )
    differences = [
        (read_png(png_path(folder, i)).int() - read_png(png_path(sampled, i)).int()).abs().float().mean()
        for i in range(7)
    ]
    assert 0 < max(differences) < 5


def test_image_grid():
    images = torch.zeros(5, 3, 2, 4, dtype=torch.uint8)
    images[4] = 7
    grid = np.array(image_grid(images, padding=1))
    assert grid.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    assert (grid[4:6, 6:10] == 7).all() and (grid[1:3, 1:5] == 0).all()
    assert (grid[4:6, 11:15] == 255).all() and (grid[0] == 255).all()
    for wrong in (images.float(), [], [images[0], images[0, :, :1]]):
        with pytest.raises(ValueError, match="uint8 images"):
            image_grid(wrong)


def test_npz_without_labels_and_unreadable_pictures(tmp_path):
    write_npz(tmp_path / "x.npz", iter(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)), 2, None)
    with np.load(tmp_path / "x.npz") as archive:
        assert archive.files == ["arr_0"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    (tmp_path / "x.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="delete it"):
        read_png(tmp_path / "x.png")
