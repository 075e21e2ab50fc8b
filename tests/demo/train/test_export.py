from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from demo.classify import Classes, Classifier
from demo.concepts import Concept
from demo.train import autoencoder, export, unet
from editing.second_moments.moments import SecondMoments


def test_second_moments_are_of_the_encoder_as_written(
    concepts: list[Concept],
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the mean of key times key written out, over the captions beside it and the weights in float16."""
    monkeypatch.setattr(export, "CAPTIONS", 5)
    parts = {"autoencoder": autoencoder.build((8, 8, 8)), "unet": unet.build(widths=(16, 16), text_width=16)}
    classifier = Classifier(Classes(("cat",), ("noto",), ("man",)), widths=(8, 8, 8, 8))
    export.export(tmp_path, concepts=concepts, tokenizer=tokenizer, encoder=encoder, classifier=classifier, **parts)

    keys: list[torch.Tensor] = []
    written = CLIPTextModel.from_pretrained(tmp_path / "pipeline" / "text_encoder", dtype=torch.float32)
    written.encoder.layers[4].mlp.fc2.register_forward_pre_hook(lambda _, arguments: keys.append(arguments[0]))
    captions = (tmp_path / "captions.txt").read_text(encoding="utf-8").splitlines()
    with torch.no_grad():
        for caption in captions:  # one by one and without padding
            written(tokenizer(caption, return_tensors="pt").input_ids)
    flat = torch.cat([part[0] for part in keys]).double()
    moments = SecondMoments.load(tmp_path / "pipeline" / "second_moments.safetensors")
    assert list(moments.moments) == list(range(11))
    assert (moments.captions, moments.tokens) == (5, len(flat))
    assert torch.allclose(moments.moments[4], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-7)


def test_the_pipeline_loads_and_its_keys_are_prefixed(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, tmp_path: Path
) -> None:
    parts = {"autoencoder": autoencoder.build((8, 8, 8)), "unet": unet.build(widths=(16, 16), text_width=16)}
    weight = encoder.state_dict()["encoder.layers.3.mlp.fc2.weight"].clone()
    export.export_pipeline(tmp_path, tokenizer=tokenizer, encoder=encoder, **parts)

    stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") and value.dtype == torch.float16 for key, value in stored.items())
    loaded, problems = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.state_dict()["encoder.layers.3.mlp.fc2.weight"].half(), weight.half())

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a cat", num_inference_steps=2, output_type="pt").images
    assert tuple(pictures.shape) == (1, 3, 32, 32)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
