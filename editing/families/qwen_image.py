"""Qwen-Image: Qwen2.5-VL with an instruction, whose tokens the transformer does not receive."""

from editing.families.family import Family, PromptFormat, decoder

_DROPPED = 34

QWEN_IMAGE = Family(
    "qwen_image",
    "QwenImagePipeline",
    (
        decoder(
            PromptFormat(
                max_length=1024 + _DROPPED,
                prefix="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
                "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
                suffix="<|im_end|>\n<|im_start|>assistant\n",
            ),
            taps=("final",),
            pads_to_longest=True,
        ),
    ),
    dropped_tokens=_DROPPED,
    num_inference_steps=50,
    guidance_scale=4.0,
)
