"""UCE on the transformers of every family: the text's input projection, in memory and in the exported files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

from editing.edits import Balance, ConceptEdit, DestinationPrompt, Erasure
from editing.pipelines import EditablePipeline, load_pipeline
from editing.uce.projections import ProjectionUpdate, apply_temporarily, compute_projection_update
from editing.weights import export_generator, load_components_temporarily
from tests.families import TEXTS
from tests.generators import write_whole_pipeline

TEMPLATES = ("a photo of a {}", "{}")
EDITS = [
    ConceptEdit("cat", DestinationPrompt("small boat"), templates=TEMPLATES),
    ConceptEdit("old tree", Erasure("house"), templates=TEMPLATES),
]
DESTINATIONS = ("small boat", "house")
PRESERVE = ("a photo of a dog", "the sea")
SETTINGS: dict[str, Any] = {"erase_scale": 2.0, "preserve_scale": 0.3, "regularization_weight": 0.7}
FAMILIES = sorted(set(TEXTS) - {"pixart_alpha", "z_image-llama", "sana"})  # these are read as others are
READS_PADDING = ("sd3", "flux", "flux2_klein")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_pipeline(tmp_path_factory.mktemp("whole") / request.param, request.param, shard_size="3KB")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> EditablePipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def update(pipeline: EditablePipeline) -> ProjectionUpdate:
    return compute_projection_update(pipeline, EDITS, preserve=PRESERVE, **SETTINGS)


def read_states(pipeline: EditablePipeline, prompt: str) -> list[Tensor]:
    """Return what the generator reads of a prompt, (s, d) float64 for each part that encoders give one after another.

    It is written for one prompt at a time and without origins: what is no token is dropped by hand.
    """
    with torch.no_grad():
        condition = pipeline.encode([prompt])
        (states,) = pipeline.generator.normalize_text(condition.states).double()
    if pipeline.family == "sd3":
        length = pipeline.encoder.tokenizer.max_length
        return [states[:length], states[length:]]
    if condition.mask is not None:
        states = states[condition.mask[0]]
    if pipeline.family == "auraflow":  # its padding is zeros
        states = states[: len(pipeline.encoder.tokenizer.encode(prompt).ids)]
    return [states]


def list_rows(pipeline: EditablePipeline, *, source: str, destination: str) -> tuple[Tensor, Tensor]:
    """Return the states of an edit's source and those that they are to become, one row for each."""
    readers = [encoder for encoder in pipeline.encoders if encoder.spec.taps]
    readers = [readers[0], readers[-1]] if pipeline.family == "sd3" else readers
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for template in TEMPLATES:
        parts = [read_states(pipeline, template.format(name)) for name in (source, destination)]
        for part, encoder in enumerate(readers):
            left = []  # the states from the last subject token on
            for states, name in zip((parts[0][part], parts[1][part]), (source, destination), strict=True):
                position = encoder.tokenizer.locate(template, name)
                if pipeline.family in READS_PADDING:
                    after = len(states) - position.last_subject_index
                else:
                    after = len(position.ids) - position.last_subject_index + (pipeline.family == "chroma")
                left.append(states[len(states) - after :])
            shortest = min(map(len, left))
            for own, states in zip(rows, left, strict=True):
                own.append(states[:shortest])
    return torch.cat(rows[0]), torch.cat(rows[1])


