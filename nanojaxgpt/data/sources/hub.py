"""In: NAME[/CONFIG][@SPLIT][#FIELD]. Out: the texts of a Hugging Face dataset, by `datasets`."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import (
    Document,
    Refuse,
    check_text,
    choose_field,
    find_field,
)
from nanojaxgpt.errors import ConfigError, DataError

NAME = re.compile(r"([^@#]+)(?:@([^#]+))?(?:#(.+))?")


def read_hub(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per row that has any text, in the dataset's order."""
    dataset, split, field = open_hub(location)
    column = field if field in dataset.features else field.partition(".")[0]
    for number, row in enumerate(dataset.select_columns([column])):
        name = f"{split}/{number}"
        if text := check_text(f"hf:{location}, row {name}", find_field(row, field), refuse):
            yield Document(name, text)


def read_hub_rows(location: str, refuse: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, all fields) of each row, in the dataset's order."""
    dataset, split, _ = open_dataset(location)
    for number, row in enumerate(dataset):
        yield f"hf:{location}, row {split}/{number}", row


def identify_hub_rows(location: str) -> dict[str, Any]:
    """Return the name, the split, and the fingerprint that `datasets` gives it."""
    dataset, split, _ = open_dataset(location)
    name = re.split("[@#]", location)[0]
    return dict(dataset=name, split=split, rows=len(dataset), fingerprint=dataset._fingerprint)


def identify_hub(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the name, the part that is read, and the fingerprint that `datasets` gives it."""
    dataset, split, field = open_hub(location)
    return dict(
        dataset=re.split("[@#]", location)[0],
        split=split,
        field=field,
        rows=len(dataset),
        fingerprint=dataset._fingerprint,
    )


def open_hub(location: str) -> tuple[Any, str, str]:
    """Return (dataset, split, text field). Raises ConfigError, DataError where it can't be had."""
    dataset, split, field = open_dataset(location)
    return dataset, split, choose_field(f"hf:{location}", field, text_features(dataset.features))


def open_dataset(location: str) -> tuple[Any, str, str]:
    """Return (dataset, split, FIELD or ""). Raises ConfigError, DataError where it can't be had.

    NAME is a folder that `save_to_disk` wrote, or OWNER/NAME[/CONFIG] on the hub.
    """
    parts = NAME.fullmatch(location)
    if not parts:
        raise ConfigError(f"data.source=hf:{location} is not hf:NAME[/CONFIG][@SPLIT][#FIELD]")
    name, split, field = parts[1], parts[2] or "train", parts[3] or ""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"hf:{location} needs the package datasets: pip install nanojaxgpt[huggingface]"
        ) from error
    try:
        if Path(name).expanduser().is_dir():
            dataset = datasets.load_from_disk(str(Path(name).expanduser()))
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        else:
            owner, _, rest = name.partition("/")
            repository, _, config = rest.partition("/")
            full = f"{owner}/{repository}" if repository else owner
            dataset = datasets.load_dataset(full, config or None, split=split)
    except Exception as error:  # the package and the network below it raise many kinds
        raise DataError(
            f"hf:{location} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    return dataset, split, field


def text_features(features: dict[str, Any], above: str = "") -> list[str]:
    """Return the names of the features that hold text, `a.b` for one within another."""
    found = []
    for name, kind in features.items():
        if isinstance(kind, dict):
            found += text_features(kind, f"{above}{name}.")
        elif getattr(kind, "dtype", "") in ("string", "large_string"):
            found.append(above + name)
    return found
