"""Generators that are trained on a noise schedule with ᾱ_t, and predict ε or v.

Shapes: b latents; c, h, w their channels, height and width.
"""

from functools import cached_property
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from editing.errors import UnsupportedPipeline
from editing.generators.generator import Generator, NoisedLatents

PREDICTIONS = ("epsilon", "v_prediction")
SCHEDULERS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""The schedulers whose noise is that of a `DPMSolverMultistepScheduler` with the same settings."""
MAX_TRAIN_TIMESTEPS = 10_000
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_solver(config: dict[str, Any]) -> DPMSolverMultistepScheduler:
    """Return a fast deterministic solver with the noise schedule of a scheduler's configuration.

    It replaces the pipeline's own solver. Raises `UnsupportedPipeline` for other schedulers, for noise that is none,
    and for predictions other than ε and v.
    """
    check_timesteps(config)
    name = config.get("_class_name", "DDIMScheduler")
    if name not in SCHEDULERS:
        raise UnsupportedPipeline(f"scheduler/: the noise of a {name} is not known: only {', '.join(SCHEDULERS)}")
    betas = config.get("trained_betas")
    if betas is not None and len(betas) != config.get("num_train_timesteps", 1000):
        raise UnsupportedPipeline("scheduler/scheduler_config.json has not one trained_betas for each timestep")
    if name in _FEW_STEPS:  # their defaults differ from those of all other schedulers
        config = {**_STABLE_DIFFUSION_BETAS, **config}
    try:
        solver = DPMSolverMultistepScheduler.from_config(config)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedPipeline(f"scheduler/scheduler_config.json cannot be used: {error}") from error
    if not ((solver.betas >= 0) & (solver.betas <= 1)).all():  # also for NaN
        raise UnsupportedPipeline("scheduler/scheduler_config.json has betas outside of 0 to 1")
    predicted = solver.config.prediction_type
    if predicted not in PREDICTIONS:
        raise UnsupportedPipeline(f"the generator predicts {predicted}: only {' or '.join(PREDICTIONS)} can be edited")
    return solver


def check_timesteps(config: dict[str, Any]) -> None:
    """Raise `UnsupportedPipeline` for a scheduler with too many steps, before memory is taken for them."""
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
        raise UnsupportedPipeline(
            f"scheduler/scheduler_config.json has {steps!r} num_train_timesteps: it must be 1 to {MAX_TRAIN_TIMESTEPS}"
        )


class DiffusionGenerator(Generator):
    """A generator that predicts ε, or v = √ᾱ_t ε - √(1-ᾱ_t) x_0."""

    scheduler: DPMSolverMultistepScheduler

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t of the noise schedule, (timesteps,) float32."""
        return self.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def predicts_velocity(self) -> bool:
        """Whether the network predicts v rather than ε."""
        return bool(self.scheduler.config.prediction_type == "v_prediction")

    def add_noise(self, latents: Tensor, *, generator: torch.Generator) -> NoisedLatents:
        """Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε at uniform t, with t and ε or v."""
        timesteps = torch.randint(len(self.alphas_cumprod), (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        signal = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # ᾱ_t
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        target = noise
        if self.predicts_velocity:  # v (Salimans and Ho, 2022)
            target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        return NoisedLatents(noisy, timesteps, target)

    def start_scheduler(self, num_inference_steps: int) -> DPMSolverMultistepScheduler:
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler
