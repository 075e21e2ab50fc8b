import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo.art import Art
from demo.classify import Classifier
from demo.concepts import Concept
from demo.train import autoencoder, classifier
from demo.train.loop import Schedule


def test_trains_all_heads(art: Art, concepts: list[Concept], tmp_path: Path) -> None:
    both = classifier.both_kinds(autoencoder.build((8, 8, 8)).eval(), art)
    short = Schedule(steps=3, batch=8, rate=1e-3, warmup=1)
    classifier.train(art, both, concepts, tmp_path, schedule=short, widths=(8, 8, 8, 8))
    model = classifier.load(concepts, tmp_path, widths=(8, 8, 8, 8))
    logits = model(torch.zeros(2, 3, 32, 32))
    assert {name: head.shape[1] for name, head in logits.items()} == {"concept": 3, "style": 5, "gender": 2}
    torch.manual_seed(0)
    untrained = Classifier(model.classes, (8, 8, 8, 8))
    for head in ("concept", "style", "gender"):
        weights = [each.heads.get_parameter(f"{head}.weight") for each in (model, untrained)]
        assert not torch.equal(*weights)


def test_disturbed_pictures_stay_pictures() -> None:
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    for seed in range(20):
        changed = classifier.disturbed(pictures, random.Random(seed), torch.Generator().manual_seed(seed))
        assert changed.shape == pictures.shape and changed.abs().max() <= 1
        assert not torch.equal(changed, pictures)


def test_facts_are_one_json_string(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    classifier.save_with_facts({"a": torch.zeros(2).t()}, path, facts={"b": 1})
    with safe_open(path, "pt") as file:
        assert {key: json.loads(value) for key, value in file.metadata().items()} == {"facts": {"b": 1}}
    with pytest.raises(ValueError):
        classifier.save_with_facts({}, path, one=1, two=2)
