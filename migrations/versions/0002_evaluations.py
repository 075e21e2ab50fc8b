"""evaluations, and what judges pictures"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"

KINDS = "'register_model', 'estimate_statistics', 'optimize_edit', 'build_checkpoint'"


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("checkpoint_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("report", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("problem", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('preview', 'check', 'evaluation')", name=op.f("ck_evaluations_kind")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'ready', 'failed', 'cancelled')", name=op.f("ck_evaluations_state")
        ),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_evaluations_checkpoint_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
    )
    op.add_column("base_models", sa.Column("classifier", sa.String(), nullable=True))
    op.create_index(op.f("ix_evaluations_checkpoint_id"), "evaluations", ["checkpoint_id"], unique=False)
    op.drop_constraint(op.f("ck_jobs_kind"), "jobs", type_="check")
    op.create_check_constraint(op.f("ck_jobs_kind"), "jobs", f"kind IN ({KINDS}, 'evaluate_checkpoint')")


def downgrade() -> None:
    op.execute("DELETE FROM outbox USING jobs WHERE outbox.job_id = jobs.id AND jobs.kind = 'evaluate_checkpoint'")
    op.execute("DELETE FROM jobs WHERE kind = 'evaluate_checkpoint'")
    op.drop_constraint(op.f("ck_jobs_kind"), "jobs", type_="check")
    op.create_check_constraint(op.f("ck_jobs_kind"), "jobs", f"kind IN ({KINDS})")
    op.drop_column("base_models", "classifier")
    op.drop_index(op.f("ix_evaluations_checkpoint_id"), table_name="evaluations")
    op.drop_table("evaluations")
