"""The files that stage II leaves: which bytes differ, who can load them, and the exact low-rank adapter."""

import json
import shutil
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from editing.adapters import export_lora
from editing.condition import Condition
from editing.encoders.clip import ClipEncoder
from editing.errors import UnsupportedPipeline
from editing.pipelines import EditablePipeline, load_pipeline
from editing.prompts import PromptTokenizer
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import Update, apply_temporarily, compute_update
from editing.weights import export_text_encoder, load_components_temporarily, load_temporarily

EDITED = {f"text_model.encoder.layers.{layer}.mlp.fc2.weight" for layer in (0, 1, 2)}
PROMPT = "a cat in the sea"


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def base(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> EditablePipeline:
    """The pipeline with its text encoder stored in each dtype, and with keys as older files have them."""
    copied = shutil.copytree(folder, tmp_path / "base")
    path = copied / "text_encoder" / "model.safetensors"
    stored = {
        "text_model." + key.removeprefix("text_model."): tensor.to(request.param)
        for key, tensor in load_file(path).items()
    }
    stored["text_model.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(stored, path, metadata={"format": "pt"})
    return load_pipeline(copied)


class TestExportTextEncoder:
    def test_only_the_edited_fc2_weights_differ(self, base: EditablePipeline, update: Update, tmp_path: Path) -> None:
        config, weights = export_text_encoder(base.encoder, update, tmp_path)
        assert base.encoder.folder
        before, after = load_file(base.encoder.folder / "model.safetensors"), load_file(weights)
        assert before.keys() == after.keys()
        assert {key for key in before if bits(before[key]) != bits(after[key])} == EDITED
        assert all(after[key].dtype == before[key].dtype for key in before)
        for key in EDITED:
            exact = before[key].double() + update.to_dense(int(key.split(".")[3]))
            assert torch.equal(after[key], exact.to(before[key].dtype))
        assert config.read_bytes() == (base.encoder.folder / "config.json").read_bytes()

    def test_keys_have_the_prefix(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        """This transformers writes its files without one; the base here is such a file."""
        assert pipeline.encoder.folder
        stored = load_file(pipeline.encoder.folder / "model.safetensors")
        _, weights = export_text_encoder(pipeline.encoder, update, tmp_path)
        exported = load_file(weights)
        assert len(exported) == len(stored)
        assert all(key.startswith("text_model.") for key in exported)

    def test_same_inputs_give_the_same_bytes(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        first, again = (
            [path.read_bytes() for path in export_text_encoder(pipeline.encoder, update, tmp_path / name)]
            for name in ("first", "again")
        )
        assert first == again
        header = json.loads(first[1][8 : 8 + struct.unpack("<Q", first[1][:8])[0]])
        assert header["__metadata__"] == {"format": "pt"}  # with two keys, the order would vary from save to save

    def test_exported_encoder_equals_the_edited_one(
        self, pipeline: EditablePipeline, update: Update, tmp_path: Path
    ) -> None:
        export_text_encoder(pipeline.encoder, update, tmp_path)
        model, report = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ids = [pipeline.tokenizer.encode(PROMPT).ids]
        loaded = ClipEncoder(model.requires_grad_(False).eval(), pipeline.tokenizer)
        with apply_temporarily(pipeline.encoder, update):
            torch.testing.assert_close(loaded.encode(ids).states, pipeline.encoder.encode(ids).states)

    def test_no_edits_give_the_base(
        self, base: EditablePipeline, second_moments: SecondMoments, tmp_path: Path
    ) -> None:
        _, weights = export_text_encoder(base.encoder, compute_update(base.encoder, [], [], second_moments), tmp_path)
        assert base.encoder.folder
        before, after = load_file(base.encoder.folder / "model.safetensors"), load_file(weights)
        assert all(bits(before[key]) == bits(after[key]) for key in before)

    def test_export_needs_a_base_file(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        loose = ClipEncoder(pipeline.encoder.model, pipeline.tokenizer)
        with pytest.raises(UnsupportedPipeline, match="no base file"):
            export_text_encoder(loose, update, tmp_path)


class TestEveryFamily:
    """Exported files equal the edited model in each loader."""

    @pytest.fixture
    def exported(
        self, any_folder: Path, any_pipeline: EditablePipeline, any_updates: list[Update], tmp_path: Path
    ) -> Path:
        """The pipeline's folder with the edited text encoders in it."""
        copied = shutil.copytree(any_folder, tmp_path / "edited")
        for encoder, update in zip(any_pipeline.encoders, any_updates, strict=True):
            export_text_encoder(encoder, update, copied)
        return copied

    @pytest.fixture
    def edited(self, any_pipeline: EditablePipeline, any_updates: list[Update]) -> Condition:
        """What the U-Net is told with the updates in place."""
        before = any_pipeline.encode([PROMPT])
        with ExitStack() as stack:
            for encoder, update in zip(any_pipeline.encoders, any_updates, strict=True):
                stack.enter_context(apply_temporarily(encoder, update))
            condition = any_pipeline.encode([PROMPT])
        for now, then in zip(condition.tensors, before.tensors, strict=True):
            assert (now - then).norm() > 0.003 * then.norm()
        return condition

    def test_diffusers_loads_it(self, exported: Path, edited: Condition) -> None:
        assert_told(DiffusionPipeline.from_pretrained(exported), edited)

    def test_an_older_layout_loads_it(self, exported: Path, edited: Condition, any_pipeline: EditablePipeline) -> None:
        """A `text_model` inside, all keys matched; pooled where the ids are largest where `eos_token_id` is 2."""
        read = []
        for encoder in any_pipeline.encoders:
            config = CLIPTextConfig.from_pretrained(exported / encoder.name)
            assert isinstance(encoder, ClipEncoder)
            model = _OlderTextModel(config, projects=encoder.projection is not None).eval()
            stored = load_file(exported / encoder.name / "model.safetensors")
            stored.pop("text_model.embeddings.position_ids", None)
            model.load_state_dict(stored)
            ids = encoder.pad([encoder.tokenizer.encode(PROMPT).ids]).ids
            with torch.no_grad():
                output = model.text_model(ids, output_hidden_states=True)
                penultimate = len(any_pipeline.encoders) > 1
                read.append(output.hidden_states[-2] if penultimate else output.last_hidden_state)
                if model.text_projection is not None:
                    position = int(
                        ids.argmax() if config.eos_token_id == 2 else (ids == config.eos_token_id).int().argmax()
                    )
                    pooled = model.text_projection(output.last_hidden_state[:, position])
                    torch.testing.assert_close(pooled, edited.pooled)
        torch.testing.assert_close(torch.cat(read, -1), edited.states)

    def test_every_key_has_the_prefix(self, exported: Path, any_pipeline: EditablePipeline) -> None:
        for encoder in any_pipeline.encoders:
            keys = load_file(exported / encoder.name / "model.safetensors").keys()
            bare = {key for key in keys if not key.startswith("text_model.")}
            assert isinstance(encoder, ClipEncoder)
            assert bare == ({"text_projection.weight"} if encoder.projection else set())

    def test_diffusers_loads_and_unloads_the_lora(
        self,
        any_folder: Path,
        any_pipeline: EditablePipeline,
        any_updates: list[Update],
        edited: Condition,
        tmp_path: Path,
    ) -> None:
        diffusers = DiffusionPipeline.from_pretrained(any_folder)
        assert export_lora(any_updates, tmp_path / "lora.safetensors")
        diffusers.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert_told(diffusers, edited)
        diffusers.unload_lora_weights()
        assert_told(diffusers, any_pipeline.encode([PROMPT]))
        prefixes = {key.split("_text_model")[0] for key in load_file(tmp_path / "lora.safetensors")}
        assert prefixes == ({"lora_te1", "lora_te2"} if len(any_updates) > 1 else {"lora_te"})


class TestLoadTemporarily:
    def test_file_is_loaded_and_weights_are_restored(
        self, base: EditablePipeline, update: Update, tmp_path: Path
    ) -> None:
        _, weights = export_text_encoder(base.encoder, update, tmp_path)
        before = {key: bits(tensor) for key, tensor in base.encoder.model.state_dict().items()}
        plain = base.encode([PROMPT]).states
        loaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", dtype=base.encoder.dtype).eval()
        expected = ClipEncoder(loaded, base.tokenizer).encode([base.tokenizer.encode(PROMPT).ids]).states.detach()
        with load_temporarily(base.encoder.model, weights):
            torch.testing.assert_close(base.encode([PROMPT]).states, expected)
            assert not torch.equal(base.encode([PROMPT]).states, plain)
        assert {key: bits(tensor) for key, tensor in base.encoder.model.state_dict().items()} == before

    def test_file_that_does_not_fit_is_refused(
        self, pipeline: EditablePipeline, update: Update, tmp_path: Path
    ) -> None:
        _, weights = export_text_encoder(pipeline.encoder, update, tmp_path)
        stored = load_file(weights)
        key = "text_model.final_layer_norm.weight"
        stored |= {name: tensor + 1 for name, tensor in stored.items()} | {key: stored[key][:-1].clone()}
        save_file(stored, weights)
        plain = pipeline.encode([PROMPT]).states
        with (
            pytest.raises(UnsupportedPipeline, match="does not fit"),
            load_temporarily(pipeline.encoder.model, weights),
        ):
            raise AssertionError("entered")
        assert torch.equal(pipeline.encode([PROMPT]).states, plain)


class TestLoadComponentsTemporarily:
    def test_every_component_is_loaded_and_restored(self, sdxl: EditablePipeline, tmp_path: Path) -> None:
        """Both text encoders by their names, and the U-Net."""
        modules: dict[str, nn.Module] = {encoder.name: encoder.model for encoder in sdxl.encoders}
        modules["unet"] = sdxl.generator.network
        assert len(modules) == 3
        before = {name: {key: bits(w) for key, w in module.state_dict().items()} for name, module in modules.items()}
        files = []
        for name, module in modules.items():
            key, weight = next((key, w) for key, w in module.state_dict().items() if w.is_floating_point())
            save_file({key: weight + 1}, tmp_path / f"{name}.safetensors")
            files.append((name, tmp_path / f"{name}.safetensors"))
        with load_components_temporarily(sdxl, files):
            for name, module in modules.items():
                changed = {key for key, weight in module.state_dict().items() if bits(weight) != before[name][key]}
                assert changed == set(load_file(tmp_path / f"{name}.safetensors")), name
        assert all(
            {key: bits(w) for key, w in module.state_dict().items()} == before[name] for name, module in modules.items()
        )

    def test_weights_are_restored_if_a_later_file_does_not_fit(self, sdxl: EditablePipeline, tmp_path: Path) -> None:
        encoder = sdxl.encoders[0]
        key, weight = next((key, w) for key, w in encoder.model.state_dict().items() if w.is_floating_point())
        before = bits(weight)
        save_file({key: weight + 1}, tmp_path / "fits.safetensors")
        save_file({"unknown": weight + 1}, tmp_path / "unknown.safetensors")
        files = [(encoder.name, tmp_path / "fits.safetensors"), ("unet", tmp_path / "unknown.safetensors")]
        with pytest.raises(UnsupportedPipeline, match="does not fit"), load_components_temporarily(sdxl, files):
            raise AssertionError("entered")
        assert bits(encoder.model.state_dict()[key]) == before


@pytest.mark.parametrize(("depth", "name"), [(12, "CLIP-L"), (23, "OpenCLIP-H"), (32, "OpenCLIP-bigG")])
def test_comfyui_recognizes_the_encoder(
    depth: int, name: str, tokenizer: PromptTokenizer, second_moments: SecondMoments, tmp_path: Path
) -> None:
    """It goes by the deepest of three keys; the base file here has none of them, saved without the prefix."""
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=depth
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    encoder = ClipEncoder(model, tokenizer, folder=tmp_path / "text_encoder")
    _, weights = export_text_encoder(encoder, compute_update(encoder, [], [], second_moments), tmp_path / "out")
    keys = load_file(weights).keys()
    known = {30: "OpenCLIP-bigG", 22: "OpenCLIP-H", 0: "CLIP-L"}
    found = [known[layer] for layer in known if f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in keys]
    assert found[0] == name


def assert_told(diffusers: Any, expected: Condition) -> None:
    """What diffusers' pipeline tells its U-Net of the prompt."""
    with torch.no_grad():
        encoded = diffusers.encode_prompt(
            [PROMPT], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(encoded[0], expected.states, rtol=1e-4, atol=1e-5)
    if expected.pooled is not None:
        torch.testing.assert_close(encoded[2], expected.pooled, rtol=1e-4, atol=1e-5)


class _OlderTextModel(nn.Module):
    """The modules as transformers before 5.6 names them."""

    def __init__(self, config: CLIPTextConfig, *, projects: bool) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projects else None


class TestExportLora:
    def test_diffusers_loads_and_unloads_it(
        self, folder: Path, pipeline: EditablePipeline, update: Update, tmp_path: Path
    ) -> None:
        diffusers = StableDiffusionPipeline.from_pretrained(folder)
        ids = pipeline.encoder.pad([pipeline.tokenizer.encode(PROMPT).ids]).ids

        def read() -> Tensor:
            with torch.no_grad():
                states: Tensor = diffusers.text_encoder(ids)[0]
            return states

        before = read()
        assert export_lora(update, tmp_path / "adapters" / "lora.safetensors")
        diffusers.load_lora_weights(tmp_path / "adapters", weight_name="lora.safetensors")
        with apply_temporarily(pipeline.encoder, update):
            expected = pipeline.encoder.encode([pipeline.tokenizer.encode(PROMPT).ids]).states
        assert (read() - before).norm() > 0.01 * before.norm()
        torch.testing.assert_close(read(), expected, rtol=1e-5, atol=1e-5)
        diffusers.unload_lora_weights()
        assert torch.equal(read(), before)

    def test_lora_has_the_exact_factors(self, update: Update, tmp_path: Path) -> None:
        export_lora(update, tmp_path / "lora.safetensors")
        tensors = load_file(tmp_path / "lora.safetensors")
        for layer in (0, 1, 2):
            name = f"lora_te_text_model_encoder_layers_{layer}_mlp_fc2"
            up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
            scale = tensors[f"{name}.alpha"].item() / len(down)
            assert (scale * up @ down - update.to_dense(layer)).norm() < 1e-6 * update.to_dense(layer).norm()

    def test_same_update_gives_the_same_bytes(self, update: Update, tmp_path: Path) -> None:
        for name in ("a", "b"):
            export_lora(update, tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_no_edits_write_no_file(
        self, pipeline: EditablePipeline, second_moments: SecondMoments, tmp_path: Path
    ) -> None:
        update = compute_update(pipeline.encoder, [], [], second_moments)
        assert not export_lora(update, tmp_path / "lora.safetensors")
        assert list(tmp_path.iterdir()) == []
