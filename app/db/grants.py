"""What the service's role may do, where another role owns the tables: everything but to rewrite history."""

from sqlalchemy import Connection, Engine, text

APPEND_ONLY = ("audit_events", "alias_moves")
"""Tables whose rows are added and never changed; a trigger refuses it to their owner too."""


class RoleUnfit(Exception):
    """The role cannot be kept from anything; the message says why and what to do."""


def grant(engine: Engine, *, role: str) -> None:
    """Let `role` use the tables that the connection's role owns. To be repeated after a migration.

    Raises `RoleUnfit` where there is no such role, or where it is a superuser or may act as the tables' owner.
    """
    name = engine.dialect.identifier_preparer.quote_identifier(role)
    with engine.begin() as connection:
        _check(connection, role)
        for statement in (
            f"GRANT USAGE ON SCHEMA public TO {name}",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {name}",
            f"REVOKE UPDATE, DELETE, TRUNCATE ON {', '.join(APPEND_ONLY)} FROM {name}",
            f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON alembic_version FROM {name}",
        ):
            connection.exec_driver_sql(statement)


def _check(connection: Connection, role: str) -> None:
    found = connection.execute(
        text(
            "SELECT rolsuper, pg_has_role(pg_roles.oid, relowner, 'MEMBER') AS owner FROM pg_roles, pg_class "
            "WHERE rolname = :role AND pg_class.oid = 'audit_events'::regclass"
        ),
        {"role": role},
    ).one_or_none()
    if found is None:
        raise RoleUnfit(f"There is no role {role!r}; make it first: CREATE ROLE … LOGIN PASSWORD …")
    if found.rolsuper or found.owner:
        why = "is a superuser" if found.rolsuper else "may act as the owner of the tables"
        raise RoleUnfit(f"The role {role!r} {why}, so that nothing can be denied to it; name another.")
