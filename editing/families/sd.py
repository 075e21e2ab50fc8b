"""Stable Diffusion 1.x, 2.x and XL: one or two CLIP text encoders and a U-Net."""

from editing.families.family import Family, clip

SD1 = Family("sd1", "StableDiffusionPipeline", (clip(),), generator="unet")
SD2 = Family("sd2", "StableDiffusionPipeline", (clip(),), generator="unet")
SDXL = Family(
    "sdxl",
    "StableDiffusionXLPipeline",
    # As published: layers 8 to 10 and 26 to 30.
    (clip(taps=(-2,), edited_layers=3), clip("text_encoder_2", taps=(-2,), edited_layers=5)),
    generator="unet",
)
