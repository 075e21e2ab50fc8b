"""Concept editing for text-to-image diffusion models: the method as a library, torch in and tensors out.

Stage I (`optimize_values`) finds for each concept the value vector that its key should retrieve; stage II
(`compute_update`) writes all of them into the text encoder at once, in closed form. The method is EMCID's
(Editing Massive Concepts In text-to-image Diffusion models); equation numbers in this package are that paper's.

Names are imported on first use, so that `editing.captions`, `editing.edits` and `editing.prompts` load without
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

ENGINE_VERSION = "3"
"""Changes whenever the same inputs may give other bytes; part of what identifies a value and a checkpoint."""

_HOMES = {
    "editing.captions": ("read_captions",),
    "editing.edits": (
        "Balance", "ConceptEdit", "DestinationPrompt", "Erasure", "ReferenceImages", "StageOneSettings",
    ),
    "editing.uce.cross_attention": ("CrossAttentionUpdate", "compute_cross_attention_update"),
    "editing.errors": ("EditingError",),
    "editing.families.layout": ("describe_pipeline",),
    "editing.pipelines": ("EditablePipeline", "load_pipeline"),
    "editing.pictures.grid": ("Row", "draw_grid"),
    "editing.pictures.draw": ("draw",),
    "editing.second_moments.factors": ("FactoredMoments",),
    "editing.second_moments.moments": ("SecondMoments",),
    "editing.second_moments.estimate": ("estimate_second_moments",),
    "editing.stage_two.update": ("Update", "all_applied", "applied", "apply_update", "compute_update"),
    "editing.stage_one.optimize": ("optimize_values",),
    "editing.values": ("EditValue",),
    "editing.weights": ("export_lora", "export_text_encoder", "export_unet", "holding"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["ENGINE_VERSION", "__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from editing.captions import read_captions as read_captions
    from editing.edits import Balance as Balance
    from editing.edits import ConceptEdit as ConceptEdit
    from editing.edits import DestinationPrompt as DestinationPrompt
    from editing.edits import Erasure as Erasure
    from editing.edits import ReferenceImages as ReferenceImages
    from editing.edits import StageOneSettings as StageOneSettings
    from editing.errors import EditingError as EditingError
    from editing.families.layout import describe_pipeline as describe_pipeline
    from editing.pictures.draw import draw as draw
    from editing.pictures.grid import Row as Row
    from editing.pictures.grid import draw_grid as draw_grid
    from editing.pipelines import EditablePipeline as EditablePipeline
    from editing.pipelines import load_pipeline as load_pipeline
    from editing.second_moments.estimate import estimate_second_moments as estimate_second_moments
    from editing.second_moments.factors import FactoredMoments as FactoredMoments
    from editing.second_moments.moments import SecondMoments as SecondMoments
    from editing.stage_one.optimize import optimize_values as optimize_values
    from editing.stage_two.update import Update as Update
    from editing.stage_two.update import all_applied as all_applied
    from editing.stage_two.update import applied as applied
    from editing.stage_two.update import apply_update as apply_update
    from editing.stage_two.update import compute_update as compute_update
    from editing.uce.cross_attention import CrossAttentionUpdate as CrossAttentionUpdate
    from editing.uce.cross_attention import compute_cross_attention_update as compute_cross_attention_update
    from editing.values import EditValue as EditValue
    from editing.weights import export_lora as export_lora
    from editing.weights import export_text_encoder as export_text_encoder
    from editing.weights import export_unet as export_unet
    from editing.weights import holding as holding


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
