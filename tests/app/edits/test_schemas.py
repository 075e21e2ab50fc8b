"""The client's schemas repeat the method's defaults and presets, since the client is installed without it."""

import dataclasses
import inspect
from typing import get_args

from editing import edits as method
from editing.stage_two.contexts import Contexts
from editing.stage_two.update import compute_update
from emender.schemas import checkpoints, edits, presets


def test_schema_defaults_equal_those_of_stage_one() -> None:
    assert edits.StageOneSettings().model_dump() == dataclasses.asdict(method.StageOneSettings())


def test_default_templates_equal_those_of_the_library() -> None:
    assert edits.DEFAULT_TEMPLATES == method.DEFAULT_TEMPLATES


def test_presets_equal_those_of_the_library() -> None:
    assert {name: dict(fields) for name, fields in presets.STAGE_ONE_PRESETS.items()} == {
        name: dict(fields) for name, fields in method.PRESETS.items()
    }
    assert {name: dict(fields) for name, fields in presets.STAGE_TWO_PRESETS.items()} == {
        name: dict(fields) for name, fields in method.UPDATE_PRESETS.items()
    }


def test_choices_equal_those_of_the_library() -> None:
    assert edits.Objective == method.Objective
    assert edits.TextOptimizer == method.TextOptimizer
    assert checkpoints.Contexts == Contexts
    assert presets.Preset == method.Preset
    assert get_args(presets.Preset) == tuple(presets.STAGE_ONE_PRESETS) == tuple(presets.STAGE_TWO_PRESETS)


def test_apply_defaults_equal_those_of_stage_two() -> None:
    defaults = {name: p.default for name, p in inspect.signature(compute_update).parameters.items()}
    fields = checkpoints.ApplyCreate.model_fields
    for name in ("alpha", "residual_schedule", "moment_weight", "contexts"):
        assert fields[name].default == defaults[name], name
