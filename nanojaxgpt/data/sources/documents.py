"""Shared by every kind of source: a document, its functions, the handling of bad texts."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from nanojaxgpt.checks import kind_of
from nanojaxgpt.config import sections
from nanojaxgpt.errors import ConfigError, DataError


class Document(NamedTuple):
    """One text; its name is unique in its source and the same on every machine."""

    name: str
    text: str


Refuse = Callable[[str], None]  # takes the problem and its place; returns to skip
SHOWN = 10  # bad documents that are reported one by one


class BadTexts:
    """What becomes of documents that can't be read, by `data.bad_text`.

    Called with the problem and its place, it raises DataError or, under `skip`, reports and counts.
    """

    def __init__(self, bad_text: str, report: Callable[[str], object]) -> None:
        self.skip, self.report, self.count = bad_text == "skip", report, 0

    def __call__(self, problem: str) -> None:
        if not self.skip:
            raise DataError(f"{problem}; fix it, or skip such documents with data.bad_text=skip")
        self.count += 1
        if self.count <= SHOWN:
            self.report(f"skipped: {problem}")

    def close(self, source: str) -> None:
        """Report how many there were, if any."""
        if self.count:
            self.report(f"skipped {self.count:,} bad texts of {source}")


class Source(NamedTuple):
    """The two functions of a kind of source; LOCATION is what follows the colon in its name."""

    read: Callable[[str, sections.Data, Refuse], Iterator[Document]]
    identify: Callable[[str, sections.Data], dict[str, Any]]


def find_field(record: dict[str, Any], field: str, default: Any = None) -> Any:
    """Return a field of a record, `default` where it has none.

    A key of exactly this name comes first; else `a.b` is the field b of the record a.
    """
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return default
        value = value[name]
    return value


def choose_field(source: str, field: str, texts: list[str]) -> str:
    """Return which of the fields that hold text is read: `field`, or `text`, or the only one.

    Raises ConfigError where that is none.
    """
    choice = field or ("text" if "text" in texts else texts[0] if len(texts) == 1 else "")
    if choice not in texts:
        problem = f"no text field {field!r}" if field else "no single text field"
        raise ConfigError(
            f"{source}: {problem}; choose one with #FIELD: {', '.join(texts) or 'there is none'}"
        )
    return choice


def class_name(names: Sequence[str], number: int) -> str | int | None:
    """Return the name of a class; its number if the classes have none, None if it is unlabelled.

    TensorFlow Datasets and Hugging Face's write -1 for an example without a label.
    """
    if number < 0:
        return None
    # A feature without names calls its classes "0", "1", ...
    return number if list(names) == [str(i) for i in range(len(names))] else names[number]


def check_text(name: str, value: object, refuse: Refuse) -> str:
    """Return `value` where it is a text that UTF-8 can hold; else refuse it and return ""."""
    if not isinstance(value, str):
        refuse(f"{name} holds {kind_of(value)} where its text should be")
        return ""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        refuse(f"{name} holds an unpaired surrogate, U+{ord(value[error.start]):04X}")
        return ""
    return value
