"""Write the part of the docs that repeats the code: docs/config.md.

    python scripts/reference.py           # write them
    python scripts/reference.py --check   # exit 1 if what is committed is out of date

Defaults come from `base_config()`, comments from its source, and values from checks.py.
"""

import inspect
import json
import re
import sys
from pathlib import Path

from nanojaxgpt.checks import CHOICES, RANGES
from nanojaxgpt.config import FREE_ON_RESUME, base_config, fields

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """\
# Config reference

<!-- Written by scripts/reference.py from nanojaxgpt/config.py and checks.py. -->

Every field of an experiment, with its default. Set a field in an experiment file
(`cfg.optim.learning_rate = 3e-4`) or on the command line (`--config.optim.learning_rate=3e-4`).
`0` and `""` turn a feature off or leave the choice to the program, as the last column says.

Fields marked "yes" under "resume" may change when a run is resumed. A change of any other field
makes a different run: it is refused, and belongs in a new `--run`.
"""
LIMIT = 1e9  # beyond this a range has no upper end worth showing


def comments() -> dict[str, str]:
    """Return {"section.field": comment} from the source of base_config; "section" for its own."""
    found, section = {}, ""
    for line in inspect.getsource(base_config).splitlines():
        code, _, comment = line.partition("  # ")
        if begin := re.match(r"\s+cfg\.(\w+) = ConfigDict\(", code):
            section = begin[1]
            found[section] = comment
        elif field := re.match(r"\s+(\w+)=.*,$", code):
            found[f"{section}.{field[1]}"] = comment
    return found


def values(name: str, default: object) -> str:
    """Return which values a field takes, in words."""
    if name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[name])
    if isinstance(default, bool):
        return "`True`, `False`"
    if name not in RANGES:
        return {str: "text", tuple: "tuple of text"}[type(default)]
    low, high = RANGES[name]
    kind = {int: "integer", float: "number", tuple: "tuple of integers"}[type(default)]
    if high < LIMIT:
        return (
            f"{kind}, {low:g} to {high:g}" if high == int(high) else f"{kind}, {low:g} to below 1"
        )
    return f"{kind}, above 0" if 0 < low < 1e-9 else f"{kind}, at least {low:g}"


def row(name: str, default: object, comment: str) -> str:
    """Return a field's line of the table."""
    listed = ", ".join(CHOICES.get(name, ()))
    if listed and comment.removeprefix(listed)[:1] in ("", ":"):  # the choices have a column
        comment = comment.removeprefix(listed).removeprefix(": ")
    shown = json.dumps(default) if isinstance(default, str) else repr(default)
    resume = "yes" if FREE_ON_RESUME.fullmatch(name) else ""
    cells = [f"`{name}`", f"`{shown}`", values(name, default), resume, comment]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def config_page() -> str:
    """Return docs/config.md."""
    lines, defaults = [HEAD], dict(fields(base_config()))
    for name, comment in comments().items():  # in the order of the source
        if name in defaults:
            lines.append(row(name, defaults.pop(name), comment))
            continue
        lines += [f"## {name}", ""] + (
            [f"{comment[:1].upper()}{comment[1:]}.", ""] if comment else []
        )
        lines += ["| field | default | values | resume | |", "|---|---|---|---|---|"]
    if defaults:
        raise SystemExit(f"no line of base_config() was recognized for {', '.join(defaults)}")
    return re.sub(r"(\|)\n## ", r"\1\n\n## ", "\n".join(lines)) + "\n"


def pages() -> dict[Path, str]:
    """Return what the generated pages should hold."""
    return {DOCS / "config.md": config_page()}


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check compare them; return the exit code."""
    for path, text in pages().items():
        if arguments != ["--check"]:
            path.write_text(text)
        elif path.read_text() != text:
            print(f"{path} is out of date: python scripts/reference.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
