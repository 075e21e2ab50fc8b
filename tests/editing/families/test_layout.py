"""What lies in a pipeline's folder, and which folders are refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editing.errors import UnsafePipeline, UnsupportedPipeline
from editing.families.layout import choose_default_layers, describe_pipeline, detect_family, select_files
from tests.families import TEXTS, write_text_parts
from tests.pipelines import LAYERS, LAYERS_1, LAYERS_2, MLP_WIDTH, MLP_WIDTH_2, WIDTH, WIDTH_2, Family, write_pipeline


@pytest.fixture
def sdxl_folder(folder_of: Callable[[Family, bool], Path]) -> Path:
    return folder_of("sdxl", False)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "pipeline")


class TestDescribePipeline:
    def test_description_has_the_encoder_and_every_file(self, folder: Path) -> None:
        description = describe_pipeline(folder)
        assert description.family == "sd1"
        (encoder,) = description.encoders
        assert (encoder.name, encoder.layers, encoder.width, encoder.mlp_width) == (
            "text_encoder",
            LAYERS,
            WIDTH,
            MLP_WIDTH,
        )
        assert {file.path for file in description.files} == {
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        }
        for file in description.files:
            content = (folder / file.path).read_bytes()
            assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())

    def test_digest_depends_on_the_files_only(self, folder: Path, copied: Path, tmp_path: Path) -> None:
        assert describe_pipeline(copied) == describe_pipeline(folder)
        assert describe_pipeline(write_pipeline(tmp_path / "other", seed=1)).digest != describe_pipeline(folder).digest
        with (copied / "vae" / "config.json").open("a") as file:
            file.write(" ")
        assert describe_pipeline(copied).digest != describe_pipeline(folder).digest

    def test_other_files_are_left_out(self, folder: Path, copied: Path) -> None:
        (copied / "README.md").write_text("about")
        (copied / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
        assert describe_pipeline(copied).digest == describe_pipeline(folder).digest

    @pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
    def test_pickles_are_refused(self, copied: Path, component: str) -> None:
        (weights,) = (copied / component).glob("*.safetensors")
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(UnsafePipeline, match=f"{component}/"):
            describe_pipeline(copied)

    def test_missing_weights_are_refused(self, copied: Path) -> None:
        (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(UnsupportedPipeline, match="vae/ has no"):
            describe_pipeline(copied)

    @pytest.mark.parametrize("component", ["text_encoder", "unet", "vae", "tokenizer", "scheduler"])
    def test_missing_component_is_refused(self, copied: Path, component: str) -> None:
        shutil.rmtree(copied / component)
        with pytest.raises(UnsupportedPipeline, match=component):
            describe_pipeline(copied)

    @pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"_class_name": "KolorsPipeline"}'])
    def test_other_folder_is_refused(self, copied: Path, content: str) -> None:
        (copied / "model_index.json").write_text(content, encoding="latin-1")
        with pytest.raises(UnsupportedPipeline):
            describe_pipeline(copied)

    def test_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedPipeline, match="model_index.json"):
            describe_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("change", "family"),
    [({}, "sd1"), ({"hidden_size": 1024}, "sd2"), ({"hidden_act": "gelu"}, "sd2"), ({"hidden_size": 768}, "sd1")],
)
def test_family_is_found_by_structure(copied: Path, change: dict[str, Any], family: str) -> None:
    config = copied / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert detect_family(copied) == family


class TestSDXL:
    def test_sdxl_has_two_encoders(self, sdxl_folder: Path) -> None:
        description = describe_pipeline(sdxl_folder)
        assert description.family == "sdxl"
        assert [(e.name, e.layers, e.width, e.mlp_width) for e in description.encoders] == [
            ("text_encoder", LAYERS_1, WIDTH, MLP_WIDTH),
            ("text_encoder_2", LAYERS_2, WIDTH_2, MLP_WIDTH_2),
        ]
        assert "tokenizer_2/vocab.json" in {file.path for file in description.files}

    @pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer_2"])
    def test_sdxl_needs_both_encoders(self, sdxl_folder: Path, tmp_path: Path, component: str) -> None:
        copied = shutil.copytree(sdxl_folder, tmp_path / "half")
        shutil.rmtree(copied / component)
        with pytest.raises(UnsupportedPipeline, match=f"no {component}/"):
            describe_pipeline(copied)


@pytest.mark.parametrize(
    ("family", "encoder", "last", "layers"),
    [
        ("sd1", "text_encoder", 10, range(11)),
        ("sd2", "text_encoder", 21, range(22)),
        ("sdxl", "text_encoder", 10, range(8, 11)),
        ("sdxl", "text_encoder_2", 30, range(26, 31)),
        ("sdxl", "text_encoder_2", 2, range(3)),
    ],
)
def test_default_layers(family: str, encoder: str, last: int, layers: range) -> None:
    assert choose_default_layers(family, encoder, last=last) == tuple(layers)


def test_unknown_family_is_refused(copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(UnsupportedPipeline, match="KolorsPipeline"):
        detect_family(copied)


@pytest.mark.parametrize("name", TEXTS)
def test_every_family_is_described(name: str, tmp_path: Path) -> None:
    description = describe_pipeline(write_text_parts(tmp_path / name, name))
    assert description.family == name.partition("-")[0]
    assert [encoder.name for encoder in description.encoders] == list(TEXTS[name].encoders)
    for encoder in description.encoders:
        sizes = encoder.layers, encoder.width, encoder.mlp_width
        assert all(size > 1 for size in sizes) and len(set(sizes)) == 3


class TestRefusals:
    @pytest.fixture
    def z_image(self, tmp_path: Path) -> Path:
        return write_text_parts(tmp_path / "z_image", "z_image", shard_size="20KB")

    def test_unknown_text_encoder_is_refused_with_the_known_ones(self, z_image: Path) -> None:
        config = z_image / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mamba"}))
        with pytest.raises(UnsupportedPipeline, match="is a mamba, which cannot be edited: only gemma2, llama"):
            describe_pipeline(z_image)

    def test_tokenizer_without_a_chat_template_is_refused(self, z_image: Path) -> None:
        (z_image / "tokenizer" / "chat_template.jinja").unlink()
        with pytest.raises(UnsupportedPipeline, match="no chat template"):
            describe_pipeline(z_image)

    def test_missing_part_of_a_sharded_encoder_is_refused(self, z_image: Path) -> None:
        part = next((z_image / "text_encoder").glob("model-*.safetensors"))
        part.unlink()
        with pytest.raises(UnsupportedPipeline, match=f"text_encoder/ has no {part.name}"):
            describe_pipeline(z_image)

    def test_index_that_leaves_its_folder_is_refused(self, z_image: Path) -> None:
        index = z_image / "text_encoder" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))
        with pytest.raises(UnsupportedPipeline, match="outside"):
            describe_pipeline(z_image)

    def test_unknown_pipeline_is_refused_with_the_known_ones(self, z_image: Path) -> None:
        index = z_image / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KolorsPipeline"}))
        with pytest.raises(UnsupportedPipeline, match="KolorsPipeline cannot be edited: only AuraFlowPipeline"):
            describe_pipeline(z_image)


def test_a_repository_with_pickles_only_is_refused() -> None:
    with pytest.raises(UnsafePipeline, match="only as pickles") as caught:
        select_files(["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "v1-5.ckpt"])
    assert caught.value.pointer == "/source"


def test_paths_deeper_than_a_component_are_not_selected() -> None:
    assert select_files(["unet/config.json", "unet/deep/config.json", "a/../b.json"]) == ["unet/config.json"]
