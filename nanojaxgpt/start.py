"""The program `nanojaxgpt`: signal handlers first, then the imports that take time."""

from typing import NoReturn

from nanojaxgpt.hosts import process


def main() -> NoReturn:
    """Run the command that the arguments name; end with its exit code."""
    process.end_at_signals()
    from nanojaxgpt.__main__ import main as run

    process.leave(run())
