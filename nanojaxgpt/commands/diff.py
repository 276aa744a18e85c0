"""In: the arguments of `nanojaxgpt diff`. Out: what differs between two runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanojaxgpt import rundiff
from nanojaxgpt.arguments import Command, integer, parse
from nanojaxgpt.checks import show
from nanojaxgpt.errors import ConfigError, RunsDiffer
from nanojaxgpt.rundiff import IDENTITY, LOSSES, Section


def diff(arguments: list[str]) -> None:
    """Print what differs between two runs: config, code, data, losses, checkpoints.

    Exit 0 whether or not they differ; with --check, raises RunsDiffer (exit 1) where config, losses
    or checkpoints do, or can't be compared.
    """
    options: dict[str, dict[str, Any]] = {
        "step": {
            "default": 0,
            "type": integer(1),
            "help": "step of the checkpoints; default: the newest that both have",
        },
        "check": {
            "action": "store_true",
            "help": "exit 1 where config, losses or checkpoints differ or can't be compared",
        },
        "json": {"action": "store_true", "help": "print the result as JSON"},
    }
    second = {"other": {"metavar": "B", "help": "the run directory to compare it with"}}
    parsed = parse("diff", diff.__doc__, arguments, options, ("A", "a run directory"), second)
    if not (parsed.run and parsed.other):
        raise ConfigError("diff needs two run directories: nanojaxgpt diff RUN RUN")
    if parsed.overrides:
        raise ConfigError("diff reads the configs of two runs and takes no --config overrides")
    found = rundiff.compare_runs((Path(parsed.run), Path(parsed.other)), parsed.step)
    differing = rundiff.differing(found)
    if parsed.json:
        print(json.dumps({**found, "differing": differing}, indent=2))
    else:
        print("\n".join(describe_comparison(found)))
    if parsed.check and differing:
        raise RunsDiffer(f"the runs differ in {', '.join(differing)}")


def describe_comparison(found: dict[str, Any]) -> list[str]:
    """Return a comparison as lines: one for each section, and a table below where it differs."""
    kinds = dict.fromkeys(("config", *IDENTITY), pair_lines)
    kinds |= dict.fromkeys(LOSSES, loss_lines) | {"checkpoint": array_lines}
    lines = [f"{letter}  {run}" for letter, run in zip("AB", found["runs"], strict=True)]
    for name, lines_of in kinds.items():
        section = found[name]
        title = name if section.get("step") is None else f"{name} of step {section['step']}"
        problem = section["problem"]
        summary, *table = [f"not compared: {problem}"] if problem else lines_of(section)
        lines += [f"{title}: {summary}", *table]
    return lines


def pair_lines(section: Section) -> list[str]:
    """Return the summary of a section of named values, and its table."""
    rows = [(name, *map(value_text, pair)) for name, pair in section["differing"].items()]
    if not rows:
        return ["the same"]
    return ["different", *columns([("", "A", "B"), *rows])]


def value_text(value: Any) -> str:
    """Return a value as text: None is missing, a list of equal devices is counted."""
    if value is None:
        return "(none)"
    if isinstance(value, list) and value and len(set(map(str, value))) == 1:
        return f"{len(value)} x {value[0]}"
    return value if isinstance(value, str) and value else show(value)


def loss_lines(section: Section) -> list[str]:
    """Return the summary of a loss over the steps that both runs logged, and the first pair."""
    common, (left, right) = section["common"], section["logged"]
    logged = f" (A logged {left}, B {right})" if left != right else ""
    if not common:
        return ["none logged"]
    if not section["differing"]:
        return [f"the same, {common} of {common} common steps{logged}"]
    first = section["first"]
    values = [f"{value:.9g}" for value in first["values"]]
    row = (str(first["step"]), *values, f"{first['difference']:.3g}")
    return [
        f"different at {section['differing']} of {common} common steps{logged}, first at",
        *columns([("step", "A", "B", "B - A"), row]),
    ]


def array_lines(section: Section) -> list[str]:
    """Return the summary of two checkpoints, and a row for each array that differs."""
    rows, arrays = section["differing"], section["arrays"]
    if section["step"] is None:
        return ["none saved"]
    if not rows:
        return [f"the same in all {arrays} arrays"]
    table = [("array", "largest difference")]
    for row in rows:
        difference = f"{row['largest']:.3g}" if row["largest"] is not None else ""
        table.append((row["array"], difference or " against ".join(map(kind, row["kinds"]))))
    summary = f"different in {len(rows)} of {arrays} arrays, first in {rows[0]['array']}"
    return [summary, *columns(table)]


def kind(saved: list[Any]) -> str:
    """Return dtype and shape of an array, as `read_leaves` gives them, or that there is none."""
    return f"{saved[0]} {saved[1]}" if saved else "(none)"


def columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return rows as aligned, indented lines."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (zip(row, widths, strict=True) for row in rows)
    return ["  " + "  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded]


COMMANDS = {
    "diff": Command(
        diff,
        "RUN RUN [--step=N] [--check] [--json]",
        "what differs between two runs",
        order=5,
    )
}
