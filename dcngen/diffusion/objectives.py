"""What a diffusion model learns: the noising process, the regression target and the weight of each noise level.

Notation: x_0 clean latents, eps ~ N(0, I), x_t = alpha_t * x_0 + sigma_t * eps, SNR(t) = alpha_t^2 / sigma_t^2.
The discrete (epsilon, v) objectives are variance preserving, alpha_t^2 + sigma_t^2 = 1; flow has alpha_t = 1 - sigma_t.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), progressive distillation (Salimans & Ho 2022, arXiv 2202.00512),
min-SNR (Hang et al. 2023, arXiv 2303.09556), zero terminal SNR (Lin et al. 2023, arXiv 2305.08891), flow matching
(Lipman et al. 2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003), SD3 (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

PredictionType = Literal["epsilon", "v_prediction", "flow"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
TimestepSampling = Literal["uniform", "logit_normal"]

# Below this the last step holds no trace of x_0 in fp32: dividing by alpha_T (epsilon) multiplies the model's error by
# a thousand or more, and a min-SNR weight of this size never trains the very step at which sampling begins.
# The usual schedules end at 4e-5 (linear) and 4.7e-3 (scaled linear); the cosine one at 2e-9; a rescaled one at 0.
SMALLEST_TERMINAL_SNR = 1e-6


@dataclass(frozen=True)
class Objective:
    """A training objective: how latents are noised, what the model predicts and how each noise level counts.

    Every method is a pure function of its arguments, computes in fp32 whatever the dtype of its inputs (noise added in
    bf16 is a different noise), and never waits for a GPU. Latents, noise and model outputs are (N, C, H, W),
    timesteps (N,).

    Timesteps are what the model is called with: int64 in [0, num_train_timesteps) for epsilon and v_prediction,
    float32 sigma_t * num_train_timesteps in (0, num_train_timesteps] for flow.

    Args:
        prediction_type: "epsilon" (DDPM, eq. 14), "v_prediction" (Salimans & Ho, appendix D) or "flow" (rectified flow,
            Liu et al. eq. 1: velocity eps - x_0 on the straight path).
        num_train_timesteps: number of discrete noise levels; for flow the scale of the time given to the model.
        beta_schedule, beta_start, beta_end: the variances beta_t of DDPM eq. 2 as diffusers defines them; flow has
            none and ignores them.
        rescale_zero_terminal_snr: shift the schedule so that the last step is pure noise (Lin et al. algorithm 1).
            Only for v_prediction without min-SNR.
        min_snr_gamma: weight each noise level by min(SNR, gamma) in the space of x_0 (Hang et al. section 3.4; the
            paper uses 5). None: every timestep counts the same in the space of the prediction.
        timestep_sampling: "uniform", or "logit_normal" (flow only): sigma = sigmoid(mean + std * normal), SD3 eq. 19.
        logit_mean, logit_std: its parameters; SD3 ends with (0, 1).
        flow_shift: moves flow's noise levels towards noise, sigma' = s*sigma / (1 + (s - 1)*sigma), in training and
            sampling alike (SD3 eq. 23: s = sqrt(ratio of latent areas)).

    Raises:
        ValueError: an unknown name, a number out of range, or a combination that divides by zero or leaves the first
            sampling step untrained.
    """

    prediction_type: PredictionType = "epsilon"
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_zero_terminal_snr: bool = False
    min_snr_gamma: float | None = None
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    flow_shift: float = 1.0

    def __post_init__(self) -> None:
        _check_name("prediction_type", self.prediction_type, PredictionType)
        _check_name("beta_schedule", self.beta_schedule, BetaSchedule)
        _check_name("timestep_sampling", self.timestep_sampling, TimestepSampling)
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps expected at least 1, got {self.num_train_timesteps}; 1000 is usual")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma expected a positive number or None, got {self.min_snr_gamma}; 5 is usual")
        if self.is_flow:
            self._check_flow()
        else:
            self._check_discrete()

    def _check_flow(self) -> None:
        if self.rescale_zero_terminal_snr:
            raise ValueError(
                "rescale_zero_terminal_snr expected False with prediction_type='flow': flow already ends "
                "at pure noise; leave it out"
            )
        if not self.logit_std > 0:
            raise ValueError(f"logit_std expected a positive number, got {self.logit_std}; 1.0 is usual")
        if not self.flow_shift > 0:
            raise ValueError(f"flow_shift expected a positive number, got {self.flow_shift}; 1.0 leaves the path as is")

    def _check_discrete(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas expected 0 < beta_start <= beta_end < 1, got {self.beta_start} and "
                f"{self.beta_end}; latent diffusion uses 0.00085 and 0.012"
            )
        if self.timestep_sampling != "uniform":
            raise ValueError(
                f"timestep_sampling={self.timestep_sampling!r} expected prediction_type='flow', got "
                f"{self.prediction_type!r}; use 'uniform', or min_snr_gamma to weight the noise levels"
            )
        if self.flow_shift != 1.0:
            raise ValueError(
                f"flow_shift expected 1.0 unless prediction_type='flow', got {self.flow_shift} with "
                f"{self.prediction_type!r}; leave it out"
            )
        terminal_snr = self.snr(torch.tensor([self.num_train_timesteps - 1])).item()
        if terminal_snr >= SMALLEST_TERMINAL_SNR:
            return
        schedule = "rescale_zero_terminal_snr=True" if self.rescale_zero_terminal_snr else self.beta_schedule
        if self.prediction_type == "epsilon":
            raise ValueError(
                f"prediction_type='epsilon' expected a last step with some signal left, got SNR "
                f"{terminal_snr:.1e} from {schedule}: x_0 = (x_T - sigma_T*eps) / alpha_T then divides by "
                "zero at the first sampling step; use prediction_type='v_prediction', or the "
                "'scaled_linear' schedule without rescaling"
            )
        if self.min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma expected a last step with some signal left, got SNR {terminal_snr:.1e} "
                f"from {schedule}: its weight would be 0, so the step at which sampling begins would "
                "never be trained; leave min_snr_gamma out, or use the 'scaled_linear' schedule"
            )

    @property
    def is_flow(self) -> bool:
        """True for the continuous straight-path objective, False for the discrete variance-preserving ones."""
        return self.prediction_type == "flow"

    def sample_timesteps(
        self, n: int, generator: torch.Generator | None = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Draw (n,) timesteps from `generator` (on its own device), then move them to `device`.

        Uniform over the discrete steps (DDPM algorithm 1); for flow uniform on (0, 1] or logit-normal (SD3 eq. 19),
        then shifted (SD3 eq. 23).
        """
        drawn_on = generator.device if generator is not None else device
        if not self.is_flow:
            timesteps = torch.randint(self.num_train_timesteps, (n,), generator=generator, device=drawn_on)
        else:
            if self.timestep_sampling == "logit_normal":
                normal = torch.randn(n, generator=generator, device=drawn_on)
                sigmas = torch.sigmoid(self.logit_mean + self.logit_std * normal)
            else:
                # rand() is in [0, 1): turned over, so that pure noise (1) can occur and a clean input (0) cannot.
                sigmas = 1.0 - torch.rand(n, generator=generator, device=drawn_on)
            sigmas = self.flow_shift * sigmas / (1.0 + (self.flow_shift - 1.0) * sigmas)
            timesteps = sigmas * self.num_train_timesteps
        return timesteps.to(device) if device is not None else timesteps

    def alpha_sigma(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signal and noise amplitudes (alpha_t, sigma_t), each of the timesteps' shape, fp32.

        Discrete: alpha_t = sqrt(alphas_cumprod_t), sigma_t = sqrt(1 - alphas_cumprod_t) (DDPM eq. 4).
        Flow: alpha_t = 1 - sigma_t with sigma_t = t / num_train_timesteps (Lipman et al. eq. 20 with sigma_min = 0).

        Raises:
            TypeError: floating timesteps for a discrete objective or integers for flow.
        """
        if timesteps.is_floating_point() != self.is_flow:
            raise TypeError(
                f"timesteps expected {'floating' if self.is_flow else 'integer'} numbers for "
                f"{self.prediction_type}, got {timesteps.dtype}; draw them with sample_timesteps()"
            )
        if self.is_flow:
            sigmas = timesteps.float() / self.num_train_timesteps
            return 1.0 - sigmas, sigmas
        alphas_cumprod = _alphas_cumprod(self, timesteps.device)[timesteps]
        return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, of the timesteps' shape, fp32."""
        alpha, sigma = self.alpha_sigma(timesteps)
        return (alpha / sigma) ** 2

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t * x_0 + sigma_t * eps, fp32 (DDPM eq. 4; Liu et al. section 2.1 for flow).

        Raises:
            ValueError: noise or timesteps do not fit the latents.
        """
        _check_batch(latents, noise, timesteps)
        alpha, sigma = self.alpha_sigma(timesteps)
        return _per_sample(alpha) * latents.float() + _per_sample(sigma) * noise.float()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should return, fp32.

        epsilon: eps (DDPM eq. 14). v_prediction: alpha_t * eps - sigma_t * x_0 (Salimans & Ho, appendix D).
        flow: eps - x_0 = dx/dsigma (Liu et al. eq. 1 with time running from data to noise).
        """
        _check_batch(latents, noise, timesteps)
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "flow":
            return noise.float() - latents.float()
        alpha, sigma = self.alpha_sigma(timesteps)
        return _per_sample(alpha) * noise.float() - _per_sample(sigma) * latents.float()

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error in the space of the prediction, (N,) fp32.

        Hang et al. weight the error of x_0 by min(SNR, gamma). An error of the prediction is an error of x_0 times
        d = 1/SNR for epsilon and d = sigma_t^2 for v (= 1 / (SNR + 1)) and for flow, hence
        epsilon: min(SNR, gamma) / SNR; v_prediction: min(SNR, gamma) / (SNR + 1); flow: min(alpha^2, gamma * sigma^2).
        """
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape, dtype=torch.float32, device=timesteps.device)
        alpha, sigma = self.alpha_sigma(timesteps)
        # min(SNR, gamma) * sigma^2, written so that it stays finite at both ends of the path.
        weight = torch.minimum(alpha**2, self.min_snr_gamma * sigma**2)
        return weight / alpha**2 if self.prediction_type == "epsilon" else weight

    def loss(
        self, model_output: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Weighted squared error of each sample, averaged over its elements, (N,) fp32 (DDPM eq. 14 without weights).

        Raises:
            ValueError: the model's output, the noise or the timesteps do not fit the latents.
        """
        target = self.target(latents, noise, timesteps)
        if model_output.shape != target.shape:
            raise ValueError(
                f"model_output expected shape {tuple(target.shape)} (that of the latents), got "
                f"{tuple(model_output.shape)}; set the model's in_channels and out_channels to the "
                "latents' channels"
            )
        error = (model_output.float() - target).square().flatten(1).mean(dim=1)
        return self.weight(timesteps) * error

    def scheduler_config(self) -> SchedulerMixin:
        """The diffusers scheduler saved with a pipeline: it carries this objective, so any sampler can be made from it.

        DDIM for the discrete objectives, with clipping off (latents are not confined to [-1, 1]) and trailing spacing
        (sampling starts at the last trained step, Lin et al. table 2); FlowMatchEuler for flow.
        """
        if self.is_flow:
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps, shift=self.flow_shift)
        return DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_zero_terminal_snr,
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        )


