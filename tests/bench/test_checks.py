"""A benchmark refuses to print a time on a wrong result."""

import pytest
import torch
from torch import nn

from dcngen.bench.checks import relative_error, require_close, require_same_layer
from dcngen.nn import DCNv4


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.3, 0.4]), expected) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [1.2, float("nan"), float("inf")])
def test_a_wrong_result_is_refused(wrong):
    expected = torch.ones(4)
    require_close("output", expected * 1.01, expected, 0.03)
    with pytest.raises(RuntimeError, match=r"output: expected a relative error of at most 0\.03"):
        require_close("output", expected * wrong, expected, 0.03)


def layer_and_input():
    torch.manual_seed(0)
    layer = DCNv4(32, group=2, mask_init=0.3)
    nn.init.normal_(layer.offset_mask.weight, std=0.05)
    return layer, torch.randn(2, 6, 5, 32).requires_grad_(), torch.randn(2, 6, 5, 32)


def test_a_compiled_layer_is_compared_with_the_plain_one():
    layer, x, grad = layer_and_input()
    require_same_layer("layer", layer, torch.compile(layer, backend="aot_eager", fullgraph=True), x, grad)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda layer: lambda x: layer(x.flip(1)), "layer: output"),
        (lambda layer: lambda x: layer(x) + 0.5 * (x - x.detach()), "layer: gradient of the input"),
    ],
)
def test_a_wrong_layer_is_refused(wrong, message):
    layer, x, grad = layer_and_input()
    with pytest.raises(RuntimeError, match=message):
        require_same_layer("layer", layer, wrong(layer), x, grad)
