import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from demo.train import autoencoder, export, unet
from demo.train.text_encoder import embedded, layers_between


def test_second_moments_are_the_mean_of_key_times_key(tokenizer, encoder) -> None:
    captions = ["a cat", "an emoji of a judge"]
    moments, tokens = export.second_moments(encoder, tokenizer, captions)
    assert list(moments) == [f"layer_{index}" for index in range(11)]

    keys: list[torch.Tensor] = []
    layer = encoder.encoder.layers[4]
    hook = layer.mlp.fc2.register_forward_pre_hook(lambda _, arguments: keys.append(arguments[0]))
    with torch.no_grad():
        for caption in captions:  # one by one and without padding: attention is causal, so nothing else is to be seen
            layers_between(
                encoder, embedded(encoder, tokenizer(caption, return_tensors="pt").input_ids), first=0, last=5
            )
    hook.remove()
    flat = torch.cat([part[0] for part in keys]).double()
    assert tokens == len(flat)
    assert torch.allclose(moments["layer_4"].double(), flat.T @ flat / len(flat), rtol=1e-4, atol=1e-7)


def test_the_pipeline_loads_and_its_keys_are_prefixed(tokenizer, encoder, tmp_path: Path) -> None:
    parts = {"autoencoder": autoencoder.build((8, 8, 8)), "unet": unet.build(widths=(16, 16), text_width=16)}
    weight = encoder.state_dict()["encoder.layers.3.mlp.fc2.weight"].clone()
    export.export_pipeline(tmp_path, tokenizer=tokenizer, encoder=encoder, **parts)

    stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") and value.dtype == torch.float16 for key, value in stored.items())
    loaded, problems = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert torch.equal(loaded.state_dict()["encoder.layers.3.mlp.fc2.weight"].half(), weight.half())

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a cat", num_inference_steps=2, output_type="pt").images
    assert tuple(pictures.shape) == (1, 3, 32, 32)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))


def test_facts_are_one_json_string(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    export.save_with_facts({"a": torch.zeros(2).t()}, path, facts={"b": 1})
    with safe_open(path, "pt") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items()} == {"facts": {"b": 1}}
    with pytest.raises(ValueError):
        export.save_with_facts({}, path, one=1, two=2)
