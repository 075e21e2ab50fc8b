"""Problems that Hub clients read from the headers `X-Error-Code` and `X-Error-Message`."""

import re
from http import HTTPStatus

from app.problems import Problem


class HubProblem(Problem):
    """`code` selects the exception that clients raise: RepositoryNotFoundError, RevisionNotFoundError and so on."""

    title = Problem.title
    code: str | None = None

    def __init__(self, detail: str, *, commit: str | None = None, challenge: bool = False) -> None:
        headers = {"X-Error-Message": re.sub(r"[^ -~]", "?", detail)}  # printable ASCII only
        if self.code:
            headers["X-Error-Code"] = self.code
        if commit:
            headers["X-Repo-Commit"] = commit
        if challenge:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(detail, headers=headers)


class RepoNotFound(HubProblem):
    """No model has this namespace and name."""

    status, title, code = HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound"


class RevisionNotFound(HubProblem):
    """The model has no published checkpoint of this name."""

    status, code = HTTPStatus.NOT_FOUND, "RevisionNotFound"


class RevisionRetracted(HubProblem):
    """The checkpoint was retracted."""

    status, code = HTTPStatus.GONE, "RevisionNotFound"


class EntryNotFound(HubProblem):
    """The revision has no such file or folder."""

    status, code = HTTPStatus.NOT_FOUND, "EntryNotFound"


class TokenMissing(HubProblem):
    """The request has no key. The Hub answers as if the repository did not exist."""

    status, title, code = HTTPStatus.UNAUTHORIZED, "Unauthorized", "RepoNotFound"


class TokenInvalid(HubProblem):
    """The key is wrong. There is no code: clients recognize this message."""

    status, title = HTTPStatus.UNAUTHORIZED, "Unauthorized"
    MESSAGE = "Invalid credentials in Authorization header"


class ScopeMissing(HubProblem):
    """The key lacks the scope `read`."""

    status, title, code = HTTPStatus.FORBIDDEN, "Forbidden", "GatedRepo"
