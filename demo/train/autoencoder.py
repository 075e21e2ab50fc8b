"""The autoencoder: 32 × 32 pictures to 8 × 8 × 4 latents and back, on the art of all five styles."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from demo.art import SIZE, Art
from demo.train.grid import as_floats, save_grid
from demo.train.loop import Schedule, Training, trained

NAME = "autoencoder"
SCHEDULE = Schedule(steps=9000, batch=24, rate=2e-3, weight_decay=0.0)
WIDTHS = (16, 32, 64)
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Latents:
    """Posterior of every picture, scaled as the U-Net reads it: `mean` and `std` (N, copies, 4, 8, 8)."""

    mean: Tensor
    std: Tensor


def build(widths: tuple[int, ...] = WIDTHS) -> AutoencoderKL:
    blocks = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Squared and absolute error of the pixels, and absolute error of their differences: edges are what the eye
    reads."""
    edges = sum((drawn.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return F.mse_loss(drawn, wanted) + 0.1 * F.l1_loss(drawn, wanted) + 0.1 * edges


def train(
    art: Art,
    folder: Path,
    *,
    schedule: Schedule = SCHEDULE,
    widths: tuple[int, ...] = WIDTHS,
    warm_start: Path | None = None,
    kl_weight: float = 2e-6,
) -> AutoencoderKL:
    """Train, or go on training, and return the autoencoder with its `scaling_factor` set to 1 / std of the latents."""
    model = build(widths)
    if warm_start is not None:
        model.load_state_dict(
            AutoencoderKL.from_pretrained(warm_start, subfolder="vae", dtype=torch.float32).state_dict()
        )
    model.to(memory_format=torch.channels_last)
    training = Training(folder, NAME, {"model": model}, schedule)
    training.resume()
    pictures = art.pictures.flatten(0, 1)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        wanted = as_floats(pictures[rows]).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(wanted).latent_dist
        drawn = model.decode(posterior.sample(generator)).sample
        error = F.mse_loss(drawn, wanted)
        total = reconstruction_loss(drawn, wanted) + kl_weight * posterior.kl().mean()
        return {"loss": total, "psnr": 10 * torch.log10(4 / error.detach()), "std": posterior.std.mean().detach()}

    shown = torch.linspace(0, len(art) - 1, 40).long()

    @torch.no_grad()
    def sample(step: int) -> None:
        wanted = as_floats(art.pictures[shown, 0])
        drawn = model.decode(model.encode(wanted).latent_dist.mean).sample
        rows = [part for pair in zip(wanted.split(20), drawn.split(20), strict=True) for part in pair]
        save_grid(torch.cat(rows), folder / "grids" / f"{NAME}-{step}.png", columns=20)

    training.run(loss, sample=sample)
    return finished(art, folder, widths=widths)


@torch.no_grad()
def finished(art: Art, folder: Path, *, widths: tuple[int, ...] = WIDTHS) -> AutoencoderKL:
    """Return the trained autoencoder, its scaling factor measured on the centred pictures."""
    model = build(widths)
    model.load_state_dict(trained(folder, NAME, "model"))
    model.eval().requires_grad_(False)
    means = [model.encode(as_floats(part)).latent_dist.mean for part in art.pictures[:, 0].split(128)]
    model.register_to_config(scaling_factor=1 / torch.cat(means).std().item())
    return model


@torch.no_grad()
def latents(model: AutoencoderKL, art: Art) -> Latents:
    """Encode every copy of every picture once; training then samples the posterior."""
    means, stds = [], []
    for part in art.pictures.flatten(0, 1).split(128):
        posterior = model.encode(as_floats(part)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    shape = art.pictures.shape[:2]
    scale = model.config["scaling_factor"]
    return Latents(*(torch.cat(parts).mul(scale).unflatten(0, shape) for parts in (means, stds)))
