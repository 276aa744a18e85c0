"""The command line: `nanojaxgpt COMMAND ...`, or `python -m nanojaxgpt COMMAND ...`.

The modules of commands/ are the commands. They import jax after they have checked the config, so
that a mistake fails immediately.
"""

import sys

from nanojaxgpt.hosts import process

if __name__ == "__main__":
    process.end_at_signals()

import importlib
import pkgutil

from nanojaxgpt import __version__, commands, console
from nanojaxgpt.arguments import Command
from nanojaxgpt.config import cache_path
from nanojaxgpt.console import explain
from nanojaxgpt.errors import OK, ConfigError
from nanojaxgpt.names import unknown_name

OVERRIDES = """\
--config.SECTION.FIELD=VALUE sets any field of the config, as in --config.optim.learning_rate=3e-4.
nanojaxgpt COMMAND --help lists a command's options."""


def find_commands() -> dict[str, Command]:
    """Return {name: command} of the modules in commands/, in the order of the help."""
    found: dict[str, Command] = {}
    for module in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        found |= importlib.import_module(module.name).COMMANDS
    return dict(sorted(found.items(), key=lambda item: item[1].order))


COMMANDS = find_commands()


def usage() -> str:
    """Return the help: a line per command, and how to set a field of the config."""
    calls = [f"  {name:<6} {command.usage}" for name, command in COMMANDS.items()]
    width = max(map(len, calls)) + 2
    lines = [
        call.ljust(width) + command.about
        for call, command in zip(calls, COMMANDS.values(), strict=True)
    ]
    return "\n".join(["nanojaxgpt COMMAND ...", "", *lines, "", OVERRIDES])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console.open_standard_streams()
    name = arguments[0] if arguments else ""
    if "--verbose" not in arguments:
        console.quiet_libraries()
    writes_files = name in COMMANDS and COMMANDS[name].writes_files
    with process.ending_at_signals(), console.guarded_output(optional=writes_files):
        try:
            run_command(name, arguments[1:])
            console.LIBRARY_ERRORS.report()
            sys.stdout.flush()
            return OK if arguments else ConfigError.exit_code
        except BaseException as error:
            return explain(error)


def run_command(name: str, arguments: list[str]) -> None:
    """Run the command of this name, or print the help. Raises ConfigError for an unknown one."""
    if name in ("", "-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        process.keep_freed_memory()
        process.keep_compiled_programs(cache_path("") / "compiled")
        COMMANDS[name].run(arguments)
    else:
        raise ConfigError(unknown_name("command", name, list(COMMANDS)))


if __name__ == "__main__":
    process.leave(main())
