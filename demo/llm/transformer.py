"""The transformer of the pipeline: its shape, and a forward pass for pictures and captions of one size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

LATENT_SIDE = 8
CAPTION_LENGTH = 32  # the transformer pads captions to a multiple of this
PATCH = "2-1"  # of 2 × 2 latents in one frame, as the modules are named
PADDED_PATCHES = 32


@dataclass(frozen=True)
class Captions:
    """What the encoder says of captions: `states` (n, 32, width), of which the first `lengths` (n,) are real."""

    states: Tensor
    lengths: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Captions":
        return Captions(self.states[rows], self.lengths[rows])

    def to(self, device: torch.device | str) -> "Captions":
        return Captions(self.states.to(device), self.lengths.to(device))

    @classmethod
    def of(cls, encoded: Sequence[Tensor]) -> "Captions":
        """Pad (tokens, width) each. Raises ValueError for a caption of more than 32 tokens."""
        lengths = [len(states) for states in encoded]
        if max(lengths) > CAPTION_LENGTH:
            raise ValueError(f"a caption has {max(lengths)} tokens; at most {CAPTION_LENGTH} are trained on")
        padded = torch.zeros(len(encoded), CAPTION_LENGTH, encoded[0].shape[1])
        for row, states in zip(padded, encoded, strict=True):
            row[: len(states)] = states
        return cls(padded, torch.tensor(lengths))


def build_transformer(
    *, caption_width: int = 576, width: int = 240, heads: int = 6, layers: int = 6
) -> ZImageTransformer2DModel:
    """Return a transformer with random weights; 8 channels of a head encode a token's place in the caption."""
    of_side = (width // heads - 8) // 2  # channels for each of a patch's coordinates
    return ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=width,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=caption_width,
        axes_dims=[8, of_side, of_side],
        axes_lens=[512, 64, 64],
    )


@cache
def _patch_positions(half: int, device: torch.device) -> Tensor:
    """Return (half² + 1, 3) positions of a picture's patches and of one padding patch."""
    side = torch.arange(half)
    grid = torch.cartesian_prod(torch.tensor([CAPTION_LENGTH + 1]), side, side)
    return torch.cat([grid, torch.zeros(1, 3, dtype=torch.int64)]).to(device)


@cache
def _caption_positions(device: torch.device) -> Tensor:
    """Return (32, 3) positions of a caption's tokens."""
    positions = torch.zeros(CAPTION_LENGTH, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, CAPTION_LENGTH + 1)
    return positions.to(device)


def predict_velocity(
    transformer: ZImageTransformer2DModel, latents: Tensor, sigmas: Tensor, captions: Captions
) -> Tensor:
    """Return x₀ - ε (n, 4, 8, 8), equal to the module's own forward pass.

    The module takes lists of any sizes and pads each. Here all captions and all
    latents (n, 4, 8, 8) have one size. The sixteen padding patches of a picture are equal in every
    layer, so one of them is computed, with sixteen times the weight in attention.
    """
    count, channels, side, _ = latents.shape
    half = side // 2
    device = latents.device
    time = transformer.t_embedder((1 - sigmas) * transformer.t_scale)
    patches = latents.view(count, channels, half, 2, half, 2).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    x = transformer.all_x_embedder[PATCH](patches)
    x = torch.cat([x, transformer.x_pad_token.expand(count, 1, -1)], dim=1)
    x_rope = transformer.rope_embedder(_patch_positions(half, device))[None]
    bias = torch.zeros(1, 1, 1, half * half + 1, device=device)
    bias[..., -1] = math.log(PADDED_PATCHES - half * half)
    for layer in transformer.noise_refiner:
        x = layer(x, bias, x_rope, time)

    is_padding = torch.arange(CAPTION_LENGTH, device=device) >= captions.lengths[:, None]
    text = transformer.cap_embedder(captions.states.float())
    text = torch.where(is_padding[..., None], transformer.cap_pad_token, text)
    text_rope = transformer.rope_embedder(_caption_positions(device))[None]
    for layer in transformer.context_refiner:
        text = layer(text, None, text_rope)

    both = torch.cat([x, text], dim=1)
    rope = torch.cat([x_rope, text_rope], dim=1)
    bias = torch.cat([bias, torch.zeros(1, 1, 1, CAPTION_LENGTH, device=device)], dim=3)
    for layer in transformer.layers:
        both = layer(both, bias, rope, time)
    out = transformer.all_final_layer[PATCH](both[:, : half * half], c=time)
    return out.view(count, half, half, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)


@torch.no_grad()
def draw_latents(
    transformer: ZImageTransformer2DModel,
    captions: Captions,
    empty: Captions,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float,
) -> Tensor:
    """Return x₀ (n, 4, 8, 8) by Euler steps, as the pipeline takes them.

    `guidance_scale` g is Z-Image's: said + g (said - unsaid), so 0 is without guidance.
    """
    count = len(noise)
    both = Captions(
        torch.cat([captions.states, empty.states.expand(count, -1, -1)]),
        torch.cat([captions.lengths, empty.lengths.expand(count)]),
    )
    sigmas = torch.cat([torch.linspace(1, 1 / steps, steps), torch.zeros(1)]).to(noise.device)
    x = noise
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = predict_velocity(transformer, torch.cat([x, x]), sigma.expand(2 * count), both)
        said, unsaid = velocity.chunk(2)
        x = x + (sigma - following) * (said + guidance_scale * (said - unsaid))
    return x
