"""Unpack: the committed weights as checkpoints of step 0, so that one stage can be trained on without the others."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from demo.classify import load_classifier
from demo.train import autoencoder, classifier, text_encoder, tokenizer, unet
from demo.train.loop import Schedule, Training


def unpack(weights: Path, folder: Path) -> None:
    """Write a checkpoint of every stage into `folder`. Raises FileExistsError where it holds checkpoints already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds checkpoints already; remove it or name another folder with --work")
    pipeline, single = weights / "pipeline", {"dtype": torch.float32}
    encoder = CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", **single)
    drawing = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", **single)
    parts: dict[str, nn.Module] = {
        autoencoder.NAME: AutoencoderKL.from_pretrained(pipeline, subfolder="vae", **single),
        text_encoder.MEANING: encoder,
        text_encoder.EDITABLE: encoder,
        unet.NAME: drawing,
        classifier.NAME: load_classifier(weights / "classifier.safetensors").requires_grad_(True),
    }
    CLIPTokenizer.from_pretrained(pipeline, subfolder="tokenizer").save_pretrained(folder / tokenizer.NAME)
    for name, module in parts.items():
        kept = module.state_dict() if name == unet.NAME else {}
        Training(folder, name, {"model": module}, Schedule(steps=0, batch=1, rate=1.0), kept=kept).save()
