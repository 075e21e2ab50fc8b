"""Names of models and namespaces that the Hub's protocol can have in a URL."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
RESERVED = frozenset(
    {"v1", "api", "admin", "docs", "redoc", "openapi.json", "static-offline-docs", "metrics", "healthz", "readyz"}
    | {"models", "datasets", "spaces", "kernels", "buckets"}  # kinds of repository in the Hub's URLs
)


def is_part(name: str) -> bool:
    """Whether `name` may be a namespace or a repository on the Hub."""
    return (
        bool(PART.fullmatch(name)) and "--" not in name and ".." not in name and not name.endswith((".git", ".ipynb"))
    )


def _check_name(name: str) -> str:
    if not is_part(name):
        raise ValueError(
            "must be 1 to 96 of A-Z a-z 0-9 . _ -, not start or end with . or -, not contain -- or .., "
            "and not end with .git or .ipynb"
        )
    if name.lower() in RESERVED:
        raise ValueError(f"{name!r} is reserved for the service's own paths")
    return name


Name = Annotated[str, Field(max_length=96), AfterValidator(_check_name)]
