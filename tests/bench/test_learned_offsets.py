"""The two scripts about trained offsets: what one counts, and the deviations that the other sets."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from dcngen.models import DCNUNet2DModel
from dcngen.nn import DCNv4

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def learned_offsets(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("learned_offsets")


@pytest.fixture
def unet_step(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("unet_step")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return DCNUNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        conv_operator="dcnv4", attention_operator="dcnv4", dcn_group_channels=16,
    ).eval()  # fmt: skip


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor([3, 700])


def test_statistics_of_known_samples(learned_offsets):
    statistics = learned_offsets.LayerStatistics(size="1x1x1")
    offsets = torch.tensor([[0.0, 0.5], [-1.0, 0.25], [3.0, -3.0], [0.25, -0.75]])
    masks = torch.tensor([0.5, -2.0, 1.0, 0.5])
    statistics.add(offsets, masks)
    row = statistics.row()
    assert row["far"] == 0.5 and row["far_weight"] == pytest.approx(3 / 4)  # a whole pixel away is far
    assert row["std"] == pytest.approx(offsets.std(correction=0).item())
    assert row["mask_mean"] == pytest.approx(0.0) and row["mask_std"] == pytest.approx(masks.std(correction=0).item())
    assert row["quantile_50"] == pytest.approx(0.75, abs=1 / 64) and row["quantile_99"] == pytest.approx(3, abs=1 / 64)


def test_merged_statistics_are_those_of_all(learned_offsets):
    LayerStatistics = learned_offsets.LayerStatistics
    parts = [(torch.randn(50, 9, 2), torch.randn(50, 9)) for _ in range(3)]
    merged, together = LayerStatistics(), LayerStatistics()
    for offsets, masks in parts:
        part = LayerStatistics()
        part.add(offsets, masks)
        merged.merge(part)
    together.add(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    assert merged.row() == pytest.approx(together.row())


def test_every_layer_is_watched_and_keeps_its_deviation(unet, inputs, learned_offsets, unet_step):
    """What unet_step.py sets, learned_offsets.py finds; layers on other maps stay as they are."""
    unet_step.spread_offsets(unet, inputs, {8: 0.5})
    statistics = learned_offsets.watch(unet)
    with torch.no_grad():
        unet(*inputs)
    assert set(statistics) == {name for name, module in unet.named_modules() if isinstance(module, DCNv4)}
    rows = {layer.size: layer.row() for layer in statistics.values()}
    assert {size.split("x")[0] for size in rows} == {"8", "4"}
    for size, row in rows.items():
        assert row["std"] == pytest.approx(0.5 if size.startswith("8") else 0.0, abs=1e-3)


def test_a_watched_model_computes_the_same(unet, inputs, learned_offsets, unet_step):
    unet_step.spread_offsets(unet, inputs, {8: 0.5, 4: 0.5})
    with torch.no_grad():
        expected = unet(*inputs).sample
        learned_offsets.watch(unet)
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
