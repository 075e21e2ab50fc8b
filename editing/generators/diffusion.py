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


def build_solver(config: dict[str, Any]) -> DPMSolverMultistepScheduler:
    """Return a fast deterministic solver with the noise schedule of a scheduler's configuration.

    It replaces the pipeline's own solver. Raises `UnsupportedPipeline` for predictions other than ε and v.
    """
    solver = DPMSolverMultistepScheduler.from_config(config)
    predicted = solver.config.prediction_type
    if predicted not in PREDICTIONS:
        raise UnsupportedPipeline(f"the generator predicts {predicted}: only {' or '.join(PREDICTIONS)} can be edited")
    return solver


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
