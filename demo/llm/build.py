"""Build the pipeline's folder: `python -m demo.llm.build FOLDER`, from the encoder's package and committed weights.

`ZImagePipeline.from_pretrained` loads it. Only the transformer was trained for it; the autoencoder is the emoji
model's.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from demo.concepts import WEIGHTS
from demo.llm.encoder import EncoderMissing, load_encoder

TRANSFORMER = WEIGHTS / "llm" / "transformer"


def load_autoencoder() -> AutoencoderKL:
    """Return the emoji model's autoencoder in float32, frozen, with the shift that `ZImagePipeline` adds: none."""
    autoencoder = AutoencoderKL.from_pretrained(WEIGHTS / "pipeline", subfolder="vae", torch_dtype=torch.float32)
    autoencoder.register_to_config(shift_factor=0.0)
    return autoencoder.eval().requires_grad_(False)


def assemble_pipeline(transformer: Path = TRANSFORMER) -> ZImagePipeline:
    """Return the pipeline in float32. Raises EncoderMissing, FileNotFoundError without the transformer's weights."""
    if not (transformer / "config.json").is_file():
        raise FileNotFoundError(
            f"{transformer} holds no transformer; restore it from git or run `python -m demo.llm.train`"
        )
    tokenizer, encoder = load_encoder()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=load_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.llm.build", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--transformer", type=Path, default=TRANSFORMER, help="folder of its weights (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        assemble_pipeline(given.transformer).save_pretrained(given.folder, safe_serialization=True)
    except (EncoderMissing, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
