import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from demo.captions import Caption
from demo.concepts import Concept, read_concepts
from demo.train import text_encoder
from demo.train.loop import Schedule, trained
from demo.train.text_encoder import (
    Meaning,
    embedded,
    exchange_loss,
    layers_between,
    normed,
    sample_exchange,
    states,
    unknown_word,
)
from demo.train.tokenizer import LENGTH, tokenize

from .conftest import SHAPE

TEMPLATES = ["a photo of {}", "{} emoji", "a {} in the style of noto", "{}"]


def test_states_are_what_the_library_computes(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    ids = tokenizer(["a cat", ""], padding="max_length", return_tensors="pt").input_ids
    assert torch.allclose(states(encoder, ids), encoder(ids).last_hidden_state, atol=1e-5)


def test_layers_can_be_run_in_two_parts(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    ids = tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    middle = layers_between(encoder, embedded(encoder, ids), first=0, last=5)
    assert torch.allclose(
        normed(encoder, layers_between(encoder, middle, first=5, last=None)), states(encoder, ids), atol=1e-5
    )


def test_exchanging_a_word_for_itself_costs_nothing(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    tokens = tokenize(tokenizer, TEMPLATES, ["cat"] * 4)
    terms = exchange_loss(encoder, encoder, tokens, tokens, layer=4, other_template=False)
    assert terms["loss"].item() == pytest.approx(0, abs=1e-8)


def test_the_whole_state_exchanged_after_the_embedding_gives_the_other_caption(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel
) -> None:
    """Where the words differ in one token only, putting in the new token's embedding is exact."""
    old = tokenize(tokenizer, ["a {} emoji"] * 2, ["cat", "cat"])
    new = tokenize(tokenizer, ["a {} emoji"] * 2, ["judge", "judge"])
    assert torch.equal(old.end, new.end)
    deep = exchange_loss(encoder, encoder, old, new, layer=10, other_template=False)["exchanged"]
    shallow = exchange_loss(encoder, encoder, old, new, layer=-1, other_template=False)["exchanged"]
    assert shallow.item() == pytest.approx(0, abs=1e-8)
    assert deep.item() > 100 * shallow.item()


def test_words_of_different_length_are_compared_from_the_subject_on(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel
) -> None:
    old = tokenize(tokenizer, TEMPLATES, ["cat"] * 4)
    new = tokenize(tokenizer, TEMPLATES, ["cat judge judge"] * 4)
    shifted, exists = text_encoder._after_subject(new.ids[..., None].float(), new.subject)
    for row in range(4):
        tail = new.ids[row, new.subject[row] + 1 :]
        assert torch.equal(shifted[row, : len(tail), 0], tail.float())
        assert exists[row].sum() == len(tail)
    assert torch.isfinite(exchange_loss(encoder, encoder, old, new, layer=3, other_template=True)["loss"])


def test_exchanges_come_in_pairs_that_fit() -> None:
    chance = random.Random(0)
    exchange = sample_exchange(chance, read_concepts(), rows=200)
    assert exchange.old[::2] == exchange.old[1::2] and exchange.new[::2] == exchange.new[1::2]
    assert all(template.count("{}") == 1 for template in exchange.templates)
    assert {"noto", "twemoji", "fluent", "art"} & set(exchange.new)
    assert all(len(unknown_word(chance)) <= 6 for _ in range(100))


def test_a_gendered_profession_is_its_own_class() -> None:
    concepts = [Concept("cat", ("cat",), (), ()), Concept("judge", ("judge",), (), (), 0.85)]
    meaning = Meaning(concepts, 8)
    captions = [
        Caption("{}", "x", 0),
        *(Caption("{}", "x", 1, gender) for gender in (None, 0, 1)),
        Caption("{}", "x", None),
    ]
    assert [meaning.subject_class(caption) for caption in captions] == [0, 1, 2, 3, 4]
    assert meaning.logits(torch.randn(2, 8))[0].shape == (2, 5)


def test_both_phases_train_and_resume(tokenizer: CLIPTokenizer, concepts: list[Concept], tmp_path: Path) -> None:
    short = Schedule(steps=2, batch=4, rate=1e-3, warmup=1, checkpoint_every=1)
    text_encoder.train_meaning(concepts, tokenizer, tmp_path, schedule=short, shape=SHAPE)
    text_encoder.train_editability(concepts, tokenizer, tmp_path, schedule=short, shape=SHAPE)
    before = trained(tmp_path, text_encoder.EDITABLE, "model")
    text_encoder.train_editability(concepts, tokenizer, tmp_path, schedule=short, shape=SHAPE)  # has nothing left to do
    after = text_encoder.load(tokenizer, tmp_path, shape=SHAPE).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert after["embeddings.position_embedding.weight"].shape == (LENGTH, SHAPE.width)
