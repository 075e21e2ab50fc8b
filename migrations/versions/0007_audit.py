"""audit events say why and from where and are never changed; keys expire"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

# Requests write to audit_events last: locked in their order, tables make nobody wait for each other.
APPEND_ONLY = ("alias_moves", "audit_events")
INDEXES = ("at", "request_id")


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.execute(
        """
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% takes new rows only: % is refused', TG_TABLE_NAME, TG_OP
                USING ERRCODE = 'insufficient_privilege';
        END $$
        """
    )
    op.alter_column("alias_moves", "moved_at", server_default=sa.text("clock_timestamp()"))
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
        op.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only")  # also for `session_replication_role`
    for column in ("before jsonb", "after jsonb", "reason varchar", "request_id varchar", "address varchar"):
        op.execute(f"ALTER TABLE audit_events ADD COLUMN IF NOT EXISTS {column}")  # they outlive a downgrade
    for column in INDEXES:
        op.create_index(op.f(f"ix_audit_events_{column}"), "audit_events", [column])
    op.execute("CREATE INDEX ix_audit_events_edits ON audit_events USING gin ((details -> 'edits'))")


def downgrade() -> None:
    """Keep the columns of `audit_events`, since the events' hashes cover them. A key that was to expire is revoked."""
    op.execute("UPDATE api_keys SET revoked_at = now() WHERE expires_at IS NOT NULL AND revoked_at IS NULL")
    op.drop_column("api_keys", "expires_at")
    op.alter_column("alias_moves", "moved_at", server_default=sa.text("now()"))
    for table in APPEND_ONLY:
        op.execute(f"DROP TRIGGER append_only ON {table}")
    op.execute("DROP FUNCTION refuse_change")
    op.drop_index("ix_audit_events_edits", table_name="audit_events")
    for column in INDEXES:
        op.drop_index(op.f(f"ix_audit_events_{column}"), table_name="audit_events")
