"""Samplers by name, made from the scheduler that a pipeline was saved with.

Only the noise process (prediction type, betas or flow shift) is taken from it; the sampler's own options are set here,
so no option of another sampler leaks in through diffusers' `from_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)

SAMPLERS = ("ddim", "dpm-solver++", "euler", "heun")

# diffusers' defaults of the noise process (those of DDPM), for configurations that leave them out.
_DISCRETE_PROCESS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}


def make_scheduler(name: str, scheduler_or_config: SchedulerMixin | Mapping[str, Any]) -> SchedulerMixin:
    """The sampler `name` for the noise process of a scheduler, or of a scheduler's configuration.

    - "ddim": DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502). The number of steps must divide the training
      steps. Discrete objectives only: its counterpart for flow is "euler".
    - "dpm-solver++": second-order multistep, midpoint (Lu et al. 2022, arXiv 2211.01095), one evaluation a step.
    - "euler": first order in sigma (Karras et al. 2022, arXiv 2206.00364): DDIM, for any number of steps.
    - "heun": second order, two evaluations a step but the last (ibid., algorithm 1 without churn).

    All use trailing spacing (they start at the last trained step: Lin et al. 2023, table 2), end at sigma 0 and do not
    clip. Steps are set by `dcngen.diffusion.set_sampling_timesteps`, which the pipeline calls.

    Raises:
        ValueError: an unknown name, or a sampler that cannot follow this noise process.
        TypeError: neither a scheduler nor a configuration.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler expected one of {', '.join(SAMPLERS)}, got {name!r}")
    config = _config_of(scheduler_or_config)
    if _is_flow(config):
        return _flow_sampler(name, config)
    process = {key: config.get(key, default) for key, default in _DISCRETE_PROCESS.items()}
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if name == "heun":
        if zero_snr:
            raise ValueError(
                "sampler 'heun' expected a noise schedule without zero terminal SNR: diffusers' Heun has "
                "no such schedule and would sample from another process than the model was trained on; "
                "use ddim, dpm-solver++ or euler"
            )
        return HeunDiscreteScheduler(**process, clip_sample=False, timestep_spacing="trailing")
    process |= {"rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
    if name == "ddim":
        return DDIMScheduler(**process, clip_sample=False, set_alpha_to_one=True)
    if name == "euler":
        return EulerDiscreteScheduler(**process, final_sigmas_type="zero")
    return DPMSolverMultistepScheduler(**process, **_DPM_SOLVER)


_DPM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}


def model_evaluations(name: str, num_inference_steps: int) -> int:
    """How often `name` evaluates the model for one picture in that many steps (without counting guidance twice)."""
    return 2 * num_inference_steps - 1 if name == "heun" else num_inference_steps


def _flow_sampler(name: str, config: Mapping[str, Any]) -> SchedulerMixin:
    num_train_timesteps = config.get("num_train_timesteps", 1000)
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    if name == "dpm-solver++":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            **_DPM_SOLVER,
        )
    raise ValueError(
        "sampler 'ddim' expected an epsilon or v-prediction model, got a flow model; use euler, its "
        "counterpart on the straight path"
    )


def _config_of(scheduler_or_config: SchedulerMixin | Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration as a mapping; a scheduler that holds its class in `_class_name` keeps it."""
    if isinstance(scheduler_or_config, Mapping):
        return scheduler_or_config
    if isinstance(scheduler_or_config, SchedulerMixin):
        return {"_class_name": type(scheduler_or_config).__name__, **scheduler_or_config.config}
    raise TypeError(
        "expected a diffusers scheduler or its configuration, got "
        f"{type(scheduler_or_config).__name__}; pass pipeline.scheduler"
    )


def _is_flow(config: Mapping[str, Any]) -> bool:
    return (
        str(config.get("_class_name", "")).startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )
