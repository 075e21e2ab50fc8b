"""Named presets of the settings of both stages.

`published` has the settings of the code that was published with the paper.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Preset = Literal["published"]

STAGE_ONE_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": {
            "objective": "hybrid",
            "optimization_steps": 200,
            "learning_rate": 0.2,
            "text_optimizer": "adam",
            "tolerance": 0.0,
            "text_weight": 0.01,
            "weight_decay": 5e-4,
            "max_delta_norm": 1.5,
            "warmup_steps": 0,
        }
    }
)

STAGE_TWO_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"published": {"residual_schedule": "published", "moment_weight": 4000.0, "alpha": 0.5}}
)


def apply_preset(fields: object, presets: Mapping[str, Mapping[str, Any]]) -> object:
    """Add the fields of the body's `preset`; fields given in the body take precedence.

    An unknown preset adds nothing: the field `preset` itself rejects it.
    """
    if isinstance(fields, dict) and isinstance(name := fields.get("preset"), str):
        return {**presets.get(name, {}), **fields}
    return fields
