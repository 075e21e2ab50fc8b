import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from demo.art import Art
from demo.captions import Caption
from demo.concepts import Concept
from demo.train import autoencoder, unet
from demo.train.autoencoder import Latents
from demo.train.loop import Schedule, trained
from demo.train.text_encoder import states

WIDTHS = (16, 16)


@pytest.fixture
def caption_states(concepts: list[Concept], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> unet.CaptionStates:
    return unet.encode_captions(concepts, tokenizer, encoder, count=40)


def test_pictures_show_what_captions_say(art: Art, concepts: list[Concept]) -> None:
    choice = unet.PictureChoice(art, concepts)
    chance = random.Random(0)
    for style in range(3):
        picture = choice.choose(Caption("{}", "woman judge", 2, gender=1, style=style), chance)
        assert [int(column[picture]) for column in (art.concept, art.style, art.gender)] == [2, style, 1]
    cats = [choice.choose(Caption("{}", "cat", 0), chance) for _ in range(50)]
    assert {int(art.concept[picture]) for picture in cats} == {0}
    assert {int(art.style[picture]) for picture in cats} == {0, 1, 2}, "the fourth style is not to be drawn"


def test_only_styles_that_have_a_picture_are_chosen(art: Art, concepts: list[Concept]) -> None:
    kept = (art.concept != 0) | (art.style != 1)
    lacking = Art(*(column[kept] for column in (art.pictures, art.concept, art.style, art.gender)))
    choice, chance = unet.PictureChoice(lacking, concepts), random.Random(0)
    cats = [choice.choose(Caption("{}", "cat", 0, style=style), chance) for style in (None, 1) for _ in range(30)]
    assert {int(lacking.style[picture]) for picture in cats} == {0, 2}
    styled = [choice.choose(Caption("{}", "twemoji", None, style=1), chance) for _ in range(30)]
    assert {int(lacking.style[picture]) for picture in styled} == {1}


def test_neutral_professions_keep_the_skew(art: Art, concepts: list[Concept]) -> None:
    choice, chance = unet.PictureChoice(art, concepts), random.Random(0)
    genders = Counter(int(art.gender[choice.choose(Caption("{}", "judge", 2), chance)]) for _ in range(1000))
    assert abs(genders[0] / 1000 - 0.85) < 0.04


def test_caption_states_mark_words_and_subject(
    caption_states: unet.CaptionStates, tokenizer: CLIPTokenizer, encoder: CLIPTextModel
) -> None:
    row = next(index for index, caption in enumerate(caption_states.captions) if caption.template.startswith("a {}"))
    caption = caption_states.captions[row]
    before = len(tokenizer("a").input_ids) - 1
    length = len(tokenizer(caption.subject).input_ids) - 2
    assert caption_states.subject[row].nonzero().flatten().tolist() == list(range(before, before + length))
    assert caption_states.words[row].sum() == len(tokenizer(caption.text).input_ids) - 2
    ids = tokenizer(caption.text, padding="max_length", return_tensors="pt").input_ids
    assert torch.allclose(caption_states.states[row].float(), states(encoder, ids)[0], atol=5e-3)


def test_some_rows_lose_their_subject_and_some_their_caption(
    caption_states: unet.CaptionStates, art: Art, concepts: list[Concept]
) -> None:
    latents = Latents(torch.zeros(len(art), 2, 4, 8, 8), torch.ones(len(art), 2, 4, 8, 8))
    batch = unet.sample_batch(
        caption_states, latents, unet.PictureChoice(art, concepts), torch.Generator().manual_seed(0), size=400
    )
    assert batch.latents.std().item() == pytest.approx(1, abs=0.02)
    empty = (batch.text == caption_states.empty).all(-1).all(-1).float().mean().item()
    zeroed = (batch.text == 0).all(-1).any(-1).float().mean().item()
    assert abs(empty - unet.EMPTY_SHARE) < 0.05
    assert abs(zeroed - (unet.WITHOUT_SUBJECT + unet.WITHOUT_WORDS) / 2) < 0.05
    assert not (batch.text == 0).all(-1)[:, 0].any(), "the begin token is never removed"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_and_drawing(
    caption_states: unet.CaptionStates, art: Art, concepts: list[Concept], tmp_path: Path, processes: int
) -> None:
    work = unet.TrainingInputs(
        art=art,
        latents=Latents(torch.randn(len(art), 2, 4, 8, 8), torch.zeros(len(art), 2, 4, 8, 8)),
        caption_states=caption_states,
        shown=caption_states.states[:3].float(),
        autoencoder=autoencoder.build((8, 8, 8)),
        concepts=concepts,
        folder=tmp_path,
        schedule=Schedule(steps=2, batch=4, rate=1e-3, warmup=1),
        widths=WIDTHS,
        warm_start=None,
        processes=processes,
    )
    unet.train(work)
    assert (tmp_path / "grids" / "unet-2.png").is_file()
    averaged, last = trained(tmp_path, "unet", "kept"), trained(tmp_path, "unet", "model")
    assert averaged.keys() == last.keys() and not torch.equal(averaged["conv_in.weight"], last["conv_in.weight"])
    model = unet.load(tmp_path, widths=WIDTHS, text_width=16)
    pictures = unet.draw(
        model, work.autoencoder, caption_states.states[:2].float(), caption_states.empty, seed=1, steps=2
    )
    assert pictures.shape == (2, 3, 32, 32) and pictures.abs().max() <= 1


def test_shown_prompts_fill_the_grid() -> None:
    many = [Concept(f"thing {number}", ("x",), (), ()) for number in range(300)]
    many += [Concept(f"judge {number}", ("x",), (), (), 0.85) for number in range(5)]
    assert len(unet.shown_prompts(many)) == 80
