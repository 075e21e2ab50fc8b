"""Rename columns and JSON keys to the terms of the field, and store one value per edit."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Row
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
breaking = True  # stop the service first: code from before cannot use the new names

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
JOB_KINDS = ("register_model", "estimate_statistics", "optimize_edit", "build_checkpoint", "evaluate_checkpoint")
WEBHOOK_COLUMNS = {
    "salt": "secret_salt",
    "previous_salt": "previous_secret_salt",
    "previous_until": "previous_secret_expires_at",
    "held_until": "paused_until",
}
NOW = sa.func.now()
UPDATE = {"residual": "residual_schedule", "mass": "moment_weight"}
FILE = {"name": "path"}
CROSS_ATTENTION = {"lamb": "regularization_weight"}
REPORT = {"unjudged": "not_evaluated"}
CHECKPOINT_REPORT = {"residuals": "relative_residuals"}
CONFIDENCES = {"oracle": "destination"}
REPORTED_EDIT = {"took": "succeeded", "oracle": "destination_score"}
BATCH = 500


def upgrade() -> None:
    rename_keys("edits", "settings", (), SETTINGS)
    join_values()
    rename_keys("evaluations", "request", (), SAMPLING)
    rename_keys("evaluations", "report", (), REPORT)
    rename_keys("evaluations", "report", ("confidences",), CONFIDENCES)
    rename_keys_in_list("evaluations", "report", "edits", REPORTED_EDIT)
    rename_keys_in_list("evaluations", "files", None, FILE)
    rename_keys("checkpoints", "options", (), UPDATE)
    rename_keys("checkpoints", "options", ("cross_attention",), CROSS_ATTENTION)
    rename_keys("checkpoints", "report", (), CHECKPOINT_REPORT)
    rename_method("memory", "text_encoder")
    replace_outbox()
    make_deliveries_jobs()


def downgrade() -> None:
    restore_delivery_leases()
    restore_outbox()
    rename_method("text_encoder", "memory")
    rename_keys("checkpoints", "report", (), reverse(CHECKPOINT_REPORT))
    rename_keys("checkpoints", "options", ("cross_attention",), reverse(CROSS_ATTENTION))
    rename_keys("checkpoints", "options", (), reverse(UPDATE))
    rename_keys_in_list("evaluations", "files", None, reverse(FILE))
    rename_keys_in_list("evaluations", "report", "edits", reverse(REPORTED_EDIT))
    rename_keys("evaluations", "report", ("confidences",), reverse(CONFIDENCES))
    rename_keys("evaluations", "report", (), reverse(REPORT))
    rename_keys("evaluations", "request", (), reverse(SAMPLING))
    rename_keys("edits", "settings", (), reverse(SETTINGS))
    split_values()


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


def set_job_kinds(*kinds: str) -> None:
    op.drop_constraint("ck_jobs_kind", "jobs")
    op.create_check_constraint("kind", "jobs", f"kind IN ({', '.join(map(repr, kinds))})")


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


def join_values() -> None:
    """Store one safetensors file per edit instead of one row per text encoder."""
    op.add_column("edit_values", sa.Column("content", sa.LargeBinary()))
    op.add_column("edit_values", sa.Column("encoders", JSONB()))
    op.add_column("edit_values", sa.Column("balance", JSONB()))
    rows = "SELECT edit_id, encoder, layer, delta, hidden, losses, engine FROM edit_values ORDER BY edit_id, encoder"
    update = """
        UPDATE edit_values SET content = :content, sha256 = :sha256, encoders = CAST(:encoders AS jsonb),
            balance = CAST(:balance AS jsonb), losses = losses - '{delta_norm,hidden_norm,settings,balance}'::text[]
        WHERE edit_id = :edit_id AND encoder = :encoder"""
    convert(update, (joined(list(parts)) for _, parts in groupby(read(rows), key=lambda row: row.edit_id)))
    op.execute("DELETE FROM edit_values WHERE content IS NULL")
    op.drop_constraint("pk_edit_values", "edit_values")
    for column in ("encoder", "layer", "delta", "hidden"):
        op.drop_column("edit_values", column)
    op.create_primary_key("pk_edit_values", "edit_values", ["edit_id"])
    for column in ("content", "encoders"):
        op.alter_column("edit_values", column, nullable=False)


def joined(parts: Sequence[Row[Any]]) -> dict[str, Any]:
    """Return the parameters of the row that replaces the rows of one edit."""
    first = parts[0]
    content = to_safetensors(
        {
            f"{part.encoder}.{name}": vector
            for part in parts
            for name, vector in (("delta", part.delta), ("hidden", part.hidden))
        },
        facts={"engine_version": first.engine, "layers": {part.encoder: part.layer for part in parts}},
    )
    norms = ("delta_norm", "hidden_norm")
    encoders = [
        {"name": part.encoder, "layer": part.layer, **{norm: part.losses.get(norm) for norm in norms}} for part in parts
    ]
    balance = first.losses.get("balance")
    return {
        "edit_id": first.edit_id,
        "encoder": first.encoder,
        "content": content,
        "sha256": hashlib.sha256(content).hexdigest(),
        "encoders": json.dumps(encoders),
        "balance": None if balance is None else json.dumps(balance),
    }


def split_values() -> None:
    """Store one row per text encoder again."""
    op.drop_constraint("pk_edit_values", "edit_values")
    op.add_column("edit_values", sa.Column("encoder", sa.String()))
    op.add_column("edit_values", sa.Column("layer", sa.Integer()))
    op.add_column("edit_values", sa.Column("delta", sa.LargeBinary()))
    op.add_column("edit_values", sa.Column("hidden", sa.LargeBinary()))
    rows = """
        SELECT edit_id, content, encoders, balance, losses, attempt, engine, settings, edit_values.created_at
        FROM edit_values JOIN edits ON edits.id = edit_id"""
    insert = """
        INSERT INTO edit_values
            (edit_id, encoder, layer, delta, hidden, sha256, content, encoders, losses, attempt, engine, created_at)
        VALUES (:edit_id, :encoder, :layer, :delta, :hidden, :sha256, :content, '[]', CAST(:losses AS jsonb), :attempt,
            :engine, :created_at)"""
    convert(insert, (part for row in read(rows) for part in split(row)))
    op.execute("DELETE FROM edit_values WHERE encoder IS NULL")
    for column in ("content", "encoders", "balance"):
        op.drop_column("edit_values", column)
    for column in ("encoder", "layer", "delta", "hidden"):
        op.alter_column("edit_values", column, nullable=False)
    op.create_primary_key("pk_edit_values", "edit_values", ["edit_id", "encoder"])


def split(row: Row[Any]) -> list[dict[str, Any]]:
    """Return the parameters of the rows that replace the row of one edit."""
    tensors = from_safetensors(row.content)
    parts = []
    for encoder in row.encoders:
        delta, hidden = (tensors[f"{encoder['name']}.{name}"] for name in ("delta", "hidden"))
        losses = {
            **row.losses,
            "delta_norm": encoder["delta_norm"],
            "hidden_norm": encoder["hidden_norm"],
            "settings": row.settings,
            "balance": row.balance,
        }
        parts.append(
            {
                "edit_id": row.edit_id,
                "encoder": encoder["name"],
                "layer": encoder["layer"],
                "delta": delta,
                "hidden": hidden,
                "sha256": hashlib.sha256(delta + hidden).hexdigest(),
                "content": b"",
                "losses": json.dumps(losses),
                "attempt": row.attempt,
                "engine": row.engine,
                "created_at": row.created_at,
            }
        )
    return parts


def to_safetensors(vectors: Mapping[str, bytes], *, facts: Mapping[str, Any]) -> bytes:
    """Write float32 vectors as `editing.EditValue` does, without torch."""
    header: dict[str, Any] = {"__metadata__": {"edit_value": json.dumps(facts)}}
    start = 0
    for name, vector in sorted(vectors.items()):
        header[name] = {"dtype": "F32", "shape": [len(vector) // 4], "data_offsets": [start, start + len(vector)]}
        start += len(vector)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(vector for _, vector in sorted(vectors.items()))


def from_safetensors(content: bytes) -> dict[str, bytes]:
    """Return the bytes of each tensor of a file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    spans = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    return {name: content[start + first : start + last] for name, (first, last) in spans.items()}


