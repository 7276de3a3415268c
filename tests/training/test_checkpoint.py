import json
import os

import pytest
import torch
from diffusers import UNet2DModel

from dcngen.training import checkpoint as module
from dcngen.training.checkpoint import (
    Progress,
    clean_unfinished,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from dcngen.training.ema import EMA


def make(seed=0, width=8):
    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(width,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    ).to(memory_format=torch.channels_last)
    return model, EMA(model, 0.9), torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, ema, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        model(x, 3).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)


def everything(model, ema, optimizer):
    states = [values[key] for values in optimizer.state_dict()["state"].values() for key in sorted(values)]
    return [*model.state_dict().values(), *ema.model.state_dict().values(), *states]


def test_continuing_from_a_checkpoint_is_exact_and_keeps_the_memory_layout(tmp_path):
    whole = make()
    train(*whole, steps=5)
    half = make()
    train(*half, steps=3)
    path = save_checkpoint(tmp_path, *half, Progress(step=3, num_images_seen=6, total_batch_size=2), keep=2)
    restored = make(seed=99)
    progress = load_checkpoint(path, *restored)
    assert progress == Progress(step=3, num_images_seen=6, total_batch_size=2)
    train(*restored, steps=2, first=3)
    assert all(torch.equal(a, b) for a, b in zip(everything(*restored), everything(*whole), strict=True))
    moment = next(v["exp_avg"] for v in restored[2].state.values() if v["exp_avg"].ndim == 4)
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_the_folders_are_models_of_their_own(tmp_path):
    model, ema, optimizer = make()
    train(model, ema, optimizer, steps=1)
    path = save_checkpoint(tmp_path, model, ema, optimizer, Progress(step=1), keep=1)
    loaded = UNet2DModel.from_pretrained(path / "unet_ema")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ema.model.parameters(), strict=True))
    assert not list(path.rglob("*.bin")) and not list(path.rglob("*.p*"))


@pytest.mark.parametrize("moment", ["optimizer", "state", "rename"])
def test_an_interrupted_write_leaves_the_older_checkpoint_the_newest(tmp_path, monkeypatch, moment):
    objects = make()
    train(*objects, steps=1)
    good = save_checkpoint(tmp_path, *objects, Progress(step=1), keep=2)

    def crash(*_, **__):
        raise KeyboardInterrupt

    target = {"optimizer": (module, "save_file"), "state": (module.json, "dumps"), "rename": (module.os, "rename")}
    monkeypatch.setattr(*target[moment], crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, *objects, Progress(step=2), keep=2)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == good and list_checkpoints(tmp_path) == [good]


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    """A power cut runs no clean-up: what it leaves is a hidden folder, or one without the file that is written last."""
    objects = make()
    train(*objects, steps=1)
    good = save_checkpoint(tmp_path, *objects, Progress(step=1), keep=2)
    (tmp_path / ".step-00000002-abc" / "unet").mkdir(parents=True)
    (tmp_path / "step-00000003").mkdir()
    assert latest_checkpoint(tmp_path) == good
    clean_unfinished(tmp_path)
    assert not list(tmp_path.glob(".step-*"))
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "step-00000003", *objects)


def test_only_the_newest_are_kept_by_number_and_rewriting_replaces(tmp_path):
    objects = make()
    train(*objects, steps=1)
    for step in (99_999_999, 100_000_000, 2, 100_000_000):
        save_checkpoint(tmp_path, *objects, Progress(step=step, num_images_seen=step), keep=3)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-99999999", "step-100000000"]
    save_checkpoint(tmp_path, *objects, Progress(step=100_000_001), keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step-100000001"]


def test_the_checkpoint_just_written_stays_whatever_its_step(tmp_path):
    objects = make()
    for step in (2000, 3000, 1500):
        path = save_checkpoint(tmp_path, *objects, Progress(step=step), keep=2)
    assert path.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["step-00001500", "step-00003000"]
    save_checkpoint(tmp_path, *objects, Progress(step=1600), keep=1)
    assert os.listdir(tmp_path) == ["step-00001600"]


def test_a_crash_while_deleting_leaves_no_broken_checkpoint(tmp_path, monkeypatch):
    objects = make()
    save_checkpoint(tmp_path, *objects, Progress(step=1), keep=1)

    def crash(path, **_):
        (path / "optimizer.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.shutil, "rmtree", crash)
        save_checkpoint(tmp_path, *objects, Progress(step=2), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    clean_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["step-00000002"]


def test_another_model_is_refused(tmp_path):
    objects = make()
    train(*objects, steps=1)
    path = save_checkpoint(tmp_path, *objects, Progress(step=1), keep=1)
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, *make(width=16))
    assert json.loads((path / "trainer_state.json").read_text())["step"] == 1
