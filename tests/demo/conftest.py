import pytest
import torch

from demo.art import Art
from demo.concepts import Concept

CONCEPTS = [
    Concept("cat", ("cat",), ("kitten",), ("feline",)),
    Concept("hot dog", ("hot dog",), ("frankfurter",), ()),
    Concept("judge", ("judge",), ("magistrate",), (), 0.85),
]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads that wait for each other cost more than these small models take."""
    torch.set_num_threads(1)


@pytest.fixture
def concepts() -> list[Concept]:
    return list(CONCEPTS)


@pytest.fixture
def art() -> Art:
    """Random pictures: both objects in the three drawn styles and a fourth, the judge as man and woman in the three."""
    facts = [(concept, style, -1) for concept in (0, 1) for style in range(4)]
    facts += [(2, style, gender) for style in range(3) for gender in (0, 1)]
    concept, style, gender = torch.tensor(facts).unbind(1)
    pictures = torch.randint(
        0, 256, (len(facts), 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Art(pictures, concept, style, gender)