class TestClosedForm:
    def test_update_solves_the_least_squares_of_the_paper(
        self, pipeline: EditablePipeline, update: ProjectionUpdate
    ) -> None:
        """argmin Σ ‖W' c - W c*‖² + Σ ‖W' c_j - W c_j‖² + λ ‖W' - W‖², each weighted, by QR and without its inverse."""
        pairs = [
            list_rows(pipeline, source=edit.source, destination=name)
            for edit, name in zip(EDITS, DESTINATIONS, strict=True)
        ]
        sources, destinations = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        kept = torch.cat([part for prompt in PRESERVE for part in read_states(pipeline, prompt)])
        ((name, projection),) = pipeline.generator.text_projections.items()
        identity = torch.eye(kept.shape[1], dtype=torch.float64)
        scales = [SETTINGS[each] ** 0.5 for each in ("erase_scale", "preserve_scale", "regularization_weight")]
        read = torch.cat([s * r for s, r in zip(scales, (sources, kept, identity), strict=True)])
        wanted = torch.cat([s * r for s, r in zip(scales, (destinations, kept, identity), strict=True)])
        weight = projection.weight.double()
        expected = torch.linalg.lstsq(read, wanted @ weight.T, driver="gelsd").solution.T
        torch.testing.assert_close(weight + update.to_dense(projection.weight), expected, rtol=1e-5, atol=1e-6)
        assert set(update.relative_norms) == {name}
        assert update.relative_norms[name] > 0.01

    def test_network_reads_the_text_through_the_edited_projection(
        self, pipeline: EditablePipeline, update: ProjectionUpdate
    ) -> None:
        """What the projection gives inside the network is W' times the states that the update was computed from."""
        ((_, projection),) = pipeline.generator.text_projections.items()
        states = torch.cat(read_states(pipeline, "a photo of a cat"))
        expected = states @ (projection.weight.double() + update.to_dense(projection.weight)).T
        if projection.bias is not None:
            expected += projection.bias
        outputs: list[Tensor] = []
        hook = projection.register_forward_hook(lambda _, __, output: outputs.append(output.flatten(0, -2)))
        with torch.no_grad(), apply_temporarily(pipeline.generator, update):
            noisy = torch.zeros(1, *pipeline.generator.latent_shape)
            pipeline.generator.predict(noisy, torch.tensor([500]), pipeline.encode(["a photo of a cat"]))
        hook.remove()
        torch.testing.assert_close(outputs[0][: len(expected)].double(), expected, rtol=1e-4, atol=1e-4)

    def test_less_regularization_brings_the_source_closer(self, pipeline: EditablePipeline) -> None:
        residuals = [
            compute_projection_update(pipeline, EDITS[:1], regularization_weight=weight).relative_residuals[0]
            for weight in (1e4, 1.0, 1e-3)
        ]
        assert 1 > residuals[0] > residuals[1] > residuals[2] > 0

    def test_preserved_prompts_stay(self, pipeline: EditablePipeline) -> None:
        ((_, projection),) = pipeline.generator.text_projections.items()
        states = torch.cat(read_states(pipeline, PRESERVE[0]))
        moved = []
        for scale in (0.0, 1e6):
            update = compute_projection_update(pipeline, EDITS, preserve=PRESERVE[:1], preserve_scale=scale)
            change = states @ update.to_dense(projection.weight).T
            moved.append(float(change.norm() / (states @ projection.weight.double().T).norm()))
        assert moved[0] > 0.02
        assert moved[1] < 0.01 * moved[0]

    def test_balance_leads_to_the_mean_of_its_prompts(self, pipeline: EditablePipeline) -> None:
        balanced = ConceptEdit("cat", Balance({"dog": 1, "fox": 3}), templates=TEMPLATES)
        update = compute_projection_update(pipeline, [balanced])
        parts = [list_rows(pipeline, source="cat", destination=name) for name in ("dog", "fox")]
        sources = parts[0][0]
        wanted = 0.25 * parts[0][1] + 0.75 * parts[1][1]
        system = sources.T @ sources + 0.5 * torch.eye(sources.shape[1], dtype=torch.float64)
        expected = (wanted - sources).T @ sources @ torch.linalg.inv(system)
        torch.testing.assert_close(update.change, expected, rtol=1e-4, atol=1e-6)


class TestExport:
    def test_only_the_projection_differs(
        self, pipeline: EditablePipeline, update: ProjectionUpdate, folder: Path, tmp_path: Path
    ) -> None:
        written = export_generator(pipeline, update, tmp_path)
        base = folder / "transformer"
        assert {path.name for path in written} == {path.name for path in base.iterdir()}
        assert len(written) > 3  # several shards
        changed = [path.name for path in written if path.read_bytes() != (base / path.name).read_bytes()]
        index = json.loads((base / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
        (name,) = update.relative_norms
        assert changed == [index[f"{name}.weight"]]

    def test_diffusers_loads_the_edited_projection(
        self, pipeline: EditablePipeline, update: ProjectionUpdate, folder: Path, tmp_path: Path
    ) -> None:
        export_generator(pipeline, update, tmp_path)
        network = type(pipeline.generator.network).from_pretrained(tmp_path / "transformer")
        with apply_temporarily(pipeline.generator, update):
            for name, tensor in pipeline.generator.network.state_dict().items():
                assert torch.equal(network.state_dict()[name], tensor)

    def test_exported_shards_are_loaded_temporarily(
        self, pipeline: EditablePipeline, update: ProjectionUpdate, folder: Path, tmp_path: Path
    ) -> None:
        export_generator(pipeline, update, tmp_path)
        files = [("transformer", path) for path in (tmp_path / "transformer").glob("*.safetensors")]
        (projection,) = pipeline.generator.text_projections.values()
        before = projection.weight.clone()
        with apply_temporarily(pipeline.generator, update):
            expected = projection.weight.clone()
        with load_components_temporarily(pipeline, files):
            assert torch.equal(projection.weight, expected)
        assert torch.equal(projection.weight, before)


def test_whole_pipeline_with_the_exported_transformer_is_drawn_by_diffusers(tmp_path: Path) -> None:
    folder = write_whole_pipeline(tmp_path / "sd3", "sd3")
    pipeline = load_pipeline(folder)
    update = compute_projection_update(pipeline, EDITS, regularization_weight=0.01)
    export_generator(pipeline, update, folder)
    diffusers = DiffusionPipeline.from_pretrained(folder)
    diffusers.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    expected = diffusers(
        prompt="a photo of a cat",
        height=16,
        width=16,
        generator=Generator().manual_seed(1),
        output_type="latent",
        **options,
    ).images
    with apply_temporarily(pipeline.generator, update):
        drawn = pipeline.sample(["a photo of a cat"], generators=[Generator().manual_seed(1)], **options)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
