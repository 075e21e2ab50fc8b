"""Warnings about edits that had little effect."""

from collections.abc import Iterator, Sequence

from app.db.models import JsonObject
from emender.schemas.checkpoints import EditInCheckpoint, EditWarning

MAX_RESIDUAL = 0.5
"""The relative residual above which an edit gets a warning."""


def residual_warnings(edits: Sequence[EditInCheckpoint], *, options: JsonObject) -> Iterator[EditWarning]:
    """Warn about edits of which the update left much undone. `options` are those of the checkpoint."""
    for edit in edits:
        if (edit.relative_residual or 0) <= MAX_RESIDUAL:
            continue
        if edit.method == "text_encoder":
            name, weight = "moment_weight", options["moment_weight"]
            why = "Words that are frequent in the captions of the statistics are hard to change"
        else:
            name, weight = "regularization_weight", options[edit.method]["regularization_weight"]
            why = "Preserved prompts or `regularization_weight` hold it back"
        detail = (
            f"{edit.source!r} hardly changed: {edit.relative_residual:.0%} of the change is left undone. {why}. Apply "
            f"with a lower `{name}`, such as {weight / 10:g} instead of {weight:g}."
        )
        yield EditWarning(edit=edit.id, detail=detail)


def classifier_warnings(report: JsonObject | None) -> Iterator[EditWarning]:
    """Warn about edits that did not succeed, by the report of a check or an evaluation."""
    for edit in (report or {}).get("edits", []):
        if edit["succeeded"]:
            continue
        source, after = edit["source"], edit["after"]
        if edit["destination"] is None:
            detail = f"{source!r} is still recognized, with confidence {after:.2f}; before: {edit['before']:.2f}."
        else:
            detail = (
                f"Pictures of {source!r} are recognized as {edit['destination']!r} with confidence {after:.2f}; "
                f"pictures of the destination itself with {edit['destination_score']:.2f}."
            )
        yield EditWarning(edit=edit["edit"], detail=f"{detail} Review previews, and try other templates or settings.")
