"""UCE against the least-squares problem that it solves, and what must hold of any of its updates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from editing.edits import Balance, ConceptEdit, DestinationPrompt, Erasure, ReferenceImages
from editing.errors import InvalidEdit, InvalidPrompt, UnsupportedPipeline
from editing.families.layout import describe_pipeline
from editing.pipelines import EditablePipeline, load_pipeline
from editing.uce.projections import (
    ProjectionUpdate,
    apply_temporarily,
    compute_projection_update,
)
from editing.weights import export_generator
from tests.pipelines import LENGTH

TEMPLATES = ("a photo of {}", "{} in the sun")
EDITS = [
    ConceptEdit("cat", DestinationPrompt("old dog"), TEMPLATES),
    ConceptEdit("small boat", Erasure(), TEMPLATES),
    ConceptEdit("red hat", Erasure("art"), TEMPLATES),
    ConceptEdit("king", Balance({"tree": 3, "sea": 1}), TEMPLATES),
]
PAIRS = {  # a template's words before and after; the source, and each destination with its share
    "cat": {"old dog": 1.0},
    "small boat": {"": 1.0},
    "red hat": {"art": 1.0},
    "king": {"tree": 0.75, "sea": 0.25},
}
PRESERVE = ["the fox", "a big house"]
SETTINGS: dict[str, Any] = {"erase_scale": 0.7, "preserve_scale": 0.2, "regularization_weight": 3.0}


def letters(text: str) -> int:
    """Tokens of a text in the small pipelines, where each letter is one: also the position of the last, after BOS."""
    return len(text.replace(" ", ""))


def rows(pipeline: EditablePipeline) -> tuple[Tensor, Tensor]:
    """States of the sources and of their destinations, (t, d) float64 each, gathered one position after the other."""
    sources, destinations = [], []
    for source, wanted in PAIRS.items():
        for before, after in (("a photo of ", ""), ("", " in the sun")):
            told = pipeline.encode([f"{before}{source}{after}"]).states[0].double()
            others = {
                name: pipeline.encode([" ".join(f"{before}{name}{after}".split())]).states[0].double()
                for name in wanted
            }
            step = 0
            while max(letters(before + name) for name in (source, *wanted)) + step < LENGTH:
                sources.append(told[letters(before + source) + step])
                shares = [share * others[name][letters(before + name) + step] for name, share in wanted.items()]
                destinations.append(torch.stack(shares).sum(0))
                step += 1
    return torch.stack(sources), torch.stack(destinations)


@pytest.fixture
def update(pipeline: EditablePipeline) -> ProjectionUpdate:
    return compute_projection_update(pipeline, EDITS, preserve=PRESERVE, **SETTINGS)


class TestClosedForm:
    def test_update_solves_the_least_squares_of_the_paper(self, any_pipeline: EditablePipeline) -> None:
        """argmin Σ ‖W' c - W c*‖² + Σ ‖W' c_j - W c_j‖² + λ ‖W' - W‖², each weighted, by QR and without its inverse."""
        update = compute_projection_update(any_pipeline, EDITS, preserve=PRESERVE, **SETTINGS)
        sources, destinations = rows(any_pipeline)
        kept = any_pipeline.encode(PRESERVE).states.double().flatten(0, 1)
        d = kept.shape[1]
        scales = [SETTINGS[name] ** 0.5 for name in ("erase_scale", "preserve_scale", "regularization_weight")]
        read = torch.cat([s * r for s, r in zip(scales, (sources, kept, torch.eye(d).double()), strict=True)])
        wanted = torch.cat([s * r for s, r in zip(scales, (destinations, kept, torch.eye(d).double()), strict=True)])
        projections = any_pipeline.generator.text_projections
        assert len(projections) == 8  # two blocks with one and two attentions, and the middle one; keys and values
        assert set(update.relative_norms) == set(projections)
        for name, projection in projections.items():
            weight = projection.weight.double()
            expected = torch.linalg.lstsq(read, wanted @ weight.T, driver="gelsd").solution.T
            found = weight + update.to_dense(projection.weight)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
            norm = float((expected - weight).norm() / weight.norm())
            assert update.relative_norms[name] == pytest.approx(norm, rel=1e-4)
            assert norm > 0.01

    def test_relative_residuals_are_those_of_the_applied_weights(
        self, pipeline: EditablePipeline, update: ProjectionUpdate
    ) -> None:
        sources, destinations = rows(pipeline)
        counts = [sum(LENGTH - max(letters(b + n) for n in (s, *PAIRS[s])) for b in ("a photo of", "")) for s in PAIRS]
        projections = pipeline.generator.text_projections
        before = {name: projection.weight.double() for name, projection in projections.items()}
        with apply_temporarily(pipeline.generator, update):
            after = {name: projection.weight.double() for name, projection in projections.items()}
        for c, v, residual in zip(
            sources.split(counts), destinations.split(counts), update.relative_residuals, strict=True
        ):
            left = sum((c @ after[name].T - v @ before[name].T).square().sum() for name in before)
            asked = sum(((c - v) @ before[name].T).square().sum() for name in before)
            assert residual == pytest.approx(float((left / asked).sqrt()), rel=1e-4)
            assert 0 < residual < 0.9

    def test_preserved_prompts_change_less(self, pipeline: EditablePipeline) -> None:
        """What is read of a preserved prompt moves far less than without, the more it weighs."""
        states = pipeline.encode(["a photo of a cap"]).states[0].double()
        projection = next(iter(pipeline.generator.text_projections.values())).weight
        moved = []
        for preserve, scale in (([], 1.0), (["a photo of a cap"], 1.0), (["a photo of a cap"], 1e6)):
            update = compute_projection_update(pipeline, EDITS, preserve=preserve, preserve_scale=scale)
            moved.append(
                float((states @ update.to_dense(projection).T).norm() / (states @ projection.double().T).norm())
            )
        assert moved[0] > 0.02
        assert moved[1] < 0.6 * moved[0]
        assert moved[2] < 1e-3

    def test_settings_weigh_edits_against_the_rest(self, pipeline: EditablePipeline) -> None:
        def norms(**settings: Any) -> tuple[float, ...]:
            return tuple(compute_projection_update(pipeline, EDITS, **settings).relative_norms.values())

        plain = norms()
        assert all(one < other for one, other in zip(norms(regularization_weight=50.0), plain, strict=True))
        assert all(one < other for one, other in zip(norms(erase_scale=0.01), plain, strict=True))
        assert norms(erase_scale=10.0, regularization_weight=5.0) == pytest.approx(plain)  # only the ratio counts

    def test_no_edits_change_nothing(self, pipeline: EditablePipeline) -> None:
        update = compute_projection_update(pipeline, [], preserve=PRESERVE)
        assert update.relative_residuals == ()
        assert not update.change.any()


