"""Small pipelines for the tests of `editing`: a random one, made anew, and the emoji model where its weights are."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch

from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.pipelines import EditablePipeline, load_pipeline
from editing.prompts import PromptTokenizer
from editing.second_moments.estimate import estimate_second_moments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import Update, compute_update
from editing.values import EditValue
from tests.pipelines import Family, make_old, write_pipeline

ROOT = Path(__file__).parents[2]
WORDS = ("cat", "dog", "fish", "bird", "red hat", "old tree", "a big house", "the sea", "small boat", "my cup of tea")
CAPTIONS = [template.format(word) for word in WORDS for template in ("{}", "a photo of {}", "{} in the sun")]


SLOW_FAMILIES = re.compile(r"\b(flux2_klein|sana)\b")  # their prompts are long
_DIFFERENCES = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", action="store_true", help="end with the differences from diffusers, as JSON")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Leave slow families to the second tier, where other families run the same code in the first."""
    if SLOW_FAMILIES.search(item.name) and "conformance" not in item.nodeid:
        item.add_marker(pytest.mark.slow)


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("--conformance", default=False):
        differences = config.stash.get(_DIFFERENCES, {})
        result = {"families": sorted(differences), "worst": max(differences.values(), default=None)}
        config.get_terminal_writer().line(json.dumps(result))


@pytest.fixture(scope="session")
def record_difference(pytestconfig: pytest.Config) -> Callable[[str, float], None]:
    """Record the difference of a family from diffusers, for `make conformance`."""
    differences = pytestconfig.stash.setdefault(_DIFFERENCES, {})

    def record(family: str, difference: float) -> None:
        differences[family] = max(difference, differences.get(family, 0.0))

    return record


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small for more, and the bits of a sum depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family, bool], Path]:
    """A random pipeline of a family, as today's transformers saves it or as an old one did."""

    @cache
    def write(family: Family, old: bool) -> Path:
        folder = write_pipeline(tmp_path_factory.mktemp(family) / "random", family=family)
        return make_old(folder) if old else folder

    return write


@pytest.fixture(
    scope="session",
    params=[("sd1", False), ("sd1", True), ("sd2", False), ("sd2", True), ("sdxl", False), ("sdxl", True)],
    ids=lambda param: f"{'old-' if param[1] else ''}{param[0]}",
)
def any_folder(request: pytest.FixtureRequest, folder_of: Callable[[Family, bool], Path]) -> Path:
    """Of every family, and as new and old transformers save it."""
    return folder_of(*request.param)


@pytest.fixture(scope="session")
def any_pipeline(any_folder: Path) -> EditablePipeline:
    return load_pipeline(any_folder)


@pytest.fixture(scope="session")
def sdxl(folder_of: Callable[[Family, bool], Path]) -> EditablePipeline:
    return load_pipeline(folder_of("sdxl", False))


@pytest.fixture(scope="session")
def sd2(folder_of: Callable[[Family, bool], Path]) -> EditablePipeline:
    return load_pipeline(folder_of("sd2", False))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "random")


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> EditablePipeline:
    return load_pipeline(folder)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> PromptTokenizer:
    return PromptTokenizer.from_folder(folder / "tokenizer")


@pytest.fixture(scope="session")
def second_moments(pipeline: EditablePipeline) -> SecondMoments:
    return estimate_second_moments(pipeline.encoder, CAPTIONS)


@pytest.fixture(scope="session")
def any_moments(any_pipeline: EditablePipeline) -> SecondMoments:
    return SecondMoments.join([estimate_second_moments(encoder, CAPTIONS) for encoder in any_pipeline.encoders])


@pytest.fixture(scope="session")
def any_values(any_pipeline: EditablePipeline, edits: list[ConceptEdit]) -> list[EditValue]:
    values = optimize_values(any_pipeline, edits)
    assert all(isinstance(value, EditValue) for value in values), values
    return cast(list[EditValue], values)


@pytest.fixture(scope="session")
def any_updates(
    any_pipeline: EditablePipeline, edits: list[ConceptEdit], any_values: list[EditValue], any_moments: SecondMoments
) -> list[Update]:
    """One for each encoder."""
    return [compute_update(encoder, edits, any_values, any_moments) for encoder in any_pipeline.encoders]


@pytest.fixture(scope="session")
def edits() -> list[ConceptEdit]:
    settings = StageOneSettings(objective="text", optimization_steps=30)
    pairs = [("cat", "dog"), ("old tree", "the sea"), ("small boat", "red hat")]
    return [ConceptEdit(source, DestinationPrompt(target), settings=settings) for source, target in pairs]


@pytest.fixture(scope="session")
def values(pipeline: EditablePipeline, edits: list[ConceptEdit]) -> list[EditValue]:
    values = optimize_values(pipeline, edits)
    assert all(isinstance(value, EditValue) for value in values), values
    return cast(list[EditValue], values)


@pytest.fixture(scope="session")
def update(
    pipeline: EditablePipeline, edits: list[ConceptEdit], values: list[EditValue], second_moments: SecondMoments
) -> Update:
    return compute_update(pipeline.encoder, edits, values, second_moments)


@pytest.fixture(scope="session")
def emoji_folder() -> Path:
    """The emoji model's weights; its second moments lie beside it."""
    weights = ROOT / "demo" / "weights"
    if not (weights / "pipeline" / "model_index.json").is_file():
        pytest.skip("the emoji model is not in demo/weights")
    return weights


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Outputs of the published stage II, where the project's shared data is mounted."""
    folder = ROOT.parent / "shared" / "data" / "golden"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/golden here")
    return folder
