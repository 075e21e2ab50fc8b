"""Lumina Image 2.0: Gemma 2 with a system prompt, read before the last block."""

from editing.families.family import Family, PromptFormat, decoder

LUMINA2 = Family(
    "lumina2",
    "Lumina2Pipeline",
    (
        decoder(
            PromptFormat(
                max_length=256,
                pads_right=True,
                prefix="You are an assistant designed to generate superior images with the superior degree of "
                "image-text alignment based on textual prompts or user prompts. <Prompt Start> ",
            ),
            taps=(-2,),
            negative=PromptFormat(max_length=256, pads_right=True),
        ),
    ),
    num_inference_steps=30,
    guidance_scale=4.0,
)
