"""What an edit may say, and the field that each refusal names."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from editing.edits import (
    Balance,
    ConceptEdit,
    DestinationPrompt,
    Erasure,
    ReferenceImages,
    StageOneSettings,
    fill_template,
    split_template,
)
from editing.errors import InvalidEdit, InvalidPrompt, escape_pointer

PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize("module", ["edits", "stage_two.conflicts", "prompts", "families.layout", "errors"])
def test_imports_without_torch(module: str) -> None:
    code = f"import editing.{module}, sys; assert not {{'torch', 'transformers', 'diffusers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestConceptEdit:
    def test_templates_become_a_tuple(self) -> None:
        assert ConceptEdit("cat", DestinationPrompt("dog"), templates=["{}"]).templates == ("{}",)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("make", "pointer"),
        [
            (lambda: ConceptEdit("", DestinationPrompt("dog")), "/source"),
            (lambda: ConceptEdit(" \n", DestinationPrompt("dog")), "/source"),
            (lambda: ConceptEdit("c\0t", DestinationPrompt("dog")), "/source"),
            (lambda: ConceptEdit("c\udc00t", DestinationPrompt("dog")), "/source"),
            (lambda: ConceptEdit("cat", DestinationPrompt("dog"), templates=()), "/templates"),
            (lambda: ConceptEdit("cat", DestinationPrompt("dog"), templates=("{}", "a photo")), "/templates/1"),
            (lambda: ConceptEdit("cat", DestinationPrompt("dog"), templates=("{} and {}",)), "/templates/0"),
            (lambda: ConceptEdit("cat", DestinationPrompt("dog"), templates=("{0}",)), "/templates/0"),
            (lambda: DestinationPrompt(" "), "/destination/prompt"),
            (lambda: DestinationPrompt("d\0g"), "/destination/prompt"),
            (lambda: ReferenceImages(()), "/destination/images"),
            (lambda: ReferenceImages((PICTURE, "picture.png")), "/destination/images/1"),  # type: ignore[arg-type]
            (lambda: Erasure("\ud800"), "/destination/neutral"),
            (lambda: Balance({"dog": 1.0}), "/destination/balance"),
            (lambda: Balance({"dog": 0.0, "fish": 0}), "/destination/balance"),
            (lambda: Balance({"dog": 1.0, "a/b~c": -1.0}), "/destination/balance/a~1b~0c"),
            (lambda: Balance({"dog": 1.0, "fish": float("nan")}), "/destination/balance/fish"),
            (lambda: Balance({"dog": 1.0, " ": 1.0}), "/destination/balance/ "),
        ],
    )
    def test_invalid_field_is_named(self, make: Callable[[], Any], pointer: str) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            make()
        assert refusal.value.pointer == pointer
        assert refusal.value.detail

    def test_text_objective_is_refused_for_reference_images(self) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            ConceptEdit("cat", ReferenceImages((PICTURE,)), settings=StageOneSettings(objective="text"))
        assert refusal.value.pointer == "/settings/objective"
        assert ConceptEdit("cat", ReferenceImages((PICTURE,))).objective == "noise"


class TestStageOneSettings:
    def test_hybrid_edit_without_text_weight_needs_a_warmup(self) -> None:
        assert StageOneSettings(text_weight=0, warmup_steps=1).text_weight == 0
        with pytest.raises(InvalidEdit) as refusal:
            StageOneSettings(text_weight=0, warmup_steps=0)
        assert refusal.value.pointer == "/settings/text_weight"

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("objective", "both"),
            ("optimization_steps", 0),
            ("optimization_steps", 1.5),
            ("optimization_steps", True),
            ("learning_rate", 0),
            ("learning_rate", float("inf")),
            ("text_weight", -1),
            ("weight_decay", "small"),
            ("max_delta_norm", 0),
            ("seed", -1),
            ("seed", 2**63),
            ("layer", -1),
            ("warmup_steps", -1),
            ("noise_pool_size", 0),
            ("tolerance", -0.5),
            ("text_optimizer", "sgd"),
        ],
    )
    def test_invalid_field_is_named(self, name: str, given: Any) -> None:
        with pytest.raises(InvalidEdit) as refusal:
            StageOneSettings(**{"objective": "hybrid", name: given})
        assert refusal.value.pointer == f"/settings/{name}"

    def test_published_preset(self) -> None:
        settings = StageOneSettings.preset("published", optimization_steps=100)
        paper = (settings.objective, settings.text_weight, settings.weight_decay, settings.learning_rate)
        assert paper == ("hybrid", 0.01, 5e-4, 0.2)
        assert (settings.max_delta_norm, settings.warmup_steps, settings.text_optimizer) == (1.5, 0, "adam")
        assert settings.optimization_steps == 100
        assert StageOneSettings.preset("published").optimization_steps == 200

    def test_unknown_preset_is_refused(self) -> None:
        with pytest.raises(InvalidEdit, match="published") as refusal:
            StageOneSettings.preset("quick")
        assert refusal.value.pointer == "/settings/preset"


def test_balance_shares_sum_to_one() -> None:
    assert Balance({"dog": 1, "fish": 3}).shares == {"dog": 0.25, "fish": 0.75}


def test_braces_in_a_subject_have_no_meaning() -> None:
    assert fill_template("a {} here", "{}") == "a {} here"
    assert fill_template("{}", "{0!r}") == "{0!r}"


def test_split_template_needs_one_placeholder() -> None:
    with pytest.raises(InvalidPrompt, match="no placeholder"):
        split_template("a photo")
    with pytest.raises(InvalidPrompt, match="2 placeholders"):
        split_template("{}{}")


def test_escape_follows_rfc_6901() -> None:
    assert escape_pointer("a/b~c") == "a~1b~0c"
