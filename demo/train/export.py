"""Export: the trained parts as `demo/weights`, a pipeline in diffusers layout with everything that goes with it."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import editing
from demo.captions import caption_set
from demo.classify import Classifier
from demo.concepts import Concept
from demo.train.classifier import export as export_classifier
from demo.train.text_encoder import text_transformer
from demo.train.unet import noise_schedule

CAPTIONS = 2000
PREFIX = "text_model."


def export(
    folder: Path,
    *,
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
    classifier: Classifier,
) -> None:
    """Write `pipeline/` with its `second_moments.safetensors`, `classifier.safetensors` and `captions.txt`. The README
    beside them, which carries the attribution, is written by hand."""
    captions = caption_set(concepts, count=CAPTIONS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    export_classifier(classifier, folder / "classifier.safetensors")
    export_pipeline(folder / "pipeline", tokenizer=tokenizer, encoder=encoder, autoencoder=autoencoder, unet=unet)
    # Of the encoder as it was written, in float16. Beside model_index.json, where the service looks for the statistics
    # of a model that it registers.
    written = editing.load_pipeline(folder / "pipeline").encoder
    editing.estimate_second_moments(written, captions).save(folder / "pipeline" / "second_moments.safetensors")


def export_pipeline(
    folder: Path,
    *,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Save a StableDiffusionPipeline in float16, the text encoder's keys prefixed as every version of transformers
    reads them. It is loaded in float32: transformers loads in the dtype of a configuration, diffusers does not."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_vocabulary(tokenizer, folder / "tokenizer")
    weights = {
        PREFIX + key: value.contiguous()
        for key, value in text_transformer(encoder).state_dict().items()
        if "position_ids" not in key
    }
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    configuration = folder / "text_encoder" / "config.json"
    changed = json.loads(configuration.read_text(encoding="utf-8")) | {"dtype": "float32"}
    configuration.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` too, which older transformers read instead of `tokenizer.json`."""
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in learnt["merges"])
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n", encoding="utf-8")
