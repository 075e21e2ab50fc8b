import json
from pathlib import Path

import pytest

from editing.errors import TaskUnreadable
from editing.evaluation.iceb import Case, HeldOut, Prompt
from editing.evaluation.iceb_files import IcebFiles
from tests.editing.conftest import ROOT
from tests.editing.evaluation.conftest import CLASSES, TEMPLATES, edit, write_rows


def test_files_become_cases(iceb_folder: Path) -> None:
    files = IcebFiles(iceb_folder)
    assert files.names == CLASSES
    assert files.count_edits("arbitrary") == 2 and files.count_edits("rectification") == 1
    task = files.build_task("arbitrary", edits=2, seed=0)
    free = (Prompt("the {} runs", 1), Prompt("one {}.", 2))
    assert task.cases[0] == Case(
        source="cat",
        destination="dog",
        source_class="cat",
        destination_class="dog",
        templates=(Prompt("An image of {}", 1), Prompt("A photo of {}", 2), Prompt("{}", 3)),
        free=free,
        aliases=("kitten",),  # of "feline" the model draws something else
        alias_prompts=free,
        seed=7,
    )
    assert task.cases[1].aliases == ()
    dog = HeldOut("dog", (Prompt("a dog", 8), Prompt("the dog", 9)))
    assert task.held_out[0] == dog and [concept.name for concept in task.held_out] == ["dog", "bird", "fish"]


def test_rectification_without_seeds_uses_those_of_its_free_prompts(iceb_folder: Path) -> None:
    task = IcebFiles(iceb_folder).build_task("rectification", edits=1, seed=0)
    (case,) = task.cases
    assert (case.source, case.destination, case.source_class, case.destination_class) == ("kitty", *["cat"] * 3)
    assert case.templates == tuple(Prompt(text, seed) for text, seed in zip(TEMPLATES, (1, 2, 3), strict=True))
    assert case.aliases == () and case.seed == 7


def test_seed_chooses_the_edits(iceb_folder: Path) -> None:
    files = IcebFiles(iceb_folder)
    first = {seed: files.build_task("arbitrary", edits=1, seed=seed).cases[0] for seed in range(6)}
    assert first[0].source == "cat"
    assert {case.source for case in first.values()} == {"cat", "old tree"}
    assert [case.seed for case in first.values()] == [7, 8, 9, 10, 11, 12]
    assert all(case.free[0].seed == (1 if case.source == "cat" else 4) for case in first.values())
    assert files.build_task("arbitrary", edits=1, seed=3) == IcebFiles(iceb_folder).build_task(
        "arbitrary", edits=1, seed=3
    )
    held_out = files.build_task("arbitrary", edits=2, seed=0).held_out
    assert files.build_task("arbitrary", edits=1, seed=1).held_out == held_out  # at any size


@pytest.mark.parametrize("edits", [0, 3])
def test_too_many_edits_are_read_error(iceb_folder: Path, edits: int) -> None:
    with pytest.raises(TaskUnreadable, match=f"from 1 to 2 in arbitrary editing, not {edits}"):
        IcebFiles(iceb_folder).build_task("arbitrary", edits=edits, seed=0)


GOOD = edit("cat", "dog", ["a {}"], [1], source_id=0, dest_id=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": " "}, "row 2: the column 'source' is empty"),
        ({"prompts": "['a {}'"}, "row 2: the column 'prompts' has no list"),
        ({"prompts": "__import__('os')"}, "row 2: the column 'prompts' has no list"),
        ({"prompts": ["a dog"]}, "row 2: the prompt 'a dog' needs {} once, or the name 'cat'"),
        ({"prompts": ["{} and {}"]}, "row 2: the prompt '{} and {}' needs {} once"),
        ({"seeds": ["one"]}, "row 2: the column 'seeds' has 'one', which is no whole number"),
        ({"seeds": [1, 2]}, "row 2: 1 prompts with 2 seeds"),
        ({"source id": "x"}, "row 2: the column 'source id' has 'x'"),
        ({"dest id": 6}, "row 2: class2id.json has no class 6"),
    ],
    ids=[
        "empty",
        "cut list",
        "no literal",
        "no placeholder",
        "two placeholders",
        "seed",
        "unpaired",
        "id",
        "unknown class",
    ],
)
def test_errors_name_the_file_and_the_row(iceb_folder: Path, change: dict[str, str], message: str) -> None:
    write_rows(iceb_folder / "arbitrary_val.csv", [GOOD, {**GOOD, **change}])
    with pytest.raises(TaskUnreadable) as error:
        IcebFiles(iceb_folder).build_task("arbitrary", edits=1, seed=0)
    assert error.value.detail.startswith(f"arbitrary_val.csv, {message}")


def test_errors_of_whole_files(iceb_folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in iceb_folder.iterdir()}

    def read_error(name: str, content: str | None) -> str:
        (iceb_folder / name).unlink()
        if content is not None:
            (iceb_folder / name).write_text(content)
        with pytest.raises(TaskUnreadable) as error:
            IcebFiles(iceb_folder).build_task("arbitrary", edits=1, seed=0)
        (iceb_folder / name).write_bytes(files[name])
        return error.value.detail

    assert "no readable arbitrary_val.csv" in read_error("arbitrary_val.csv", None)
    assert read_error("arbitrary_val.csv", "source,dest\n") == "arbitrary_val.csv: there is no column 'prompts'"
    assert read_error("class2id.json", "{").startswith("class2id.json is no JSON")
    assert read_error("class2id.json", "[]") == "class2id.json: expected a JSON object"
    assert read_error("class2id.json", '{"cat": "0"}').startswith("class2id.json: expected the index of each class")
    assert read_error("imgnet_prompts_cls.json", '{"0": ["cat"]}').startswith("imgnet_prompts_cls.json, class 0")
    entry = {"class id": 1, "text prompt": "a dog", "random seed": "8"}
    for bad in ({**entry, "class id": 6}, {**entry, "random seed": None}, {}):
        detail = read_error("imgnet_aug_test.json", json.dumps([entry, bad]))
        assert detail.startswith("imgnet_aug_test.json, entry 1: expected a known class id")


@pytest.fixture(scope="module")
def published() -> IcebFiles:
    folder = ROOT.parent / "shared" / "data" / "iceb"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/iceb here")
    return IcebFiles(folder)


def test_published_arbitrary_edits(published: IcebFiles) -> None:
    task = published.build_task("arbitrary", edits=300, seed=0)
    assert len(published.names) == 1000 and published.names[341] == "hog"
    assert len(task.cases) == 300 and len(task.held_out) == 366
    assert all(len(case.templates) == 3 and len(case.free) == 5 for case in task.cases)
    assert sum(len(case.aliases) for case in task.cases) == 98
    first = task.cases[0]
    assert (first.source, first.destination, first.seed) == ("bighorn", "marmot", 7316)
    assert [prompt.seed for prompt in first.free] == [6843, 37720, 39243, 98606, 38504]
    broccoli = next(case for case in task.cases if case.source == "broccoli")
    assert "{} florets cooking in a skillet with olive oil." in [prompt.text for prompt in broccoli.free]
    assert len(task.build_edits()) == 300


def test_published_rectifications(published: IcebFiles) -> None:
    task = published.build_task("rectification", edits=143, seed=0)
    assert len({case.source for case in task.cases}) == 143
    assert all(case.source_class == case.destination_class for case in task.cases)
    assert not {case.source_class for case in task.cases} & {concept.name for concept in task.held_out}
    assert len(task.held_out) == 308
