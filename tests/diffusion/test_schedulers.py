"""Samplers against a model whose ODE has a known solution, and their grids."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from dcngen.diffusion import (
    SAMPLERS,
    Objective,
    make_scheduler,
    model_evaluations,
    seeded_noise,
    set_sampling_timesteps,
)

OBJECTIVES = {
    "epsilon": Objective(),
    "linear": Objective(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    "v": Objective(prediction_type="v_prediction"),
    "v zero snr": Objective(prediction_type="v_prediction", rescale_zero_terminal_snr=True),
    "flow": Objective(prediction_type="flow"),
    "flow shifted": Objective(prediction_type="flow", flow_shift=3.0),
}
PAIRS = [
    pytest.param(objective, sampler, id=f"{name}, {sampler}")
    for name, objective in OBJECTIVES.items()
    for sampler in SAMPLERS
    if not (objective.is_flow and sampler == "ddim") and not (objective.rescale_zero_terminal_snr and sampler == "heun")
]


def error_after(pipeline, objective, sampler, steps, std=0.5):
    """Relative distance from the exact solution of the probability-flow ODE for data N(0, std^2).

    It only scales: x_0 = x_T * std / sqrt(alpha_T^2 std^2 + sigma_T^2).
    """
    noise = seeded_noise((4, 4, 4), range(8))
    pipeline.scheduler = make_scheduler(sampler, pipeline.scheduler)
    sample = pipeline.denoise(noise, None, steps, 1.0)
    last = torch.tensor([objective.num_train_timesteps - (0.0 if objective.is_flow else 1)])
    alpha, sigma = objective.alpha_sigma(last if objective.is_flow else last.long())
    exact = noise * std / (alpha**2 * std**2 + sigma**2).sqrt()
    return ((sample - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("objective, sampler", PAIRS)
def test_converges_to_the_exact_solution(gaussian_pipeline, objective, sampler):
    pipeline = gaussian_pipeline(objective)
    coarse = error_after(pipeline, objective, sampler, 50)
    assert pipeline.unet.calls == model_evaluations(sampler, 50)
    fine = error_after(pipeline, objective, sampler, 200)
    assert fine < (0.022 if sampler in ("ddim", "euler") else 0.012)
    assert fine < coarse / 2


@pytest.mark.parametrize("objective", [OBJECTIVES["linear"], OBJECTIVES["flow"]], ids=["linear", "flow"])
def test_second_order_beats_first(gaussian_pipeline, objective):
    errors = {s: error_after(gaussian_pipeline(objective), objective, s, 25) for s in ("euler", "heun", "dpm-solver++")}
    assert errors["heun"] < errors["euler"] / 3
    assert errors["dpm-solver++"] < errors["euler"] / 3


def test_ddim_is_euler(gaussian_pipeline):
    """The same ODE step in other variables (Song et al. eq. 14): they differ by the size of the first sample alone."""
    objective = OBJECTIVES["epsilon"]
    samples = {}
    for sampler in ("ddim", "euler"):
        pipeline = gaussian_pipeline(objective)
        pipeline.scheduler = make_scheduler(sampler, pipeline.scheduler)
        samples[sampler] = pipeline.denoise(seeded_noise((4, 4, 4), range(2)), None, 20, 1.0)
    _, sigma = objective.alpha_sigma(torch.tensor([999]))
    torch.testing.assert_close(samples["ddim"] * sigma, samples["euler"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50, 61, 103, 122, 998, 1000])
@pytest.mark.parametrize("objective, sampler", PAIRS)
def test_grid(objective, sampler, steps):
    if sampler == "ddim" and 1000 % steps:
        steps = max(n for n in range(1, steps) if 1000 % n == 0)  # the others are refused, see below
    scheduler = make_scheduler(sampler, objective.scheduler_config())
    set_sampling_timesteps(scheduler, steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == model_evaluations(sampler, steps)
    levels = list(dict.fromkeys(timesteps))
    assert len(levels) == steps and levels == sorted(levels, reverse=True) and levels[-1] >= 0
    assert levels[0] == pytest.approx(1000 if objective.is_flow else 999, abs=1)
    if hasattr(scheduler, "sigmas"):
        assert scheduler.sigmas[-1] == 0 and torch.isfinite(scheduler.sigmas).all()


def test_flow_grid_is_shifted_once():
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25])
    expected = 3 * expected / (1 + 2 * expected)
    for sampler in ("euler", "heun"):
        scheduler = make_scheduler(sampler, OBJECTIVES["flow shifted"].scheduler_config())
        set_sampling_timesteps(scheduler, 4)
        torch.testing.assert_close(scheduler.timesteps.unique(sorted=True).flip(0) / 1000, expected)


def test_the_model_is_told_the_level_it_is_given():
    scheduler = make_scheduler("dpm-solver++", OBJECTIVES["flow"].scheduler_config())
    set_sampling_timesteps(scheduler, 7)
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


@pytest.mark.parametrize("steps, remedy", [(30, "25 or 40"), (600, "500 or 1000")])
def test_ddim_refuses_steps_that_leave_noise_behind(steps, remedy):
    with pytest.raises(ValueError, match=remedy):
        set_sampling_timesteps(Objective().scheduler_config(), steps)


@pytest.mark.parametrize("steps", [0, 1001])
def test_number_of_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        set_sampling_timesteps(Objective().scheduler_config(), steps)


@pytest.mark.parametrize("objective, sampler", PAIRS)
def test_any_sampler_can_be_made_from_any_other(objective, sampler):
    """The objective survives the way through a sampler and through its saved configuration."""
    direct = make_scheduler(sampler, objective.scheduler_config())
    for between in SAMPLERS:
        if (objective.is_flow and between == "ddim") or (objective.rescale_zero_terminal_snr and between == "heun"):
            continue
        through = make_scheduler(between, objective.scheduler_config())
        assert make_scheduler(sampler, through).config == direct.config
        assert (
            make_scheduler(sampler, {**through.config, "_class_name": type(through).__name__}).config == direct.config
        )
    if not objective.is_flow:
        torch.testing.assert_close(direct.alphas_cumprod[:-1], objective.scheduler_config().alphas_cumprod[:-1])
        assert direct.config.prediction_type == objective.prediction_type
        assert not direct.config.get("clip_sample", False)


def test_options_of_another_sampler_do_not_leak():
    saved = PNDMScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, skip_prk_steps=True
    )
    karras = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    expected = make_scheduler("euler", DDIMScheduler(beta_schedule="scaled_linear")).config
    assert make_scheduler("euler", saved).config == expected == make_scheduler("euler", karras).config


def test_foreign_schedulers_keep_their_own_grid():
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True, timestep_spacing="trailing")
    set_sampling_timesteps(scheduler, 61)
    assert len(scheduler.timesteps) == 61
    leading = DDIMScheduler(timestep_spacing="leading")
    set_sampling_timesteps(leading, 50)
    assert leading.timesteps[0] == 980


def test_refusals_name_the_remedy():
    with pytest.raises(ValueError, match="ddim, dpm-solver\\+\\+, euler, heun"):
        make_scheduler("plms", Objective().scheduler_config())
    with pytest.raises(ValueError, match="use euler"):
        make_scheduler("ddim", OBJECTIVES["flow"].scheduler_config())
    with pytest.raises(ValueError, match="use ddim, dpm-solver\\+\\+ or euler"):
        make_scheduler("heun", OBJECTIVES["v zero snr"].scheduler_config())
    with pytest.raises(TypeError, match=r"pass pipeline\.scheduler"):
        make_scheduler("euler", "scheduler")
