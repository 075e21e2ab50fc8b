"""Exit codes of the commands, and the error that has one. `emender checkpoints pull` uses the same codes."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes with the descriptions of docs/reference/exit-codes.md."""

    def __new__(cls, code: int, description: str = "") -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.__doc__ = description
        return member

    DONE = 0, "success"
    FAILED = 1, "the work failed or was cancelled, or a check found a problem"
    USAGE = 2, "invalid arguments or settings"
    UNREACHABLE = 3, "no response, or a server error: the service, its database or a proxy is down"
    UNAUTHORIZED = 4, "no API key, an invalid one, or one without the scope"
    NOT_FOUND = 5, "the resource does not exist or was retracted"
    UNVERIFIED = 6, "pull: the signature, a digest or the manifest is wrong; `current` stays"
    DISK = 7, "a file or a folder cannot be read or written"
    BUSY = 8, "pull: another pull uses the folder"
    COMMAND_FAILED = 9, "pull: the command of `--on-change` failed; it runs again next time"
    CHANGED = 10, "pull with `--exit-code`: the checkpoint changed"
    REJECTED = 11, "the service rejected the request; the message names the fields"
    CONFLICT = 12, "the resource is in another state than required, or someone else changed it first"
    TIMED_OUT = 13, "`--timeout` has passed; the work continues"
    INTERRUPTED = 130, "Ctrl-C; the work continues"


class CommandError(Exception):
    """The reason why a command failed, printed as it is, with its exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class UsageError(CommandError):
    """Arguments or settings that are invalid or do not go together."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)
