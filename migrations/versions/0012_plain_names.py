"""Rename columns and JSON keys to the terms of the field."""

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

SETTINGS = {
    "steps": "optimization_steps",
    "clamp": "max_delta_norm",
    "bank": "noise_pool_size",
    "solver_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "images": "num_images",
    "noise_batch": "noise_batch_size",
    "warm_start": "warmup_steps",
}
SAMPLING = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
UPDATE = {"residual": "residual_schedule", "mass": "moment_weight"}
FILE = {"name": "path"}
CROSS_ATTENTION = {"lamb": "regularization_weight"}
REPORT = {"unjudged": "not_evaluated"}
CONFIDENCES = {"oracle": "destination"}
REPORTED_EDIT = {"took": "succeeded", "oracle": "destination_score"}


def upgrade() -> None:
    rename_keys("edits", "settings", (), SETTINGS)
    rename_keys("edit_values", "losses", ("settings",), SETTINGS)
    rename_keys("evaluations", "request", (), SAMPLING)
    rename_keys("evaluations", "report", (), REPORT)
    rename_keys("evaluations", "report", ("confidences",), CONFIDENCES)
    rename_keys_in_list("evaluations", "report", "edits", REPORTED_EDIT)
    rename_keys_in_list("evaluations", "files", None, FILE)
    rename_keys("checkpoints", "options", (), UPDATE)
    rename_keys("checkpoints", "options", ("cross_attention",), CROSS_ATTENTION)
    rename_method("memory", "text_encoder")
    replace_outbox()


def downgrade() -> None:
    restore_outbox()
    rename_method("text_encoder", "memory")
    rename_keys("checkpoints", "options", ("cross_attention",), reverse(CROSS_ATTENTION))
    rename_keys("checkpoints", "options", (), reverse(UPDATE))
    rename_keys_in_list("evaluations", "files", None, reverse(FILE))
    rename_keys_in_list("evaluations", "report", "edits", reverse(REPORTED_EDIT))
    rename_keys("evaluations", "report", ("confidences",), reverse(CONFIDENCES))
    rename_keys("evaluations", "report", (), reverse(REPORT))
    rename_keys("evaluations", "request", (), reverse(SAMPLING))
    rename_keys("edit_values", "losses", ("settings",), reverse(SETTINGS))
    rename_keys("edits", "settings", (), reverse(SETTINGS))


def reverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def rename_keys(table: str, column: str, path: tuple[str, ...], names: Mapping[str, str]) -> None:
    """Rename the keys of the JSON object at `path` in each row that has it."""
    value = column + "".join(f" -> '{part}'" for part in path)
    renamed = renamed_object(value, names)
    if path:
        renamed = f"jsonb_set({column}, '{{{','.join(path)}}}', {renamed})"
    old_keys = ", ".join(f"'{old}'" for old in names)
    op.execute(f"UPDATE {table} SET {column} = {renamed} WHERE {value} ?| ARRAY[{old_keys}]")


def rename_keys_in_list(table: str, column: str, key: str | None, names: Mapping[str, str]) -> None:
    """Rename the keys of each JSON object in a list: that at `key`, or the column itself."""
    value = f"{column} -> '{key}'" if key else column
    renamed = f"(SELECT jsonb_agg({renamed_object('item', names)}) FROM jsonb_array_elements({value}) AS item)"
    if key:
        renamed = f"jsonb_set({column}, '{{{key}}}', {renamed})"
    op.execute(f"UPDATE {table} SET {column} = {renamed} WHERE jsonb_typeof({value}) = 'array' AND {value} <> '[]'")


def renamed_object(value: str, names: Mapping[str, str]) -> str:
    """Return the SQL of a JSON object with its keys renamed."""
    cases = " ".join(f"WHEN '{old}' THEN '{new}'" for old, new in names.items())
    return f"(SELECT jsonb_object_agg(CASE key {cases} ELSE key END, value) FROM jsonb_each({value}))"


def rename_method(old: str, new: str) -> None:
    op.drop_constraint("ck_checkpoint_edits_method", "checkpoint_edits")
    op.execute(f"UPDATE checkpoint_edits SET method = '{new}' WHERE method = '{old}'")
    op.alter_column("checkpoint_edits", "method", server_default=new)
    op.create_check_constraint("method", "checkpoint_edits", f"method IN ('{new}', 'cross_attention')")


def replace_outbox() -> None:
    """Notifications are sent after the commit, and again by the sweeper: no table holds them."""
    op.drop_table("outbox")
    op.alter_column("jobs", "turn", new_column_name="fair_order")
    op.add_column("jobs", sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False))
    op.execute("UPDATE jobs SET due_at = created_at, progress = NULL")


def restore_outbox() -> None:
    op.drop_column("jobs", "due_at")
    op.alter_column("jobs", "fair_order", new_column_name="turn")
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(), primary_key=True),
        sa.Column("job_id", sa.Uuid(), sa.ForeignKey("jobs.id", name="fk_outbox_job_id"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )
