"""The files that stage II leaves: which bytes differ, who can load them, and the exact low-rank adapter."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from editing.encoders import EditableEncoder
from editing.errors import UnsupportedPipeline
from editing.pipelines import EditablePipeline, load_pipeline
from editing.statistics import SecondMoments
from editing.update import Update, applied, compute_update
from editing.weights import export_lora, export_text_encoder

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
    def test_only_the_edited_memories_differ(self, base: EditablePipeline, update: Update, tmp_path: Path) -> None:
        config, weights = export_text_encoder(base.encoder, update, tmp_path)
        assert base.encoder.folder
        before, after = load_file(base.encoder.folder / "model.safetensors"), load_file(weights)
        assert before.keys() == after.keys()
        assert {key for key in before if bits(before[key]) != bits(after[key])} == EDITED
        assert all(after[key].dtype == before[key].dtype for key in before)
        for key in EDITED:
            exact = before[key].double() + update.dense(int(key.split(".")[3]))
            assert torch.equal(after[key], exact.to(before[key].dtype))
        assert config.read_bytes() == (base.encoder.folder / "config.json").read_bytes()

    def test_forces_the_prefix(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        """This transformers writes its files without one; the base here is such a file."""
        assert pipeline.encoder.folder
        stored = load_file(pipeline.encoder.folder / "model.safetensors")
        _, weights = export_text_encoder(pipeline.encoder, update, tmp_path)
        exported = load_file(weights)
        assert len(exported) == len(stored)
        assert all(key.startswith("text_model.") for key in exported)

    def test_same_inputs_same_bytes(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        first, again = (
            [path.read_bytes() for path in export_text_encoder(pipeline.encoder, update, tmp_path / name)]
            for name in ("first", "again")
        )
        assert first == again
        header = json.loads(first[1][8 : 8 + struct.unpack("<Q", first[1][:8])[0]])
        assert header["__metadata__"] == {"format": "pt"}  # with two keys, the order would vary from save to save

    def test_loads_as_what_was_applied(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        export_text_encoder(pipeline.encoder, update, tmp_path)
        model, report = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ids = [pipeline.tokenizer.encode(PROMPT).ids]
        loaded = EditableEncoder(model.requires_grad_(False).eval(), pipeline.tokenizer)
        with applied(pipeline.encoder, update):
            torch.testing.assert_close(loaded.encode(ids), pipeline.encoder.encode(ids))

    def test_no_edits_give_the_base(
        self, base: EditablePipeline, second_moments: SecondMoments, tmp_path: Path
    ) -> None:
        _, weights = export_text_encoder(base.encoder, compute_update(base.encoder, [], [], second_moments), tmp_path)
        assert base.encoder.folder
        before, after = load_file(base.encoder.folder / "model.safetensors"), load_file(weights)
        assert all(bits(before[key]) == bits(after[key]) for key in before)

    def test_needs_a_base_file(self, pipeline: EditablePipeline, update: Update, tmp_path: Path) -> None:
        loose = EditableEncoder(pipeline.encoder.model, pipeline.tokenizer)
        with pytest.raises(UnsupportedPipeline, match="no base file"):
            export_text_encoder(loose, update, tmp_path)


class TestExportLora:
    def test_diffusers_loads_and_unloads_it(
        self, folder: Path, pipeline: EditablePipeline, update: Update, tmp_path: Path
    ) -> None:
        diffusers = StableDiffusionPipeline.from_pretrained(folder)
        ids = pipeline.encoder.ids([pipeline.tokenizer.encode(PROMPT).ids])

        def read() -> Tensor:
            with torch.no_grad():
                states: Tensor = diffusers.text_encoder(ids)[0]
            return states

        before = read()
        assert export_lora(update, tmp_path / "adapters" / "lora.safetensors")
        diffusers.load_lora_weights(tmp_path / "adapters", weight_name="lora.safetensors")
        with applied(pipeline.encoder, update):
            expected = pipeline.encoder.encode([pipeline.tokenizer.encode(PROMPT).ids])
        assert (read() - before).norm() > 0.01 * before.norm()
        torch.testing.assert_close(read(), expected, rtol=1e-5, atol=1e-5)
        diffusers.unload_lora_weights()
        assert torch.equal(read(), before)

    def test_holds_the_exact_factors(self, update: Update, tmp_path: Path) -> None:
        export_lora(update, tmp_path / "lora.safetensors")
        tensors = load_file(tmp_path / "lora.safetensors")
        for layer in (0, 1, 2):
            name = f"lora_te_text_model_encoder_layers_{layer}_mlp_fc2"
            up, down = tensors[f"{name}.lora_up.weight"].double(), tensors[f"{name}.lora_down.weight"].double()
            scale = tensors[f"{name}.alpha"].item() / len(down)
            assert (scale * up @ down - update.dense(layer)).norm() < 1e-6 * update.dense(layer).norm()

    def test_same_update_same_bytes(self, update: Update, tmp_path: Path) -> None:
        for name in ("a", "b"):
            export_lora(update, tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_writes_none_for_no_edits(
        self, pipeline: EditablePipeline, second_moments: SecondMoments, tmp_path: Path
    ) -> None:
        update = compute_update(pipeline.encoder, [], [], second_moments)
        assert not export_lora(update, tmp_path / "lora.safetensors")
        assert list(tmp_path.iterdir()) == []
