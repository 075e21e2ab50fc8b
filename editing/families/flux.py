"""FLUX.1: T5, which reads its padding, and the pooled output of CLIP."""

from editing.families.family import Family, clip, t5

FLUX = Family(
    "flux",
    "FluxPipeline",
    (clip(taps=()), t5("text_encoder_2", max_length=512, is_masked=False)),
    num_inference_steps=28,
    guidance_scale=3.5,
)
