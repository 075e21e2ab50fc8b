import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from editing.errors import ClassifierUnusable
from editing.evaluation.classifiers import HuggingFaceClassifier
from tests.editing.evaluation.conftest import CLASSES, write_classifier


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


def test_confidences_are_the_model_s_softmax(classifier_folder: Path, pictures: list[Image.Image]) -> None:
    classifier = HuggingFaceClassifier.load(classifier_folder)
    assert classifier.names == CLASSES
    everything = classifier.classify(pictures, CLASSES)
    assert everything.shape == (40, 6) and everything.dtype == torch.float32
    assert torch.allclose(everything.sum(1), torch.ones(40))

    model = ViTForImageClassification.from_pretrained(classifier_folder).eval()
    resized = [np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR)) for picture in pictures]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)
    assert expected.std(0).min() > 0.01  # the pictures do not look all the same to it
    assert torch.allclose(everything, expected, atol=1e-4)
    assert torch.equal(classifier.classify(pictures, ["bird", "cat"]), everything[:, [3, 0]])


def test_pictures_of_any_mode_and_no_pictures(classifier_folder: Path) -> None:
    classifier = HuggingFaceClassifier.load(classifier_folder)
    grey, colour = Image.new("L", (9, 5), 99), Image.new("RGB", (9, 5), (99, 99, 99))
    one, other = classifier.classify([grey, colour], ["cat"])
    assert torch.equal(one, other)
    assert classifier.classify([], ["cat", "dog"]).shape == (0, 2)


def test_given_names_replace_the_labels(classifier_folder: Path, pictures: list[Image.Image]) -> None:
    own = HuggingFaceClassifier.load(classifier_folder).classify(pictures, ["fish"])
    renamed = HuggingFaceClassifier.load(classifier_folder, names=["a", "b", "c", "d", "e", "f"])
    assert torch.equal(renamed.classify(pictures, ["c"]), own)
    with pytest.raises(ClassifierUnusable, match="knows no class 'fish'"):
        renamed.classify(pictures, ["fish"])


def test_names_that_do_not_fit_are_refused(classifier_folder: Path) -> None:
    with pytest.raises(ClassifierUnusable, match="2 names for the 6 classes of the classifier"):
        HuggingFaceClassifier.load(classifier_folder, names=["cat", "dog"])
    with pytest.raises(ClassifierUnusable, match="have the name 'b'"):
        HuggingFaceClassifier.load(classifier_folder, names=["a", "b", "c", "b", "e", "f"])


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ClassifierUnusable, match="no image classifier that can be loaded"):
        HuggingFaceClassifier.load(folder)


def test_code_of_the_repository_is_not_executed(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClassifierUnusable, match="no image classifier that can be loaded"):
        HuggingFaceClassifier.load(folder)
    assert not (tmp_path / "ran").exists()
