"""The one error that commands end with."""


class CommandError(Exception):
    """Why a command cannot go on; the message is shown as it stands."""
