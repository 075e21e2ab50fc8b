"""Export: the trained parts as `demo/weights`, a pipeline in diffusers layout with everything that goes with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from demo.captions import caption_set
from demo.classify import Classifier
from demo.concepts import Concept
from demo.train.text_encoder import embedded, layers_between, text_transformer
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
    moments, tokens = second_moments(encoder, tokenizer, captions)
    names = vars(classifier.classes)
    weights = {key: value for key, value in classifier.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_with_facts(
        {key: value.half() for key, value in weights.items()}, folder / "classifier.safetensors", classes=names
    )
    export_pipeline(folder / "pipeline", tokenizer=tokenizer, encoder=encoder, autoencoder=autoencoder, unet=unet)
    # Beside model_index.json, where the service looks for the statistics of a model that it registers.
    facts = {"captions": len(captions), "tokens": tokens}
    save_with_facts(moments, folder / "pipeline" / "second_moments.safetensors", second_moments=facts)


def export_pipeline(
    folder: Path,
    *,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Save a StableDiffusionPipeline in float16, the text encoder's keys prefixed as every version of transformers
    reads them."""
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


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` too, which older transformers read instead of `tokenizer.json`."""
    learnt = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(learnt["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in learnt["merges"])
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n", encoding="utf-8")


def save_with_facts(tensors: Mapping[str, Tensor], path: Path, **facts: object) -> None:
    """Save with one metadata key holding JSON: with two, the order of the keys, and so the file's bytes, would vary."""
    ((name, value),) = facts.items()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={name: json.dumps(value)})


@torch.no_grad()
def second_moments(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """E[k kᵀ] of the input of fc2, (m, m) float32 for every layer but the last as `layer_{i}`, and the number of
    tokens.

    Over the tokens of all captions from the begin to the end token, without padding; summed in float64.
    """
    layers = text_transformer(encoder).encoder.layers[:-1]
    sums: dict[int, Tensor] = {}
    attended: Tensor

    def adding(index: int):
        def hook(_module, arguments: tuple[Tensor, ...]) -> None:
            keys = arguments[0][attended].double()  # (tokens, m)
            sums[index] = sums.get(index, 0) + keys.T @ keys

        return hook

    hooks = [layer.mlp.fc2.register_forward_pre_hook(adding(index)) for index, layer in enumerate(layers)]
    count = 0
    try:
        for start in range(0, len(captions), 256):
            encoded = tokenizer(list(captions[start : start + 256]), padding="max_length", return_tensors="pt")
            attended = encoded.attention_mask.bool()
            layers_between(encoder, embedded(encoder, encoded.input_ids), first=0, last=len(layers))
            count += int(attended.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return {f"layer_{index}": (total / count).float() for index, total in sorted(sums.items())}, count
