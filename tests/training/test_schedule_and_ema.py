import math

import pytest
import torch

from dcngen.training.ema import EMA
from dcngen.training.schedule import learning_rate_factor


def test_warm_up_is_linear_and_starts_above_zero():
    assert [learning_rate_factor(step, "constant", 4, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_goes_from_one_to_zero():
    values = [learning_rate_factor(step, "cosine", 10, 110) for step in (10, 60, 85, 110, 500)]
    assert values == pytest.approx([1, 0.5, 0.5 * (1 + math.cos(0.75 * math.pi)), 0, 0])


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant or cosine"):
        learning_rate_factor(0, "linear", 0, 10)


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_the_weighted_sum_of_all_weights(warmup):
    """ema_n = w_0 * prod(d_i) + sum_k (1 - d_k) * prod_{i>k}(d_i) * w_k, in double precision."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    ema = EMA(model, 0.98, warmup)
    history = [model.weight.detach().double().clone()]
    for step in range(200):
        torch.nn.init.normal_(model.weight)
        history.append(model.weight.detach().double().clone())
        ema.update(model, step)
    decays = [min(0.98, (1 + step) / (10 + step)) if warmup else 0.98 for step in range(200)]
    expected = history[0] * math.prod(decays)
    for k, weight in enumerate(history[1:]):
        expected += (1 - decays[k]) * math.prod(decays[k + 1 :]) * weight
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_buffers_are_copied_and_half_precision_is_refused():
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, 0.5)
    model.running_mean.fill_(2.0)
    ema.update(model, 0)
    assert ema.model.running_mean.tolist() == [2.0] * 3
    with pytest.raises(TypeError, match="fp32"):
        EMA(torch.nn.Linear(2, 2).bfloat16(), 0.99)
