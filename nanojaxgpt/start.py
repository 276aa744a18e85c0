"""The program `nanojaxgpt`: signal handlers first, then the imports that take time."""

from nanojaxgpt.hosts import process


def main() -> int:
    """Run the command that the arguments name; return its exit code."""
    process.end_at_signals()
    from nanojaxgpt.__main__ import main as run

    return run()
