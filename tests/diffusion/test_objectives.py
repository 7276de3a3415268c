"""Objectives: the algebra of each prediction type, the min-SNR weights, and what must be refused."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from dcngen.diffusion import Objective, drop_labels, seeded_generator

OBJECTIVES = {
    "epsilon": Objective(),
    "v": Objective(prediction_type="v_prediction"),
    "v zero snr": Objective(prediction_type="v_prediction", rescale_zero_terminal_snr=True),
    "flow": Objective(prediction_type="flow"),
    "flow shifted": Objective(prediction_type="flow", flow_shift=3.0, timestep_sampling="logit_normal"),
}


@pytest.fixture(params=OBJECTIVES.values(), ids=OBJECTIVES.keys())
def objective(request):
    return request.param


@pytest.fixture
def batch(objective):
    generator = seeded_generator(0)
    latents, noise = torch.randn(2, 64, 4, 3, 3, generator=generator)
    return latents, noise, objective.sample_timesteps(64, generator)


def data_from(objective, prediction, noisy, timesteps):
    """x_0 that a prediction stands for: each formula solved for x_0."""
    alpha, sigma = (values.view(-1, 1, 1, 1) for values in objective.alpha_sigma(timesteps))
    if objective.prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha
    return noisy - sigma * prediction if objective.is_flow else alpha * noisy - sigma * prediction


def test_target_stands_for_the_latents(objective, batch):
    latents, _, timesteps = batch
    noisy = objective.add_noise(*batch)
    torch.testing.assert_close(
        data_from(objective, objective.target(*batch), noisy, timesteps), latents, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_agrees_with_diffusers(prediction_type, beta_schedule):
    objective = Objective(prediction_type=prediction_type, beta_schedule=beta_schedule)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=beta_schedule)
    latents, noise = torch.randn(2, 5, 4, 3, 3, generator=seeded_generator(1))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(
        objective.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(objective.target(latents, noise, timesteps), expected)


def test_min_snr_weights_the_error_of_the_data_by_min_snr_gamma(objective, batch):
    # zero terminal SNR is refused together with min-SNR
    objective = replace(objective, min_snr_gamma=5.0, rescale_zero_terminal_snr=False)
    latents, noise, timesteps = batch
    alpha, sigma = (values.double() for values in objective.alpha_sigma(timesteps))
    noisy = objective.add_noise(*batch).double()
    target = objective.target(*batch).double()
    error = torch.randn(target.shape, generator=seeded_generator(3), dtype=torch.float64)
    alpha_sigma = [values.view(-1, 1, 1, 1) for values in (alpha, sigma)]
    data_error = {
        "epsilon": lambda e: -alpha_sigma[1] / alpha_sigma[0] * e,
        "v_prediction": lambda e: -alpha_sigma[1] * e,
        "flow": lambda e: -alpha_sigma[1] * e,
    }[objective.prediction_type](error)
    # the line above is the derivative of data_from, checked here against data_from itself
    moved = data_from(objective, target + error, noisy, timesteps) - data_from(objective, target, noisy, timesteps)
    torch.testing.assert_close(data_error, moved, rtol=1e-4, atol=1e-4)
    expected = torch.minimum((alpha / sigma) ** 2, torch.tensor(5.0)) * data_error.square().flatten(1).mean(1)
    loss = objective.loss((target + error).float(), latents, noise, timesteps)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-5)


def test_min_snr_known_values():
    timesteps = torch.tensor([0, 999])
    for prediction_type, closed_form in (
        ("epsilon", lambda snr: snr.clamp(max=5) / snr),
        ("v_prediction", lambda snr: snr.clamp(max=5) / (snr + 1)),
    ):
        objective = Objective(prediction_type=prediction_type, min_snr_gamma=5.0)
        torch.testing.assert_close(objective.weight(timesteps), closed_form(objective.snr(timesteps)))
    flow = Objective(prediction_type="flow", min_snr_gamma=5.0)
    assert flow.weight(torch.tensor([0.0, 1000.0])).tolist() == [0.0, 0.0]
    torch.testing.assert_close(flow.weight(torch.tensor([500.0])), torch.tensor([0.25]))


def test_loss_is_the_mean_square_of_each_sample_in_fp32(objective, batch):
    latents, noise, timesteps = batch
    output = torch.randn(latents.shape, generator=seeded_generator(4)).bfloat16()
    loss = objective.loss(output, latents, noise, timesteps)
    assert loss.dtype == torch.float32 and loss.shape == (64,)
    target = objective.target(latents, noise, timesteps)
    torch.testing.assert_close(loss[5], (output[5].float() - target[5]).pow(2).mean())


def test_noise_is_added_in_fp32(objective, batch):
    latents, noise, timesteps = batch
    noisy = objective.add_noise(latents.bfloat16(), noise.bfloat16(), timesteps)
    expected = objective.add_noise(latents.bfloat16().float(), noise.bfloat16().float(), timesteps)
    assert noisy.dtype == torch.float32 and torch.equal(noisy, expected)


def test_timesteps_are_a_function_of_the_generator(objective):
    draws = [objective.sample_timesteps(100, seeded_generator(7, "timesteps")) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], objective.sample_timesteps(100, seeded_generator(8, "timesteps")))
    assert draws[0].is_floating_point() == objective.is_flow


def test_discrete_timesteps_cover_both_ends():
    timesteps = Objective(num_train_timesteps=10).sample_timesteps(1000, seeded_generator(0))
    assert sorted(set(timesteps.tolist())) == list(range(10))


def test_flow_timesteps_are_uniform_logit_normal_and_shifted():
    def median(**kw):
        timesteps = Objective(prediction_type="flow", **kw).sample_timesteps(20001, seeded_generator(0))
        assert timesteps.min() > 0 and timesteps.max() <= 1000
        return timesteps.median().item() / 1000

    assert median() == pytest.approx(0.5, abs=0.01)
    assert median(timestep_sampling="logit_normal", logit_mean=1.0) == pytest.approx(0.7311, abs=0.01)
    assert median(flow_shift=3.0) == pytest.approx(0.75, abs=0.01)  # 3 * 0.5 / (1 + 2 * 0.5)


def test_zero_terminal_snr_ends_in_noise():
    objective = OBJECTIVES["v zero snr"]
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    last = torch.tensor([999])
    assert torch.equal(objective.add_noise(latents, noise, last), noise)
    assert torch.equal(objective.target(latents, noise, last), -latents)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prediction_type="sample"), "expected one of epsilon, v_prediction, flow"),
        (dict(beta_schedule="cosine"), "squaredcos_cap_v2"),
        (dict(rescale_zero_terminal_snr=True), "use prediction_type='v_prediction'"),
        (dict(beta_schedule="squaredcos_cap_v2"), "divides by zero"),
        (dict(prediction_type="v_prediction", rescale_zero_terminal_snr=True, min_snr_gamma=5.0), "never be trained"),
        (
            dict(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", min_snr_gamma=5.0),
            "never be trained",
        ),
        (dict(prediction_type="flow", rescale_zero_terminal_snr=True), "leave it out"),
        (dict(min_snr_gamma=0.0), "positive"),
        (dict(min_snr_gamma=float("nan")), "positive"),
        (dict(timestep_sampling="logit_normal"), "expected prediction_type='flow'"),
        (dict(flow_shift=2.0), "unless prediction_type='flow'"),
        (dict(prediction_type="flow", flow_shift=0.0), "positive"),
        (dict(prediction_type="flow", logit_std=0.0), "positive"),
        (dict(beta_start=0.5, beta_end=0.1), "beta_start <= beta_end"),
        (dict(num_train_timesteps=0), "at least 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_refuses_what_does_not_fit():
    objective, latents = Objective(), torch.zeros(2, 4, 3, 3)
    timesteps = torch.tensor([0, 1])
    with pytest.raises(TypeError, match="expected integer numbers"):
        objective.add_noise(latents, latents, timesteps.float())
    with pytest.raises(TypeError, match="expected floating numbers"):
        OBJECTIVES["flow"].add_noise(latents, latents, timesteps)
    with pytest.raises(ValueError, match="timesteps \\(N,\\)"):
        objective.add_noise(latents, latents, timesteps[:1])
    with pytest.raises(ValueError, match="out_channels"):
        objective.loss(torch.zeros(2, 8, 3, 3), latents, latents, timesteps)


def test_drop_labels():
    labels = torch.arange(10000) % 3
    assert torch.equal(drop_labels(labels, 3, 0.0), labels)
    assert torch.equal(drop_labels(labels, 3, 1.0), torch.full_like(labels, 3))
    dropped = drop_labels(labels, 3, 0.15, seeded_generator(5))
    assert torch.equal(dropped, drop_labels(labels, 3, 0.15, seeded_generator(5)))
    assert (dropped == 3).float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(dropped[dropped != 3], labels[dropped != 3])
    with pytest.raises(ValueError, match="probability"):
        drop_labels(labels, 3, 1.5)
