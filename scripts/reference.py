"""Write the parts of the docs that repeat the code: docs/config.md, tables in other pages.

    python scripts/reference.py           # write them
    python scripts/reference.py --check   # exit 1 if the committed pages are out of date

The config's fields come from config/sections.py, other projects' names from names.py, and what the
attention kernels support from themselves (docs/attention.md).
"""

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from nanojaxgpt.attention import AUTO, KERNELS
from nanojaxgpt.attention.request import Request
from nanojaxgpt.config import sections
from nanojaxgpt.config.sections import Rule
from nanojaxgpt.names import MAXTEXT, NANOGPT, OTHER_NAMES, TRANSFORMERS

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = """\
# Config reference

<!-- Written by scripts/reference.py from nanojaxgpt/config/sections.py. -->

Every field of an experiment, with its default. Set a field in an experiment file
(`cfg.optim.learning_rate = 3e-4`) or on the command line (`--config.optim.learning_rate=3e-4`).
`0` and `""` turn a feature off or select a default, as the last column says.

Fields marked "yes" under "resume" may change when a run is resumed; so may `train.num_steps`, if
the schedule allows it ([Longer runs](optimizers.md#longer-runs-and-branches)). A change of any
other field makes a different run, which needs a new `--run`.
"""
BEGIN = "<!-- Written by scripts/reference.py from nanojaxgpt/{}. -->"
END = "<!-- Until here. -->"
PROJECTS = (NANOGPT, MAXTEXT, TRANSFORMERS)
# What a call of attention may ask for, beside a causal mask over rows of 1,024 tokens in bfloat16.
FEATURES: dict[str, dict] = {
    "window": dict(window=256),
    "packed rows": dict(packed=True),
    "grouped heads": dict(key_heads=2),
    "softcap": dict(softcap=50.0),
    "ALiBi": dict(alibi=True),
    "dropout": dict(dropout=0.1),
    "odd length": dict(query_length=1001, key_length=1001),
    "float32": dict(dtype="float32"),
    "head_dim=20": dict(head_dim=20),
    "fewer queries than keys": dict(query_length=4),
}
LIMIT = 1e9  # beyond this a range has no upper end worth showing


def values(rule: Rule) -> str:
    """Return which values a field takes, in words."""
    several = "tuple of " if isinstance(rule.default, tuple) else ""
    if rule.choices:
        return several + ", ".join(f"`{choice}`" for choice in rule.choices)
    if rule.item is bool:
        return "`True`, `False`"
    if rule.item is str:
        return f"{several}text"
    kind = {int: "integer", float: "number"}[rule.item]
    kind = f"{several}{kind}s" if several else kind
    if rule.high < LIMIT:
        whole = rule.high == int(rule.high)
        return f"{kind}, {rule.low:g} to {f'{rule.high:g}' if whole else 'below 1'}"
    return f"{kind}, above 0" if 0 < rule.low < 1e-9 else f"{kind}, at least {rule.low:g}"


def row(name: str, rule: Rule) -> str:
    """Return a field's line of the table."""
    default = rule.default
    shown = json.dumps(default) if isinstance(default, str) else repr(default)
    cells = [f"`{name}`", f"`{shown}`", values(rule), "yes" if rule.resume else "", rule.comment]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def config_page() -> str:
    """Return docs/config.md."""
    tables = []
    for section, kind in sections.kinds(sections.Config).items():
        lines = [f"## {section}", "", inspect.getdoc(kind) or "", ""]
        lines += ["| field | default | values | resume | |", "|---|---|---|---|---|"]
        lines += [row(f"{section}.{name}", rule) for name, rule in kind.rules().items()]
        tables.append("\n".join(lines) + "\n")
    return "\n".join([HEAD, *tables])


def quoted(names: Iterable[str]) -> str:
    """Return the names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def name_notes(theirs: list[str], by_project: list[list[str]]) -> str:
    """Return the notes on these names; a note that concerns only some of them names those."""
    notes = []
    for note in dict.fromkeys(OTHER_NAMES[name].note for name in theirs):
        about = [name for name in theirs if OTHER_NAMES[name].note == note]
        whole = [p for p, names in zip(PROJECTS, by_project, strict=True) if names == about]
        label = "" if about == theirs else f"{whole[0] if whole else quoted(about)}: "
        notes += [label + note] if note else []
    return "; ".join(notes)


def names_tables() -> str:
    """Return, for each section of the config, a table of other projects' names."""
    rows: dict[tuple[str, ...], list[str]] = {}  # our names: theirs
    for theirs, other in OTHER_NAMES.items():
        rows.setdefault(other.names, []).append(theirs)
    sections: dict[str, list[str]] = {}
    for ours, theirs in rows.items():
        by_project = [[n for n in theirs if p in OTHER_NAMES[n].projects] for p in PROJECTS]
        cells = [quoted(ours), *map(quoted, by_project), name_notes(theirs, by_project)]
        section = "command line" if ours[0].startswith("--") else ours[0].split(".")[0]
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    head = f"| here | {' | '.join(PROJECTS)} | |\n|---|---|---|---|---|\n"
    return "\n".join(
        f"### {section}\n\n{head}" + "\n".join(lines) + "\n" for section, lines in sections.items()
    )


def kernels_table() -> str:
    """Return a table of the features that each attention kernel supports, and why others not."""
    home = {names[0]: platform for platform, names in AUTO.items()}
    head = f"| | {' | '.join(f'`{name}`' for name in KERNELS)} |\n|---|{'---|' * len(KERNELS)}\n"
    rows, reasons = [], []
    for feature, changes in FEATURES.items():
        cells = []
        for name, kernel in KERNELS.items():
            plain = Request(home.get(name, "cpu"), 1024, 1024, 8, 8, 64, "bfloat16")
            reason = kernel.supports(dataclasses.replace(plain, **changes))
            cells.append("no" if reason else "yes")
            reasons += [f"- `{name}`, {feature}: {reason}"] if reason else []
        rows.append(f"| {feature} | {' | '.join(cells)} |")
    return head + "\n".join(rows) + "\n\n" + "\n".join(reasons) + "\n"


def filled(page: Path, source: str, table: str) -> str:
    """Return a page with `table` in the place of what was written from `source` before."""
    begin = BEGIN.format(source)
    before, rest = page.read_text().split(begin)
    return f"{before}{begin}\n\n{table}\n{END}{rest.split(END)[1]}"


def pages() -> dict[Path, str]:
    """Return what the generated pages should hold."""
    migrate, attention = DOCS / "migrate.md", DOCS / "attention.md"
    return {
        DOCS / "config.md": config_page(),
        migrate: filled(migrate, "names.py", names_tables()),
        attention: filled(attention, "attention/", kernels_table()),
    }


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check compare them; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check, stale = parser.parse_args(arguments).check, False
    for path, text in pages().items():
        if path.read_text() == text:
            continue
        stale = True
        if check:
            print(f"{path} is out of date; run python scripts/reference.py", file=sys.stderr)
        else:
            path.write_text(text)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
