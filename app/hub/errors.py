"""Errors as the Hub's clients read them: by the headers `X-Error-Code` and `X-Error-Message`."""

from http import HTTPStatus

from app.problems import Problem


class HubProblem(Problem):
    """`code` is what a client turns into an exception of its own: RepositoryNotFoundError, RevisionNotFoundError, …"""

    code: str | None = None

    def __init__(self, detail: str, *, commit: str | None = None, challenge: bool = False) -> None:
        headers = {"X-Error-Message": detail.encode("ascii", "replace").decode().replace("\n", " ")}
        if self.code:
            headers["X-Error-Code"] = self.code
        if commit:
            headers["X-Repo-Commit"] = commit
        if challenge:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(detail, headers=headers)


class RepoNotFound(HubProblem):
    status, title, code = HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound"


class RevisionNotFound(HubProblem):
    status, title, code = HTTPStatus.NOT_FOUND, "Revision not found", "RevisionNotFound"


class RevisionRetracted(HubProblem):
    status, title, code = HTTPStatus.GONE, "Revision retracted", "RevisionNotFound"


class EntryNotFound(HubProblem):
    status, title, code = HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound"


class TokenMissing(HubProblem):
    """A repository that an anonymous client may not see does not exist for it."""

    status, title, code = HTTPStatus.UNAUTHORIZED, "Unauthorized", "RepoNotFound"


class TokenInvalid(HubProblem):
    """With no code, clients tell a bad token from a missing repository by this very message."""

    status, title = HTTPStatus.UNAUTHORIZED, "Unauthorized"
    MESSAGE = "Invalid credentials in Authorization header"


class ScopeMissing(HubProblem):
    status, title, code = HTTPStatus.FORBIDDEN, "Forbidden", "GatedRepo"
