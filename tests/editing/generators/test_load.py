"""Which generators are loaded, and what is refused."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.families import registry
from editing.families.family import Family
from editing.generators.flux import Flux
from editing.generators.generator import Generator
from editing.generators.load import GENERATORS, load_generator
from tests.generators import FAMILIES, POOLED, WIDTH, TinyFamily, pixart


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Generator:
    return load_generator(folder, device=torch.device("cpu"), dtype=dtype, autoencoder_dtype=torch.float32)


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_every_family_has_a_generator_and_a_tiny_pipeline() -> None:
    assert set(GENERATORS) == set(registry.FAMILIES)
    transformers = {each.pipeline_class for each in registry.FAMILIES.values() if each.generator == "transformer"}
    assert {family.pipeline for family in FAMILIES.values()} == transformers


@pytest.mark.parametrize("family", [each for each in registry.FAMILIES.values() if each.generator == "transformer"])
def test_settings_of_sampling_are_the_defaults_of_diffusers(family: Family) -> None:
    parameters = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    scale = "true_cfg_scale" if family.name == "qwen_image" else "guidance_scale"
    defaults = parameters["num_inference_steps"].default, parameters[scale].default
    assert (family.num_inference_steps, family.guidance_scale) == defaults


def test_modules_take_no_gradients(tmp_path: Path) -> None:
    generator = load(FAMILIES["sd3"].write(tmp_path))
    for module in (generator.network, generator.autoencoder.model):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_may_be_narrower_than_predictions(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = family.write(tmp_path)
    exact, narrow = load(folder), load(folder, dtype)
    assert narrow.network.dtype == dtype
    noisy = torch.randn(1, *exact.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = family.draw_condition(seed=1)
    states = condition.states.requires_grad_()
    for each in (exact, narrow):
        if isinstance(each, Flux):
            each.embedded_guidance = 2.0  # the network takes 1000 times this, which bfloat16 must hold exactly
    one, other = (each.predict(noisy, torch.tensor([500.0]), condition) for each in (exact, narrow))
    assert other.dtype == torch.float32
    assert 0 < float((one - other).detach().norm()) < 0.1 * float(one.detach().norm())
    (gradient,) = torch.autograd.grad(other.square().sum(), states)
    assert gradient.dtype == torch.float32
    assert float(gradient.abs().max()) > 0


def test_large_pixart_alpha_gets_the_size_of_the_picture(tmp_path: Path) -> None:
    small = FAMILIES["pixart_alpha"]
    family = TinyFamily(small.pipeline, pixart(has_size=True), small.scheduler, small.vae, mask=small.mask)
    generator = load(family.write(tmp_path))
    noisy, condition = torch.ones(1, *generator.latent_shape), family.draw_condition(seed=1)
    with torch.no_grad():
        expected = generator.network(
            noisy,
            encoder_hidden_states=condition.states,
            encoder_attention_mask=condition.mask,
            timestep=torch.tensor([500]),
            added_cond_kwargs={"resolution": torch.tensor([[16.0, 16.0]]), "aspect_ratio": torch.tensor([[1.0]])},
        ).sample[:, :4]
        torch.testing.assert_close(generator.predict(noisy, torch.tensor([500]), condition), expected)


def test_pictures_are_1024_wide_if_the_folder_names_no_size(tmp_path: Path) -> None:
    folder = FAMILIES["qwen_image"].write(tmp_path)
    assert load(folder).image_size == (16, 16)
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["sample_size"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert load(folder).image_size == (1024, 1024)


def test_unknown_pipelines_are_refused_with_the_list_of_known_ones(tmp_path: Path) -> None:
    folder = FAMILIES["sd3"].write(tmp_path)
    change(folder / "model_index.json", _class_name="WanPipeline")
    with pytest.raises(UnsupportedPipeline, match="a WanPipeline cannot be edited: only AuraFlowPipeline, "):
        load(folder)


def test_transformers_of_another_family_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["sd3"].write(tmp_path)
    change(folder / "model_index.json", _class_name="AuraFlowPipeline")
    with pytest.raises(UnsupportedPipeline, match="has a SD3Transformer2DModel: this pipeline needs a AuraFlowT"):
        load(folder)


def test_unknown_autoencoders_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["sd3"].write(tmp_path)
    change(folder / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(UnsupportedPipeline, match="a VQModel cannot be used: only AutoencoderKL, "):
        load(folder)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = FAMILIES["sd3"].write(tmp_path)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UnsafePipeline, match="transformer/ has its weights only as pickles"):
        load(folder)


def test_sizes_of_the_tiny_pipelines_differ() -> None:
    assert len({WIDTH, POOLED, 16, 4}) == 4
