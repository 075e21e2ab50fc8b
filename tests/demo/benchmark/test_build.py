from pathlib import Path

import pytest
import torch

from demo.benchmark import SEEDS, build, file_of
from demo.benchmark.build import FREE_PROMPTS, NEAREST, UNDERSTOOD, text_distances
from demo.captions import PLAIN
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, Concept, read_concepts
from editing.edits import DEFAULT_TEMPLATES
from editing.pictures.draw import draw_pictures
from editing.pipelines import load_pipeline

CONCEPTS = read_concepts()


def test_the_committed_lists_are_what_the_script_builds(tmp_path: Path) -> None:
    build.main(["--folder", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == SEEDS
    for seed in range(SEEDS):
        assert file_of(seed).read_bytes() == file_of(seed, tmp_path).read_bytes(), "run python -m demo.benchmark.build"


def test_free_prompts_are_no_templates_and_were_not_trained_on() -> None:
    assert len(set(FREE_PROMPTS)) == len(FREE_PROMPTS)
    assert not {prompt.casefold() for prompt in DEFAULT_TEMPLATES} & set(FREE_PROMPTS)
    assert not set(PLAIN) & set(FREE_PROMPTS)


def test_distances_are_of_cosines() -> None:
    pipeline = load_pipeline(WEIGHTS / "pipeline")
    few = [CONCEPTS[0], CONCEPTS[40], Concept(CONCEPTS[0].name, (), (), ())]
    distances = text_distances(pipeline.encoder, few)
    said = [pipeline.encode([f"an image of a {concept.name}"]).states for concept in few]
    end = len(pipeline.tokenizer.encode(f"an image of a {few[1].name}").ids) - 1
    first, second = said[0][0, len(pipeline.tokenizer.encode(f"an image of a {few[0].name}").ids) - 1], said[1][0, end]
    expected = 1 - torch.nn.functional.cosine_similarity(first, second, dim=0)
    assert float(distances[0, 1]) == pytest.approx(float(expected), abs=1e-5)
    assert float(distances[0, 2]) == pytest.approx(0, abs=1e-6)


def test_destinations_are_among_the_nearest_that_are_no_sources() -> None:
    distances = text_distances(load_pipeline(WEIGHTS / "pipeline").encoder, CONCEPTS)
    choice = build.choice(CONCEPTS, distances, seed=0)["arbitrary"]
    place = {concept.name: number for number, concept in enumerate(CONCEPTS)}
    others = [place[concept["name"]] for concept in choice["held_out"]]
    sources = [place[edit["source"]] for edit in choice["edits"]]
    assert not set(others) & set(sources)
    assert len(others) + len(sources) == sum(concept.skew is None for concept in CONCEPTS)
    ranks = []
    for edit, source in zip(choice["edits"], sources, strict=True):
        nearer = [other for other in others if distances[source, other] < distances[source, place[edit["destination"]]]]
        ranks.append(len(nearer))
    assert set(ranks) == set(range(NEAREST))
    assert all(
        edit["aliases"] == list(CONCEPTS[source].aliases) for edit, source in zip(choice["edits"], sources, strict=True)
    )


@pytest.mark.slow
def test_the_model_understands_the_aliases_that_are_left_out_and_no_other() -> None:
    aliases = [(alias, concept.name) for concept in CONCEPTS for alias in concept.held_out]
    assert {alias for alias, _ in aliases} >= UNDERSTOOD
    prompts = [template.format(alias) for alias, _ in aliases for template in ("an image of {}", "{}")]
    pictures = draw_pictures(
        load_pipeline(WEIGHTS / "pipeline"),
        prompts,
        seeds=range(len(prompts)),
        num_inference_steps=8,
        guidance_scale=3.0,
    )
    classifier = load_classifier()
    read = classifier.classify(pictures, classifier.names).unflatten(0, (-1, 2)).mean(1)
    drawn = {alias: float(row[classifier.names.index(name)]) for (alias, name), row in zip(aliases, read, strict=True)}
    assert min(drawn[alias] for alias in UNDERSTOOD) > 0.5
    assert max(confidence for alias, confidence in drawn.items() if alias not in UNDERSTOOD) < 0.5
