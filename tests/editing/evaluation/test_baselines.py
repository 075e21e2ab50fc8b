"""The baselines: each reaches for the destination, leaves nothing behind, and does the same twice."""

import pytest
import torch
from torch import Tensor

from editing.edits import Balance, ConceptEdit, DestinationPrompt, Erasure
from editing.errors import UnsupportedPipeline
from editing.evaluation.baselines import CrossAttention, FineTuning, SingleLayer
from editing.evaluation.method import Method
from editing.evaluation.methods import METHODS
from editing.pipelines import EditablePipeline
from editing.second_moments.moments import SecondMoments

EDITS = [
    ConceptEdit("cat", DestinationPrompt("old dog")),
    ConceptEdit("small boat", Erasure("art")),
    ConceptEdit("king", Balance({"tree": 1, "sea": 1})),
]
BARE = ConceptEdit("cat", DestinationPrompt("old dog"), ("{}",))  # of one template, so of one key
NAMES = ("uce", "refact", "finetune")


def weights(pipeline: EditablePipeline) -> dict[str, Tensor]:
    modules = {"unet": pipeline.generator.network, **{encoder.name: encoder.model for encoder in pipeline.encoders}}
    return {f"{name}/{key}": t.clone() for name, own in modules.items() for key, t in own.state_dict().items()}


def told(pipeline: EditablePipeline, prompt: str) -> Tensor:
    """What a cross-attention's values make of a prompt's end of text: all three methods change it."""
    attention = pipeline.generator.network.mid_block.attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        return attention.to_v(pipeline.encode([prompt]).states[0, pipeline.tokenizer.encode(prompt).text_end])


@pytest.mark.parametrize("name", [*NAMES[:-1], pytest.param("finetune", marks=pytest.mark.slow)])
class TestEveryBaseline:
    def test_pipeline_is_edited_and_restored_bit_for_bit(
        self, any_pipeline: EditablePipeline, any_moments: SecondMoments, name: str
    ) -> None:
        if name == "refact" and len(any_pipeline.encoders) > 1:
            with pytest.raises(UnsupportedPipeline), METHODS[name](any_pipeline, [BARE], any_moments, seed=0):
                pass
            return
        before, source, wanted = weights(any_pipeline), told(any_pipeline, "cat"), told(any_pipeline, "old dog")
        seen: list[tuple[int, int]] = []
        edited = METHODS[name](
            any_pipeline, [BARE], any_moments, seed=0, progress=lambda done, total: seen.append((done, total))
        )
        with pytest.raises(RuntimeError, match="while drawing"), edited:
            now = told(any_pipeline, "cat")
            assert (now - wanted).norm() < 0.7 * (source - wanted).norm()
            assert not any(p.requires_grad for encoder in any_pipeline.encoders for p in encoder.model.parameters())
            raise RuntimeError("while drawing")
        assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
        after = weights(any_pipeline)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not any(p.requires_grad for encoder in any_pipeline.encoders for p in encoder.model.parameters())

    def test_same_call_gives_the_same_bits(
        self, pipeline: EditablePipeline, second_moments: SecondMoments, name: str
    ) -> None:
        runs = []
        for _ in range(2):
            with METHODS[name](pipeline, EDITS, second_moments, seed=3):
                runs.append(weights(pipeline))
        assert all(torch.equal(one, runs[1][key]) for key, one in runs[0].items())


class TestWhatEachChanges:
    def changed(self, method: Method, pipeline: EditablePipeline, second_moments: SecondMoments) -> set[str]:
        before = weights(pipeline)
        with method(pipeline, EDITS, second_moments, seed=0):
            after = weights(pipeline)
        return {key for key in before if not torch.equal(before[key], after[key])}

    def test_uce_changes_cross_attention(self, pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
        changed = self.changed(CrossAttention(), pipeline, second_moments)
        assert len(changed) == 8
        assert all(".attn2.to_k." in key or ".attn2.to_v." in key for key in changed)

    def test_refact_changes_one_layer(self, pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
        (key,) = self.changed(SingleLayer(layer=1), pipeline, second_moments)
        assert key.endswith("layers.1.mlp.fc2.weight")

    def test_fine_tuning_changes_every_mlp(self, pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
        changed = self.changed(FineTuning(steps=3), pipeline, second_moments)
        assert all(".mlp.fc" in key for key in changed)
        assert len(changed) == 4 * pipeline.encoder.n_layers


def test_single_layer_update_has_rank_one_and_reaches_its_value(
    pipeline: EditablePipeline, second_moments: SecondMoments
) -> None:
    weight = pipeline.encoder.output_matrix(2).weight
    before = weight.double()
    with SingleLayer(layer=2)(pipeline, EDITS[:1], second_moments, seed=0):
        change = weight.double() - before
    spectrum = torch.linalg.svdvals(change)
    assert spectrum[1] < 1e-4 * spectrum[0]
    direction = torch.linalg.svd(change)[2][0]  # of C0⁻¹ k
    edit = EDITS[0]
    prompts = [pipeline.tokenizer.locate(template, edit.source) for template in edit.templates]
    keys = []
    with torch.no_grad():
        for prompt in prompts:
            states = pipeline.encoder.embed(pipeline.encoder.pad([prompt.ids]).ids)
            _, read = pipeline.encoder.attend(2, pipeline.encoder.run_layers(states, start=0, stop=2))
            keys.append(read[0, prompt.last_subject_index])
    expected = torch.linalg.solve(second_moments.moments[2].double(), torch.stack(keys).double().mean(0))
    cosine = torch.nn.functional.cosine_similarity(direction, expected, dim=0).abs()
    assert cosine > 1 - 1e-4


def test_seed_of_fine_tuning_chooses_the_prompts(pipeline: EditablePipeline, second_moments: SecondMoments) -> None:
    seen = []
    for seed in (0, 1):
        with FineTuning(steps=5, batch=2)(pipeline, EDITS, second_moments, seed=seed):
            seen.append(weights(pipeline))
    assert any(not torch.equal(one, seen[1][key]) for key, one in seen[0].items())
