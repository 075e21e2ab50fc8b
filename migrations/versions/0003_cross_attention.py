"""edits of a checkpoint that are written into the U-Net's cross-attention"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("checkpoint_edits", sa.Column("method", sa.String(), server_default="memory", nullable=False))
    op.create_check_constraint(
        op.f("ck_checkpoint_edits_method"), "checkpoint_edits", "method IN ('memory', 'cross_attention')"
    )
    op.alter_column("checkpoints", "alpha", existing_type=sa.Float(), nullable=True)
    op.alter_column("checkpoints", "statistics_id", existing_type=sa.Uuid(), nullable=True)


def downgrade() -> None:
    """Fails where a checkpoint has no memory edits: what it is has no place in the older schema."""
    op.alter_column("checkpoints", "statistics_id", existing_type=sa.Uuid(), nullable=False)
    op.alter_column("checkpoints", "alpha", existing_type=sa.Float(), nullable=False)
    op.drop_constraint(op.f("ck_checkpoint_edits_method"), "checkpoint_edits", type_="check")
    op.drop_column("checkpoint_edits", "method")
