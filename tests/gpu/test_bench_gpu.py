"""What the operator benchmark times on a GPU beside ours computes the same function there."""

import pytest
import torch

from dcngen.bench.checks import relative_error
from dcngen.bench.competitors import competitors, torchvision_operator
from dcngen.bench.operator import Case, time_competitors
from dcngen.bench.operator import make_inputs as benchmark_inputs
from dcngen.ops import dcnv4

DEVICE = torch.device("cuda")


@pytest.mark.skipif(torchvision_operator() is None, reason="no torchvision that fits this torch")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_torchvision_computes_dcnv4(dtype):
    case = Case(3, 9, 13, 64, 32, dtype, offset_std=1.0)
    x = benchmark_inputs(case, DEVICE, seed=0)
    torchvision = competitors(case.channels, case.groups, x.value.dtype, DEVICE)["torchvision"]
    theirs = torchvision.run(torchvision.prepare(x.value, x.offset_mask))
    ours = dcnv4(x.value, x.offset_mask, groups=case.groups)
    # torchvision computes places in the storage type: a float16 place of 13 pixels is off by up to 0.004.
    assert relative_error(theirs, ours) <= (1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_competitor_is_timed(dtype):
    case = Case(2, 16, 16, 64, 32, dtype, offset_std=0.0)
    time_competitors(case, [benchmark_inputs(case, DEVICE, seed) for seed in range(2)])
    expected = {"conv3x3", "depthwise7x7"} | ({"attention"} if dtype != "fp32" else set())
    if torchvision_operator() is not None and dtype != "bf16":
        expected.add("torchvision")
    assert set(case.others) == expected and all(time > 0 for time in case.others.values())
