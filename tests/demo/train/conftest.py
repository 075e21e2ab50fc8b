import pytest
from transformers import CLIPTextModel, CLIPTokenizer

from demo.concepts import Concept
from demo.train import text_encoder
from demo.train import tokenizer as tokenizers

SHAPE = text_encoder.Shape(width=16, mlp=32, layers=12, heads=2)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    concepts = [Concept("cat", ("cat",), ("kitten",), ()), Concept("judge", ("judge",), (), (), 0.85)]
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(concepts, folder, captions=300)
    return tokenizers.load(folder)


@pytest.fixture
def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained encoder of twelve layers, sixteen wide."""
    return text_encoder.build(tokenizer, SHAPE).eval()
