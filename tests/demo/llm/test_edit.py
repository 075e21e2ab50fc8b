"""The measurement of many edits, on a pipeline with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaModel, PreTrainedTokenizerFast

from demo.llm import edit, tasks
from demo.llm.build import load_autoencoder
from demo.llm.captions import HELD_OUT
from demo.llm.concepts import read_all_concepts
from demo.llm.edit import TEMPLATES, Settings, main
from demo.llm.encoder import CHAT_TEMPLATE
from demo.llm.tasks import PRESERVED_TEMPLATES, Task

pytestmark = pytest.mark.slow

QUICK = ("layer=1", "edited_layers=1", "text_steps=2", "noise_steps=2")


@pytest.fixture
def folder(tmp_path: Path, transformer: ZImageTransformer2DModel, encoder: LlamaModel) -> Path:
    """A pipeline with a token for each of 250 words, so that captions are short enough."""
    texts = [*HELD_OUT, *TEMPLATES, "user assistant", *(concept.name for concept in read_all_concepts())]
    words = dict.fromkeys(word for text in texts for word in text.replace("{}", " ").split())
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *list(words)[:250]])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=load_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(tmp_path / "pipeline", safe_serialization=True)
    return tmp_path / "pipeline"


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "HELD_OUT_CONCEPTS", (3, 3))
    monkeypatch.setattr(edit, "CAPTIONS", 60)
    concepts = read_all_concepts()
    few = [*concepts[:20], next(concept for concept in concepts if concept.skew is not None)]
    monkeypatch.setattr(edit, "read_all_concepts", lambda: few)


def run(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--edits", "2", "--seed", "100", "--steps", "1", *options, "--set", *QUICK])
    assert not ended.value.code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_every_method_is_measured_on_the_same_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run(folder, capsys, "--method", "ours", "text_only", "text_projection")
    assert [report["method"] for report in reports] == ["ours", "text_only", "text_projection"]
    for report in reports:
        assert report["before"] == reports[0]["before"]  # the edits of the method before are taken back
        assert report["after"]["destination"] != report["before"]["destination"]
        assert report["s2d"] == pytest.approx(report["after"]["destination"] - report["before"]["destination"])
        assert report["hd"] == pytest.approx(report["after"]["held_out"] - report["before"]["held_out"])


def test_published_settings_are_transplanted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values of the last layer that the transformer's text follows, written into all layers up to it."""
    (report,) = run(folder, capsys, "--method", "published")
    assert len(report["relative_norms"]) == 2
    assert report["after"]["destination"] != report["before"]["destination"]


def test_pictures_can_show_the_destination(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = run(folder, capsys, "--task", "images")
    assert report["after"]["destination"] != report["before"]["destination"]


def test_each_setting_of_stage_two_has_its_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('[{"weight": 10}, {"weight": 1000}]')
    reports = run(folder, capsys, "--settings", str(tmp_path / "settings.json"))
    assert [report["settings"]["weight"] for report in reports] == [10, 1000]
    assert reports[0]["noise_loss"] == reports[1]["noise_loss"]
    assert reports[0]["relative_norms"] > reports[1]["relative_norms"]


def test_a_run_that_fails_leaves_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--edits", "50", "2", "--steps", "1", "--set", *QUICK])
    assert ended.value.code == 1
    failed, whole = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert "at most 8" in failed["error"]
    assert "s2d" in whole


def test_names_weigh_more_the_more_is_edited() -> None:
    assert Settings().weigh_preservation(30) == (500, 500)
    captions, names = Settings().weigh_preservation(100)
    assert names > captions
    assert Settings(weight=10, names=0.2).weigh_preservation(100) == (8, 2)


@pytest.mark.parametrize("name", ["concepts", "images"])
def test_no_concept_is_both_edited_and_judged(name: Any) -> None:
    concepts = read_all_concepts()
    task = Task.draw(name, concepts, edits=300, seed=0)
    parts = [task.sources, task.destinations, task.held_out, task.preserved]
    assert len({name for part in parts for name in part}) == sum(map(len, parts)) == 938
    assert not set(HELD_OUT) & {*TEMPLATES, *PRESERVED_TEMPLATES}


def test_misunderstood_names_get_their_concept() -> None:
    task = Task.draw("names", read_all_concepts(), edits=2, seed=0, misunderstood={"brolly", "doggo"})
    assert dict(zip(task.sources, task.destinations, strict=True)) == {"brolly": "umbrella", "doggo": "dog"}
    assert not {"umbrella", "dog"} & {*task.held_out, *task.preserved}
