"""Run the command `emender`: `python -m emender`."""

import sys


def main() -> None:
    """Run the command, or say how to install what it needs."""
    try:
        from emender.cli.main import main as run_command
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(f"{error.name} is not installed: pip install 'emender-client[cli]'")
    run_command()


if __name__ == "__main__":
    main()
