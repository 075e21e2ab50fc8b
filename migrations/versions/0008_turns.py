"""jobs know who asked for them, and take turns"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("created_by", sa.String(), nullable=False, server_default=""))
    op.add_column("jobs", sa.Column("turn", sa.BigInteger(), nullable=False, server_default="0"))
    queued = sa.text("state = 'queued'")
    op.create_index("ix_jobs_queue", "jobs", ["turn", "id"], postgresql_where=queued)
    op.create_index("ix_jobs_queue_of", "jobs", ["created_by", "turn"], postgresql_where=queued)


def downgrade() -> None:
    op.drop_index("ix_jobs_queue_of", table_name="jobs")
    op.drop_index("ix_jobs_queue", table_name="jobs")
    op.drop_column("jobs", "turn")
    op.drop_column("jobs", "created_by")
