"""The model that a run started from, as exports name it: its name, its licence, its special tokens.

A run keeps it in provenance.json. Nothing here changes what the model computes: it is for those who
get an export, and for programs that look for a padding token.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.values import TOKEN, check_value
from nanojaxgpt.regular import read_regular

FILE, HUB = "provenance.json", "hf:"
CARD_BYTES = 1 << 20  # of a README.md, of which only the start is read
LONGEST = 100  # characters of a name or a licence
# The keys of config.json and generation_config.json, and of tokenizer_config.json.
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKEN_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Provenance(NamedTuple):
    """Where a model came from; all is empty for one that was trained from scratch here.

    The last three hold ids of special tokens, by the keys of the file that states them: a key that
    the source leaves out is left out.
    """

    name: str = ""  # hf:OWNER/NAME, or the name of a folder or file
    license: str = ""  # as its authors write it, such as apache-2.0
    base: str = ""  # of an adapter that was merged: the name of the model that it adapts
    tokenizer: Mapping[str, int] = {}
    config: Mapping[str, Any] = {}
    generation: Mapping[str, Any] = {}

    @property
    def hub_name(self) -> str:
        """OWNER/NAME where the model, or the base of the adapter, is on the hub; else ""."""
        found = next((name for name in (self.base, self.name) if name.startswith(HUB)), "")
        return found.removeprefix(HUB).partition("@")[0]


SCRATCH = Provenance()  # of a model that was trained here from the start


def stated_ids(path: Path, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the ids of special tokens that a config.json states: null, one, or a list of them.

    Those that are not rows of the model's table are left out; -1 is none. Raises ConfigError for
    another kind of value; `path` names the file.
    """
    found = {}
    for key in ID_KEYS:
        value = config.get(key)
        try:
            check_value(key, value, TOKEN)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        numbers = value if isinstance(value, list) else [value]
        if key in config and all(number is None or number < rows for number in numbers):
            found[key] = value
    return found


def plain_text(value: Any) -> str:
    """Return a name or a licence of somebody else's file as one short line, "" for anything else.

    It is quoted in Markdown, so that it has no backticks.
    """
    return " ".join(value.replace("`", "").split())[:LONGEST] if isinstance(value, str) else ""


def card_license(folder: Path) -> str:
    """Return the licence in the front matter of a folder's README.md, or ""."""
    try:
        with open(folder / "README.md", "rb") as file:
            text = file.read(CARD_BYTES).decode(errors="replace")
    except OSError:
        return ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(r"^license:[ \t]*(\S.*)$", front[1], re.MULTILINE)
    return plain_text(found[1].strip().strip("\"'")) if found else ""


def save_provenance(run: Path, found: Provenance) -> None:
    """Write it into a run directory, where there is any."""
    if found != SCRATCH:
        (run / FILE).write_text(json.dumps(found._asdict(), indent=2) + "\n")


def load_provenance(run: Path) -> Provenance:
    """Return that of a run directory. Raises DataError where the file is damaged."""
    path = run / FILE
    try:
        found = Provenance(**json.loads(read_regular(path)))
        for name, default in SCRATCH._asdict().items():
            value = getattr(found, name)
            if type(value) is not type(default):
                raise TypeError(f"{name} is {value!r}")
        if not all(key in TOKEN_KEYS and type(number) is int and number >= 0
                   for key, number in found.tokenizer.items()):  # fmt: skip
            raise TypeError(f"tokenizer is {found.tokenizer!r}")
        return found
    except FileNotFoundError:
        return SCRATCH
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); restore it, or delete it: exports will then "
                        "not name the first model and its special tokens") from error  # fmt: skip


def front_matter(found: Provenance, library: str) -> list[str]:
    """Return the lines that tell the hub of a model what it is."""
    keys = {"library_name": library, "base_model": found.hub_name, "license": found.license}
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in keys.items() if value), "---"]


def origin_line(found: Provenance) -> str:
    """Return the sentence about where a model came from."""
    name = found.name
    base = f", an adapter of `{found.base.removeprefix(HUB)}`" if found.base else ""
    held = (
        f"whose licence ({found.license}) holds for it"
        if found.license
        else "whose licence holds for it"
    )
    return f"It started from `{name.removeprefix(HUB)}`{base}, {held}."
