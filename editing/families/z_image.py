"""Z-Image: Qwen3 or any other decoder, with its chat template, read before the last block at the prompt's tokens."""

from editing.families.family import Family, chat, decoder

Z_IMAGE = Family(
    "z_image",
    "ZImagePipeline",
    (decoder(chat(enable_thinking=True), taps=(-2,)),),
)
