"""edits are listed by state, source or who asked in the order of their index"""

from alembic import op

revision = "0011"
down_revision = "0010"

# Whoever creates an index and then drops one takes a weak lock before a strong one, and meets requests in a deadlock.
LOCK = "LOCK TABLE edits IN ACCESS EXCLUSIVE MODE"


def upgrade() -> None:
    op.execute(LOCK)
    for column in ("state", "source", "created_by"):
        op.create_index(f"ix_edits_{column}_id", "edits", [column, "id"])
    op.drop_index("ix_edits_source", table_name="edits")


def downgrade() -> None:
    op.execute(LOCK)
    op.create_index("ix_edits_source", "edits", ["source"])
    for column in ("state", "source", "created_by"):
        op.drop_index(f"ix_edits_{column}_id", table_name="edits")
