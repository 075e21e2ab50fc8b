"""Allow edits of a checkpoint in the transformer's text projection."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    set_methods("text_encoder", "cross_attention", "text_projection")


def downgrade() -> None:
    """Fails where a checkpoint has edits in a text projection: the older schema has no place for them."""
    set_methods("text_encoder", "cross_attention")


def set_methods(*methods: str) -> None:
    op.drop_constraint("ck_checkpoint_edits_method", "checkpoint_edits")
    op.create_check_constraint("method", "checkpoint_edits", f"method IN ({', '.join(map(repr, methods))})")
