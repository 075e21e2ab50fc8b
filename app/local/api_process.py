"""Serve the API in one of several processes: `python -m app.local.api_process`.

Each process listens on the port with a socket of its own, and the kernel spreads connections over them (SO_REUSEPORT,
socket(7)). On a socket that processes share, the first to wake takes all connections of a burst.
"""

import socket

import uvicorn

from app.settings import Settings, get_settings


def listen(settings: Settings) -> socket.socket:
    """Listen on the address of the settings, beside other processes that do the same."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server((settings.host, settings.port), family=family, backlog=2048, reuse_port=True)


def main() -> None:
    """Serve until SIGTERM, then finish the requests that are running."""
    config = uvicorn.Config(
        "app.main:application", factory=True, access_log=False, log_level="warning", timeout_graceful_shutdown=10
    )
    with listen(get_settings()) as listener:
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
