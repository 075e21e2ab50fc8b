"""What commands end with: the exit codes, and the error that has one. Those of `pull.py` mean the same there."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The description of each is what docs/reference/exit-codes.md says."""

    def __new__(cls, code: int, description: str = "") -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.__doc__ = description
        return member

    DONE = 0, "done"
    FAILED = 1, "it failed: the work failed or was cancelled, or what was checked is not as it should be"
    USAGE = 2, "wrong arguments or settings"
    UNREACHABLE = 3, "no answer, or none but errors: the service, its database or a proxy before it is away"
    UNAUTHORIZED = 4, "no API key, or it was refused, or it lacks the scope"
    NOT_FOUND = 5, "there is no such thing, or it was retracted"
    UNVERIFIED = 6, "pull: a signature, a digest or the manifest is wrong; `current` stays"
    DISK = 7, "a file or a folder cannot be read or written"
    BUSY = 8, "pull: another pull works in the folder"
    COMMAND_FAILED = 9, "pull: the command of `--on-change` failed; it runs again next time"
    CHANGED = 10, "pull with `--exit-code`: the version changed"
    REJECTED = 11, "the service rejects the request: what is wrong with it is named"
    CONFLICT = 12, "it is in another state than it would have to be, or somebody else was faster"
    TIMED_OUT = 13, "`--timeout` was over; the work goes on"
    INTERRUPTED = 130, "Ctrl-C; what the service was asked for goes on"


class CommandError(Exception):
    """Why a command cannot go on; the message is shown as it stands."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class WrongUsage(CommandError):
    """Arguments or settings that do not go together."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)