def read(query: str) -> Iterator[Row[Any]]:
    """Read rows in batches, so that memory holds few vectors at a time."""
    return iter(op.get_bind().execute(sa.text(query).execution_options(yield_per=BATCH)))


def convert(statement: str, rows: Iterator[Mapping[str, Any]]) -> None:
    """Execute the statement once for each row."""
    while batch := list(islice(rows, BATCH)):
        op.get_bind().execute(sa.text(statement), batch)


def make_deliveries_jobs() -> None:
    """Each delivery has a job: it has the attempts, the time of the next one, and the lease."""
    set_job_kinds(*JOB_KINDS, "deliver_webhook")
    op.execute("""
        INSERT INTO jobs (id, kind, target_id, state, created_by, created_at, due_at, attempt, finished_at,
                          payload_version, cancel_requested)
        SELECT id, 'deliver_webhook', id,
               CASE state WHEN 'pending' THEN 'queued' WHEN 'delivered' THEN 'succeeded' ELSE 'failed' END,
               'webhook:' || webhook_id, created_at, due_at, tries, ended_at, 1, false
        FROM webhook_deliveries
    """)
    op.drop_index("ix_webhook_deliveries_due", "webhook_deliveries")
    for column in ("due_at", "tries", "ended_at"):
        op.drop_column("webhook_deliveries", column)
    for old, new in WEBHOOK_COLUMNS.items():
        op.alter_column("webhooks", old, new_column_name=new)
    op.alter_column("webhooks", "paused_until", nullable=True, server_default=None)
    op.drop_column("webhooks", "holds")
    op.drop_index("ix_jobs_queue", "jobs")
    delivery = "kind = 'deliver_webhook'"
    order = ["fair_order", "id"]
    op.create_index("ix_jobs_queue", "jobs", order, postgresql_where=f"state = 'queued' AND NOT {delivery}")
    op.create_index("ix_jobs_deliveries", "jobs", order, postgresql_where=f"state = 'queued' AND {delivery}")
    op.create_index("ix_jobs_running", "jobs", ["kind"], postgresql_where="state = 'running'")


