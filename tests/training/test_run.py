"""Whole runs of the tiny recipe through train_ldm.py: six steps, a checkpoint after the fourth."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from dcngen.diffusion import LatentDiffusionPipeline
from dcngen.training import Interrupted, find_run, loop
from dcngen.training.checkpoint import list_checkpoints
from dcngen.training.logs import read_metrics

FILES = ("unet/diffusion_pytorch_model", "unet_ema/diffusion_pytorch_model", "optimizer")


def weights(run, step):
    """Every tensor of a checkpoint: weights, average, optimizer."""
    folder = run.checkpoints / f"step-{step:08d}"
    return {(name, key): t for name in FILES for key, t in load_file(folder / f"{name}.safetensors").items()}


def assert_identical(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture(scope="module")
def uninterrupted(script, command_in, tmp_path_factory):
    """One complete run, shared by the tests that only look at it."""
    return script.train(command_in(tmp_path_factory.mktemp("runs"), "--name", "whole"))


def test_the_run_folder_holds_what_it_should(uninterrupted):
    record = json.loads((uninterrupted.path / "run.json").read_text())
    assert record["status"] == "finished" and record["step"] == 6 and record["num_images_seen"] == 48
    assert record["data"]["class_names"] == ["horizontal", "vertical"] and record["data"]["num_images"] == 40
    assert record["train_seconds"] > 0 and record["images_per_second"] > 0
    entries = read_metrics(uninterrupted.metrics)
    assert [entry["step"] for entry in entries] == [3, 6] and entries[-1]["num_images_seen"] == 48
    assert entries[-1]["loss"] == pytest.approx(entries[-1]["loss"]) and entries[-1]["loss"] > 0
    assert (uninterrupted.samples / "step-00000006.png").is_file()
    assert [path.name for path in sorted(uninterrupted.checkpoints.iterdir())] == ["step-00000004", "step-00000006"]


def test_the_pipeline_holds_the_average_and_the_latent_statistics(uninterrupted):
    pipeline = LatentDiffusionPipeline.from_pretrained(uninterrupted.pipeline)
    ema = load_file(uninterrupted.checkpoints / "step-00000006" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline.config.class_names == ["horizontal", "vertical"] and pipeline.null_class == 2
    assert pipeline.vae.config.scaling_factor != 1.0 and pipeline.vae.config.shift_factor is not None
    assert pipeline([0, 1], seeds=[0, 1], num_inference_steps=2, output_type="uint8").images.shape == (2, 3, 16, 16)


def test_resuming_equals_not_stopping_bit_for_bit(uninterrupted, script, command, monkeypatch):
    """Cut off in step 6, it continues from the checkpoint of step 4, in the middle of a logging window."""
    original = loop.Trainer._step

    def crash_at_5(self, step):
        if step == 5:
            raise RuntimeError("power cut")
        original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", crash_at_5)
        with pytest.raises(RuntimeError, match="power cut"):
            script.train(command("--name", "cut"))
    resumed = script.train(command("--name", "cut", "--resume"))
    assert resumed.checkpoint.name == "step-00000004"
    assert_identical(weights(resumed, 4), weights(uninterrupted, 4))
    assert_identical(weights(resumed, 6), weights(uninterrupted, 6))
    entries = read_metrics(resumed.metrics)
    assert [entry["step"] for entry in entries] == [3, 6]
    assert entries[0]["loss"] == read_metrics(uninterrupted.metrics)[0]["loss"]


def test_ctrl_c_saves_a_checkpoint_that_continues_exactly(uninterrupted, script, command, monkeypatch):
    original = loop.Trainer._step

    def interrupt_at_2(self, step):
        original(self, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", interrupt_at_2)
        with pytest.raises(Interrupted, match=r"stopped at step 3 of 6.*--resume"):
            script.train(command("--name", "stopped"))
    resumed = script.train(command("--name", "stopped", "--resume"))
    assert resumed.checkpoint.name == "step-00000003"
    assert_identical(weights(resumed, 6), weights(uninterrupted, 6))


def test_going_back_to_an_older_checkpoint_gives_the_later_ones_up(script, command, monkeypatch, capsys):
    often = ("--name", "back", "--checkpoint.checkpointing_steps", "2", "--checkpoint.checkpoints_total_limit", "2")
    run = script.train(command(*often))
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004", "step-00000006"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_agree_to_stop", lambda self, *_: self.state.progress.step == 5)
        with pytest.raises(Interrupted, match=r"the checkpoint .*step-00000005 is complete"):
            script.train(command(*often, "--resume", str(run.checkpoints / "step-00000004")))
    assert "at step 4: removed its later checkpoints (step-00000006)" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004", "step-00000005"]
    assert script.train(command(*often, "--resume")).checkpoint.name == "step-00000005"


def test_a_checkpoint_that_does_not_load_costs_no_later_one(script, command):
    run = script.train(command("--name", "stays"))
    named = ("--resume", str(run.checkpoints / "step-00000004"))
    with pytest.raises(ValueError, match="now it would be 16"):
        script.train(command("--name", "stays", *named, "--train.train_batch_size", "8"))
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-00000004", "step-00000006"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(script, command, monkeypatch):
    original = loop.Trainer._loss
    monkeypatch.setattr(
        loop.Trainer,
        "_loss",
        lambda self, step, micro: original(self, step, micro) * (float("nan") if step == 4 else 1),
    )
    with pytest.raises(FloatingPointError, match=r"at step 5: .*step-00000004"):
        script.train(command("--name", "diverged"))


def test_a_finished_run_is_left_alone_and_can_be_extended(script, command, capsys):
    small = ("--name", "again", "--train.max_train_steps", "2", "--schedule.lr_scheduler", "constant")
    run = script.train(command(*small))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert script.train(command(*small, "--resume")).finished and "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    longer = script.train(command(*small, "--train.max_train_steps", "3", "--resume"))
    assert json.loads((longer.path / "run.json").read_text())["step"] == 3
    assert LatentDiffusionPipeline.from_pretrained(longer.pipeline)


def test_a_last_grid_that_fails_costs_no_pipeline(script, command, monkeypatch):
    small = ("--name", "gridless", "--train.max_train_steps", "1")

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(script.training, "sample_grid", fail)
        script.train(command(*small))
    run = find_run(command(*small, "--resume"))
    assert LatentDiffusionPipeline.from_pretrained(run.pipeline) and not run.finished
    script.train(command(*small, "--resume"))
    assert (run.samples / "step-00000001.png").is_file() and find_run(command(*small, "--resume")).finished


def test_a_run_that_goes_on_has_no_pipeline_until_its_end(script, command, monkeypatch):
    small = ("--name", "longer", "--train.max_train_steps", "2", "--schedule.lr_scheduler", "constant")
    run = script.train(command(*small))
    before = (run.path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="now it would be 16"):
        script.train(command(*small, "--resume", "--train.max_train_steps", "4", "--train.train_batch_size", "8"))
    assert run.pipeline.is_dir() and (run.path / "config.yaml").read_text() == before
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_agree_to_stop", lambda self, *_: self.state.progress.step == 3)
        with pytest.raises(Interrupted):
            script.train(command(*small, "--resume", "--train.max_train_steps", "4"))
    assert not run.pipeline.exists() and "max_train_steps: 4" in (run.path / "config.yaml").read_text()


def test_a_total_below_the_checkpoint_is_refused(script, command):
    small = ("--name", "shorter", "--schedule.lr_scheduler", "constant")
    run = script.train(command(*small))
    with pytest.raises(ValueError, match=r"expected at least 6, where .*step-00000006 continues, got 5"):
        script.train(command(*small, "--resume", "--train.max_train_steps", "5"))
    with pytest.raises(ValueError, match=r"expected at least 4, where .*step-00000004 continues, got 3"):
        named = str(run.checkpoints / "step-00000004")
        script.train(command(*small, "--resume", named, "--train.max_train_steps", "3"))
    assert run.pipeline.is_dir() and "max_train_steps: 6" in (run.path / "config.yaml").read_text()


def test_an_existing_run_is_neither_overwritten_nor_mixed(script, command):
    small = ("--name", "taken", "--train.max_train_steps", "1")
    run = script.train(command(*small))
    with pytest.raises(FileExistsError, match=r"--resume.*--overwrite"):
        script.train(command(*small))
    with pytest.raises(ValueError, match=r"model.dropout: 0.1 in the run, 0.2 now"):
        script.train(command(*small, "--resume", "--model.dropout", "0.2"))
    with pytest.raises(ValueError, match=r"8 pictures an optimizer step, now it would be 16"):
        script.train(command(*small, "--resume", "--train.train_batch_size", "8", "--train.max_train_steps", "2"))
    (run.path / "stray").touch()
    script.train(command(*small, "--overwrite"))
    assert not (run.path / "stray").exists()


def test_dry_run_describes_and_touches_nothing(script, command, tmp_path, picture_folder, capsys):
    arguments = ["--preset", "tiny", "--data.name", str(picture_folder), "--output_dir", str(tmp_path / "runs")]
    assert script.main([*arguments, "--data.cache_dir", str(tmp_path / "cache"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pictures 3x32x32, 2 classes" in out and "latents      4x8x8" in out and "64,000 pictures seen" in out
    assert list(tmp_path.iterdir()) == []
    from dcngen.models import count_parameters
    from dcngen.training import build_unet

    config = command("--preset", "tiny").config
    unet = build_unet(config.model, latent_shape=(4, 8, 8), num_classes=2, num_train_timesteps=1000, seed=0)
    assert script.main([*arguments, "--dry-run", "--config", str(write(tmp_path, config))]) == 0
    assert f"{count_parameters(unet):,} parameters" in capsys.readouterr().out


def write(folder, config):
    from dcngen.config.loader import to_yaml

    (folder / "c.yaml").write_text(to_yaml(config))
    return folder / "c.yaml"


def test_a_dry_run_refuses_what_could_not_be_sampled(script, capsys):
    assert script.main(["--dry-run", "--sampling.sampler", "ddim", "--objective.prediction_type", "flow"]) == 1
    assert "sampling.sampler ddim" in capsys.readouterr().err


def test_user_errors_are_one_line_and_status_1(script, capsys):
    assert script.main(["--train.max_steps", "3"]) == 1
    assert "did you mean 'train.max_train_steps'" in capsys.readouterr().err


def test_the_loss_decreases_on_real_latents(script, command):
    options = (
        "--train.max_train_steps 60 --train.gradient_accumulation_steps 1 --train.train_batch_size 16 "
        "--checkpoint.checkpointing_steps 0 --logging.logging_steps 15 --optimizer.learning_rate 2e-3"
    )
    run = script.train(command("--name", "learns", *options.split()))
    losses = [entry["loss"] for entry in read_metrics(run.metrics)]
    assert losses[-1] < 0.85 * losses[0]
