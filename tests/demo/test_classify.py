import pytest
import torch
from PIL import Image

from demo.classify import as_input, classify, load_classifier
from demo.concepts import read_concepts

CLASSIFIER = load_classifier()


def test_classes_are_the_concepts_in_order() -> None:
    assert CLASSIFIER.classes.concepts == tuple(concept.name for concept in read_concepts())


def test_confidences_are_distributions() -> None:
    confidences = classify(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), CLASSIFIER)
    for head in (confidences.concept, confidences.style, confidences.gender):
        assert torch.allclose(head.sum(1), torch.ones(3), atol=1e-5)
    assert confidences.of_concept("cat").shape == (3,)


def test_unknown_names_are_refused() -> None:
    confidences = classify([Image.new("RGB", (32, 32), "white")], CLASSIFIER)
    with pytest.raises(KeyError, match="no concept 'gryphon'"):
        confidences.of_concept("gryphon")
    with pytest.raises(KeyError, match="no style 'cubism'"):
        confidences.of_style("cubism")


def test_images_and_tensors_read_the_same() -> None:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(as_input([image]), as_input(pixels))
    assert torch.equal(as_input(pixels), as_input(pixels.float() / 127.5 - 1))


def test_transparency_is_white_and_sizes_are_scaled() -> None:
    read = as_input([Image.new("RGBA", (100, 60), (0, 0, 0, 0))])
    assert read.shape == (1, 3, 32, 32) and torch.equal(read, torch.ones_like(read))
    assert as_input(torch.zeros(2, 3, 64, 64)).shape == (2, 3, 32, 32)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no picture"):
        as_input([])
    with pytest.raises(ValueError, match=r"\(3, 32, 32\)"):
        as_input(torch.zeros(3, 32, 32))


def test_genders_are_told_apart_where_each_prompt_names_one() -> None:
    assert CLASSIFIER.can_distinguish(["man doctor", "woman doctor"]) and CLASSIFIER.can_distinguish(
        ["Female cook", "male cook"]
    )
    for prompts in (
        ["doctor", "woman doctor"],
        ["man doctor", "male doctor"],
        ["man and woman", "woman"],
        ["a snowman"],
    ):
        assert not CLASSIFIER.can_distinguish(prompts)


def test_attributes_follow_the_prompts() -> None:
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("white", "brown")]
    men, women = CLASSIFIER.classify_attributes(pictures, ["man cook", "woman cook"]).unbind(1)
    assert torch.equal(
        CLASSIFIER.classify_attributes(pictures, ["female cook", "male cook"]), torch.stack([women, men], 1)
    )
    assert torch.equal(men, classify(pictures, CLASSIFIER).of_gender("man"))
