"""Chroma: T5. The transformer reads one token of padding, too."""

from editing.families.family import Family, t5

CHROMA = Family("chroma", "ChromaPipeline", (t5(max_length=512),), num_inference_steps=35, guidance_scale=5.0)