class TestDeterminism:
    def test_order_does_not_change_the_bits(self, pipeline: EditablePipeline, update: ProjectionUpdate) -> None:
        other = compute_projection_update(pipeline, EDITS[::-1], preserve=[*PRESERVE[::-1], PRESERVE[0]], **SETTINGS)
        assert torch.equal(other.change, update.change)
        assert other.relative_residuals == update.relative_residuals[::-1]

    def test_weights_are_restored_bit_for_bit(self, pipeline: EditablePipeline, update: ProjectionUpdate) -> None:
        before = {name: tensor.clone() for name, tensor in pipeline.generator.network.state_dict().items()}
        compute_projection_update(pipeline, EDITS)
        with pytest.raises(RuntimeError, match="on the way"), apply_temporarily(pipeline.generator, update):
            changed = {
                name
                for name, tensor in pipeline.generator.network.state_dict().items()
                if not tensor.equal(before[name])
            }
            raise RuntimeError("on the way")
        assert changed == {f"{name}.weight" for name in update.relative_norms}
        assert all(tensor.equal(before[name]) for name, tensor in pipeline.generator.network.state_dict().items())

    def test_progress_counts_edits(self, pipeline: EditablePipeline) -> None:
        seen: list[tuple[int, int]] = []
        compute_projection_update(pipeline, EDITS, progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "pointer"),
        [
            ({"regularization_weight": 0.0}, "/regularization_weight"),
            ({"regularization_weight": float("nan")}, "/regularization_weight"),
            ({"erase_scale": 0.0}, "/erase_scale"),
            ({"preserve_scale": -0.1}, "/preserve_scale"),
        ],
    )
    def test_invalid_argument_is_named(
        self, pipeline: EditablePipeline, settings: dict[str, Any], pointer: str
    ) -> None:
        with pytest.raises(InvalidEdit) as refused:
            compute_projection_update(pipeline, EDITS, **settings)
        assert refused.value.pointer == pointer

    def test_reference_images_are_refused(self, pipeline: EditablePipeline) -> None:
        edit = ConceptEdit("cat", ReferenceImages((Image.new("RGB", (8, 8)),)))
        with pytest.raises(InvalidEdit, match="no prompt") as refused:
            compute_projection_update(pipeline, [EDITS[0], edit])
        assert refused.value.pointer == "/edits/1/destination"

    def test_truncated_source_is_refused(self, pipeline: EditablePipeline) -> None:
        edit = ConceptEdit("cat", DestinationPrompt("dog"), ("{}", "x" * LENGTH + " {}"))
        with pytest.raises(InvalidPrompt) as refused:
            compute_projection_update(pipeline, [EDITS[0], edit])
        assert refused.value.pointer == "/edits/1/templates/1"

    def test_invalid_preserved_prompt_is_named(self, pipeline: EditablePipeline) -> None:
        with pytest.raises(InvalidPrompt) as refused:
            compute_projection_update(pipeline, EDITS, preserve=["fine", "nul \0"])
        assert refused.value.pointer == "/preserve/1"


