"""Transformers that are trained by flow matching: x_t = (1-σ) x_0 + σ ε, and the prediction is ε - x_0.

Times are in the unit of the schedulers, t = 1000 σ. Each family converts them to its network's unit.

Shapes: b latents; c, h, w their channels, height and width; n image tokens, of 2 by 2 latents each.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from editing.errors import UnsupportedPipeline
from editing.generators.diffusion import check_timesteps
from editing.generators.generator import NoisedLatents
from editing.generators.transformer import Transformer

SCHEDULERS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler)
}


def build_flow_scheduler(config: dict[str, Any]) -> Any:
    """Return the scheduler of a configuration. Raises `UnsupportedPipeline` if it is none for flow matching."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UnsupportedPipeline(f"a {name} cannot be used for flow matching: only {' or '.join(SCHEDULERS)}")
    check_timesteps(config)
    try:
        scheduler = SCHEDULERS[name].from_config(config)
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedPipeline(f"scheduler/scheduler_config.json cannot be used: {error}") from error
    if isinstance(scheduler, DPMSolverMultistepScheduler) and not (
        scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas
    ):
        raise UnsupportedPipeline("the scheduler is not set to flow prediction with flow sigmas")
    return scheduler


class FlowTransformer(Transformer):
    """A transformer that predicts ε - x_0."""

    passes_sigmas: ClassVar[bool] = True
    """Whether the pipeline gives the scheduler σ = 1 … 1/steps, or leaves them to it."""

    def add_noise(self, latents: Tensor, *, generator: torch.Generator) -> NoisedLatents:
        """Return x_t = (1-σ) x_0 + σ ε with t and ε - x_0. σ is uniform on (0, 1] before the scheduler's shift."""
        sigmas = self.shift_sigmas(1 - torch.rand(len(latents), generator=generator)).to(latents.device)  # (b,)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        share = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noise
        return NoisedLatents(noisy, sigmas * self.scheduler.config.num_train_timesteps, noise - latents)

    def shift_sigmas(self, sigmas: Tensor) -> Tensor:
        """Shift σ (b,) as the scheduler does: towards noise, and more so for large pictures if it is dynamic."""
        config = self.scheduler.config
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) and config.use_dynamic_shifting:
            return self.scheduler.time_shift(self.compute_mu(), 1.0, sigmas)
        shift = config.get("flow_shift") or config.shift
        shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
        return shifted

    def compute_mu(self, num_inference_steps: int = 50) -> float:  # noqa: ARG002  # FLUX.2's depends on it
        """Return the logarithm of a dynamic shift: linear in the number of image tokens."""
        config = self.scheduler.config
        base = config.get("base_image_seq_len", 256)
        slope = (config.max_shift - config.base_shift) / (config.get("max_image_seq_len", 4096) - base)
        return float(config.base_shift + slope * (self.count_tokens() - base))

    def count_tokens(self) -> int:
        """Return the number n of image tokens that a dynamic shift depends on."""
        _, height, width = self.latent_shape
        return (height // 2) * (width // 2)

    def start_scheduler(self, num_inference_steps: int) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        options: dict[str, Any] = {}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self.compute_mu(num_inference_steps)
        if self.passes_sigmas and not scheduler.config.get("use_flow_sigmas"):
            options["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        else:
            options["num_inference_steps"] = num_inference_steps
        scheduler.set_timesteps(**options, device=self.device)
        return scheduler


def pack(latents: Tensor) -> Tensor:
    """Pack latents (b, c, h, w) into tokens (b, n, 4c): the channels of 2 by 2 latents side by side."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, *, height: int, width: int) -> Tensor:
    """Unpack tokens (b, n, 4c) into latents (b, c, h, w)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)
