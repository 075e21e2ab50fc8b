"""Privileges of the service's role where another role owns the tables: all but to rewrite history."""

from sqlalchemy import Connection, Engine, text

APPEND_ONLY = ("audit_events", "alias_moves")
"""Tables whose rows are never changed. A trigger denies it to their owner too."""


class RoleUnfit(Exception):
    """No privilege can be denied to the role. The message says why and what to do."""


def grant_privileges(engine: Engine, *, role: str) -> None:
    """Grant `role` the use of the tables that the connection's role owns. Repeat it after each migration.

    Raises `RoleUnfit` if there is no such role, or if it is a superuser or a member of the tables' owner.
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
    query = text(
        "SELECT rolsuper, pg_has_role(pg_roles.oid, relowner, 'MEMBER') AS owner FROM pg_roles, pg_class "
        "WHERE rolname = :role AND pg_class.oid = 'audit_events'::regclass"
    )
    found = connection.execute(query, {"role": role}).one_or_none()
    if found is None:
        raise RoleUnfit(f"There is no role {role!r}; create it first: CREATE ROLE … LOGIN PASSWORD …")
    if found.rolsuper or found.owner:
        reason = "is a superuser" if found.rolsuper else "is a member of the tables' owner"
        raise RoleUnfit(f"The role {role!r} {reason}, so no privilege can be denied to it; name another role.")