class TestExport:
    @pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
    def base(self, request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> EditablePipeline:
        copied = shutil.copytree(folder, tmp_path / "base")
        path = copied / "unet" / "diffusion_pytorch_model.safetensors"
        stored = {key: tensor.to(request.param) for key, tensor in load_file(path).items()}
        save_file(stored, path, metadata={"format": "pt", "made by": "another"})
        return load_pipeline(copied)

    def test_only_the_projections_differ(self, base: EditablePipeline, tmp_path: Path) -> None:
        update = compute_projection_update(base, EDITS)
        assert base.folder
        config, weights = export_generator(base, update, tmp_path / "edited")
        original = base.folder / "unet" / weights.name
        before, after = load_file(original), load_file(weights)
        assert before.keys() == after.keys() and weights.stat().st_size == original.stat().st_size
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {f"{name}.weight" for name in update.relative_norms}
        for key in changed:
            assert after[key].dtype == before[key].dtype
            exact = before[key].double() + before[key].double() @ update.change
            assert torch.equal(after[key], exact.to(before[key].dtype))
        assert config.read_bytes() == (base.folder / "unet" / "config.json").read_bytes()
        again = export_generator(base, update, tmp_path / "again")
        assert [path.read_bytes() for path in again] == [config.read_bytes(), weights.read_bytes()]

    def test_diffusers_loads_the_exported_u_net(
        self, any_folder: Path, any_pipeline: EditablePipeline, tmp_path: Path
    ) -> None:
        update = compute_projection_update(any_pipeline, EDITS)
        copied = shutil.copytree(any_folder, tmp_path / "edited")
        export_generator(any_pipeline, update, copied)
        loaded = DiffusionPipeline.from_pretrained(copied).unet.state_dict()
        with apply_temporarily(any_pipeline.generator, update):
            for name, tensor in any_pipeline.generator.network.state_dict().items():
                torch.testing.assert_close(loaded[name], tensor)

    def test_sharded_weights_keep_their_files(self, folder: Path, tmp_path: Path) -> None:
        """A U-Net in several files is read, registered and edited file by file."""
        copied = shutil.copytree(folder, tmp_path / "base")
        whole = copied / "unet" / "diffusion_pytorch_model.safetensors"
        unet = UNet2DConditionModel.from_pretrained(copied / "unet")
        whole.unlink()
        unet.save_pretrained(copied / "unet", max_shard_size="200KB")
        assert not whole.exists()
        paths = {file.path for file in describe_pipeline(copied).files if file.path.startswith("unet/")}
        base = load_pipeline(copied)
        update = compute_projection_update(base, EDITS)
        written = export_generator(base, update, tmp_path / "edited")
        assert {f"unet/{path.name}" for path in written} == paths
        assert len(written) > 3
        index = json.loads((tmp_path / "edited" / "unet" / written[1].name).read_text())
        assert set(index["weight_map"].values()) == {path.name for path in written[2:]}
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / "edited" / "unet").state_dict()
        with apply_temporarily(base.generator, update):
            assert all(
                torch.equal(loaded[name], tensor) for name, tensor in base.generator.network.state_dict().items()
            )

    def test_export_needs_a_base_file(self, folder: Path, pipeline: EditablePipeline, tmp_path: Path) -> None:
        update = compute_projection_update(pipeline, EDITS)
        loose = load_pipeline(folder)
        loose.folder = None
        with pytest.raises(UnsupportedPipeline, match="no base file"):
            export_generator(loose, update, tmp_path)
        assert list(tmp_path.iterdir()) == []