def drop_labels(
    labels: torch.Tensor, null_class: int, p: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Replace each label by `null_class` with probability `p`, for classifier-free guidance (Ho & Salimans 2022,
    arXiv 2207.12598, algorithm 1).

    Args:
        labels: (N,) integers. null_class: the index that means "no class", by convention the last embedding.
        p: probability in [0, 1]. generator: drawn from on its own device; the result is on the labels' device.

    Raises:
        ValueError: p is not a probability.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"label dropout expected a probability in [0, 1], got {p}; 0.1 to 0.15 is usual")
    drawn_on = generator.device if generator is not None else labels.device
    drop = torch.rand(labels.shape, generator=generator, device=drawn_on).to(labels.device) < p
    return labels.masked_fill(drop, null_class)


@lru_cache(maxsize=32)
def _alphas_cumprod(objective: Objective, device: torch.device) -> torch.Tensor:
    """(num_train_timesteps,) products of 1 - beta, taken from the scheduler so that training and sampling agree."""
    return objective.scheduler_config().alphas_cumprod.to(device)


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _check_name(field: str, value: str, allowed: object) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{field} expected one of {', '.join(get_args(allowed))}, got {value!r}")


def _check_batch(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> None:
    if latents.ndim != 4 or noise.shape != latents.shape or timesteps.shape != latents.shape[:1]:
        raise ValueError(
            f"expected latents and noise (N, C, H, W) and timesteps (N,), got {tuple(latents.shape)}, "
            f"{tuple(noise.shape)} and {tuple(timesteps.shape)}"
        )
