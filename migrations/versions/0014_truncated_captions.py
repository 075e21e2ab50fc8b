"""Count the captions that a tokenizer truncated."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.add_column("statistics", sa.Column("truncated", sa.BigInteger()))


def downgrade() -> None:
    op.drop_column("statistics", "truncated")
