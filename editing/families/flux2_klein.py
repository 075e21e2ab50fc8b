"""FLUX.2 klein: Qwen3 with its chat template, read after three of its blocks, padding included."""

from editing.families.family import Family, chat, decoder

FLUX2_KLEIN = Family(
    "flux2_klein",
    "Flux2KleinPipeline",
    (decoder(chat(enable_thinking=False), taps=(9, 18, 27)),),
    num_inference_steps=50,
    guidance_scale=4.0,
)