def restore_delivery_leases() -> None:
    for name in ("ix_jobs_running", "ix_jobs_deliveries", "ix_jobs_queue"):
        op.drop_index(name, "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["fair_order", "id"], postgresql_where="state = 'queued'")
    op.add_column("webhooks", sa.Column("holds", sa.Integer(), nullable=False, server_default="0"))
    op.alter_column("webhooks", "holds", server_default=None)
    op.execute("UPDATE webhooks SET paused_until = now() WHERE paused_until IS NULL")
    op.alter_column("webhooks", "paused_until", nullable=False, server_default=NOW)
    for new, old in reverse(WEBHOOK_COLUMNS).items():
        op.alter_column("webhooks", new, new_column_name=old)
    time = sa.DateTime(timezone=True)
    op.add_column("webhook_deliveries", sa.Column("due_at", time, nullable=False, server_default=NOW))
    op.add_column("webhook_deliveries", sa.Column("tries", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("webhook_deliveries", sa.Column("ended_at", time))
    op.alter_column("webhook_deliveries", "tries", server_default=None)
    op.execute("""
        UPDATE webhook_deliveries SET due_at = jobs.due_at, tries = jobs.attempt, ended_at = jobs.finished_at
        FROM jobs WHERE jobs.target_id = webhook_deliveries.id AND jobs.kind = 'deliver_webhook'
    """)
    columns = ["webhook_id", "due_at", "id"]
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", columns, postgresql_where="state = 'pending'")
    op.create_index("ix_webhook_deliveries_ended_at", "webhook_deliveries", ["ended_at"])
    op.execute("DELETE FROM jobs WHERE kind = 'deliver_webhook'")
    set_job_kinds(*JOB_KINDS)
