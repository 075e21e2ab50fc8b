"""PixArt-α and PixArt-Σ: T5, of prompts in lowercase."""

from editing.families.family import Family, t5

PIXART_ALPHA = Family(
    "pixart_alpha",
    "PixArtAlphaPipeline",
    (t5(max_length=120, lowercase=True),),
    guidance_scale=4.5,
)
PIXART_SIGMA = Family(
    "pixart_sigma",
    "PixArtSigmaPipeline",
    (t5(max_length=300, lowercase=True),),
    guidance_scale=4.5,
)
