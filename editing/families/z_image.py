"""Z-Image: Qwen3 or any other decoder, with its chat template, read before the last block at the prompt's tokens."""

from editing.families.family import Family, chat, decoder

Z_IMAGE = Family(
    "z_image",
    "ZImagePipeline",
    # The generator does not read the padding, so prompts need none of inference's 512 tokens.
    (decoder(chat(enable_thinking=True), taps=(-2,), pads_to_longest=True),),
    num_inference_steps=50,
    guidance_scale=5.0,
)
