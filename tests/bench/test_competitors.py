"""What the operator benchmark compares with computes what it is said to compute."""

import pytest
import torch

from dcngen.bench.competitors import competitors, torchvision_operator
from dcngen.ops import dcnv4_reference, offset_mask_channels


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 6, 5, 64), torch.randn(2, 6, 5, offset_mask_channels(2))


@pytest.mark.skipif(torchvision_operator() is None, reason="no torchvision that fits this torch")
def test_torchvision_computes_dcnv4(inputs):
    torchvision = competitors(64, 2, torch.float32, torch.device("cpu"))["torchvision"]
    got = torchvision.run(torchvision.prepare(*inputs))
    torch.testing.assert_close(got, dcnv4_reference(*inputs, groups=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, attention", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_every_competitor_keeps_the_map(inputs, dtype, attention):
    value, offset_mask = (x.to(dtype) for x in inputs)
    found = competitors(64, 2, dtype, torch.device("cpu"))
    assert {"conv3x3", "depthwise7x7"} <= set(found) and ("attention" in found) == attention
    for competitor in found.values():
        assert competitor.run(competitor.prepare(value, offset_mask)).numel() == value.numel()
