import pytest
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from demo.art import Art
from demo.captions import Caption
from demo.concepts import Concept, read_concepts
from demo.llm.captions import HELD_OUT
from demo.llm.train import drawn_art
from demo.sd3.data import Captions, PictureLabels, Pictures, TrainingData, draw_captions, read_drawn
from demo.train.autoencoder import Latents


@pytest.fixture
def art(art: Art) -> Art:
    """The pictures of the styles that a caption can name."""
    return drawn_art(art)


@pytest.fixture
def pictures(art: Art, concepts: list[Concept]) -> Pictures:
    """Latents that are the number of their picture."""
    mean = torch.arange(len(art)).view(-1, 1, 1, 1, 1).expand(-1, 2, 4, 8, 8).float()
    labels = PictureLabels(art.concept, art.style, art.gender)
    return Pictures.sort(Latents(mean, torch.zeros_like(mean)), labels, concepts)


def test_captions_have_no_held_out_template(concepts: list[Concept]) -> None:
    drawn = draw_captions(concepts, ["cat", "hot dog"], count=300)
    assert not {caption.template for caption in drawn} & set(HELD_OUT)
    assert drawn == draw_captions(concepts, ["cat", "hot dog"], count=300)
    assert {caption.concept for caption in drawn} == {
        index for index, concept in enumerate(concepts) if concept.name in ("cat", "hot dog")
    }


def test_the_pipeline_draws_at_least_100_of_the_concepts() -> None:
    names = read_drawn()
    assert len(names) >= 100
    assert {concept.name for concept in read_concepts() if concept.skew is None} >= names


def test_the_empty_caption_is_first_and_long_ones_are_left_out(
    clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
) -> None:
    captions = [Caption("a {}", "fox", 1, style=2), Caption("a {}" + " very" * 30, "fox", 1), Caption("{}", "dog", 0)]
    tokens = Captions.tokenize(captions, clip_tokenizer, t5_tokenizer)
    assert tokens.concept.tolist() == [-1, 1, 0]
    assert tokens.style.tolist() == [-1, 2, -1]
    assert tokens.t5[0].tolist() == [1] + [0] * 31
    assert tokens.clip.shape == (3, 24)


def test_a_picture_shows_what_its_caption_says(art: Art, concepts: list[Concept], pictures: Pictures) -> None:
    torch.manual_seed(0)
    for wanted in range(len(art)):
        says = [column[wanted].expand(20) for column in (art.concept, art.style, art.gender)]
        chosen = pictures.mean[pictures.choose(*says), 0, 0, 0, 0].long()
        for column in (art.concept, art.style, art.gender):
            assert (column[chosen] == column[wanted]).all()


def test_what_a_caption_leaves_open_is_drawn_at_random(art: Art, concepts: list[Concept], pictures: Pictures) -> None:
    torch.manual_seed(0)
    nothing = torch.full((4000,), -1)
    profession = next(index for index, concept in enumerate(concepts) if concept.skew is not None)
    chosen = pictures.mean[pictures.choose(nothing, nothing, nothing), 0, 0, 0, 0].long()
    assert set(art.concept[chosen].tolist()) == set(range(len(concepts)))
    chosen = pictures.mean[pictures.choose(nothing * 0 + profession, nothing, nothing), 0, 0, 0, 0].long()
    assert set(art.style[chosen].tolist()) == {0, 1, 2}
    skew = concepts[profession].skew
    assert skew is not None
    assert (art.gender[chosen] == 0).float().mean().item() == pytest.approx(skew, abs=0.05)


def test_a_batch_has_latents_and_ids_of_its_captions(
    pictures: Pictures, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast, art: Art
) -> None:
    torch.manual_seed(0)
    captions = Captions.tokenize([Caption("a {}", "fox", 1)], clip_tokenizer, t5_tokenizer)
    x0, clip_ids, t5_ids = TrainingData(captions, pictures).batch(200)
    is_empty = (t5_ids == captions.t5[0]).all(1)
    assert 2 < is_empty.sum() < 25
    assert (clip_ids[~is_empty] == captions.clip[1]).all()
    assert len(x0) == 2 * len(t5_ids)
    assert (art.concept[x0[:, 0, 0, 0].long()] == 1).all()
