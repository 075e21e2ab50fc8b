"""Convert rows."""

from typing import Any

from app.db.models import Base


def column_values(row: Base) -> dict[str, Any]:
    """Return the values of a row by column name, as input for a schema that has some of them."""
    return {column.key: getattr(row, column.key) for column in row.__table__.columns}
