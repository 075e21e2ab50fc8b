from pathlib import Path

import torch

from demo.art import Art
from demo.classify import Classifier, load_classifier
from demo.concepts import Concept
from demo.llm.classifier import measure_recognition
from demo.train import classifier
from demo.train.grid import as_bytes

WIDTHS = (8, 8, 8, 8)


class FirstChannel(Classifier):
    """Tells the cat from the hot dog by a brighter first channel, and never sees a judge."""

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        red = pictures[:, 0].mean((1, 2))
        return {"concept": torch.stack([red, -red, torch.full_like(red, -2)], 1)}


def test_recognition_is_counted_by_kind_and_concept(art: Art, concepts: list[Concept]) -> None:
    sign = torch.where(art.concept == 0, 1.0, -1.0)[:, None, None, None, None]
    drawn = as_bytes(0.5 * sign * torch.ones(art.pictures.shape))
    dark = as_bytes(torch.full(art.pictures.shape, -0.5))
    found = measure_recognition(FirstChannel(classifier.classes(concepts), WIDTHS), torch.stack([drawn, dark]), art)
    assert found["drawn"] == round(8 / len(art), 4)
    assert found["rebuilt"] == round(4 / len(art), 4)
    assert found["concepts"] == {"cat": 0.5, "hot dog": 1.0, "judge": 0.0}
    assert found["weak"] == ["cat", "judge"]


def test_exported_classifier_is_loaded_with_its_classes(concepts: list[Concept], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(classifier.classes(concepts), WIDTHS).eval()
    classifier.export(model, tmp_path / "llm" / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "llm" / "classifier.safetensors")
    assert loaded.classes == model.classes
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(loaded(pictures)["concept"], model(pictures)["concept"], atol=5e-3)
