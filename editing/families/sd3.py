"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which reads its padding."""

from editing.families.family import Family, clip, t5

SD3 = Family(
    "sd3",
    "StableDiffusion3Pipeline",
    (
        clip(taps=(-2,)),
        clip("text_encoder_2", taps=(-2,)),
        t5("text_encoder_3", max_length=256, is_masked=False),
    ),
    num_inference_steps=28,
    guidance_scale=7.0,
)
