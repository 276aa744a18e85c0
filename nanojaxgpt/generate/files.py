"""In: a file of prompts, one a row. Out: a file of the same rows with their answers, in order.

A row that is written is done: the file can be resumed at the first that is missing. No jax here.
"""

import difflib
import fcntl
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from etils import epath

from nanojaxgpt.checks import kind_of, show
from nanojaxgpt.data.sources.files import named, open_bytes
from nanojaxgpt.data.sources.parquet import read_rows
from nanojaxgpt.data.sources.records import BadRecordError, check_messages
from nanojaxgpt.errors import ConfigError, DataError, why
from nanojaxgpt.extras import require_package
from nanojaxgpt.generate.requests import Part, Request, whole
from nanojaxgpt.language_model import LanguageModel

PROMPTS = ("prompt", "messages")
# What the answer adds to a row.
ADDED = (
    "text",
    "finish",
    "prompt_tokens",
    "tokens",
    "scores",
    "prompt_scores",
    "error",
    "settings",
)
OPTIONS = tuple(name for name in Request.__dataclass_fields__ if name != "ids")
TYPO = 0.85  # how alike a field and an option are spelled, if one is meant by the other

Row = dict[str, Any]


def read_prompts_file(path: Path) -> Iterator[tuple[Row, str]]:
    """Yield each row of a file of JSON lines or Parquet, and what is wrong with it, or "".

    Raises DataError where the file can't be read.
    """

    def refuse(problem: str) -> None:
        raise DataError(problem)

    if path.suffix == ".parquet":
        for _, row in read_rows(str(path), refuse):
            yield json.loads(json.dumps(row, default=str)), ""
        return
    file_path = epath.Path(path)
    with named(file_path), open_bytes(file_path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield {}, f"line {number} is not JSON: {error}"
                continue
            if isinstance(row, dict):
                yield row, ""
            else:
                yield {}, f"line {number} holds {kind_of(row)}, not an object"


def row_request(row: Row, model: LanguageModel, defaults: Mapping[str, Any]) -> Request:
    """Return the request of a row: its prompt or messages, and its options over the defaults.

    Raises ConfigError, DataError.
    """
    if len(given := [name for name in PROMPTS if name in row]) != 1:
        has = " and ".join(given) or ", ".join(map(str, row)) or "nothing"
        raise ConfigError(f"a row needs either prompt or messages; it has {has}")
    for name in row:
        if name in ADDED:
            raise ConfigError(f"the row has a field {name!r}, which is one of the answer's")
        near = difflib.get_close_matches(name, (*OPTIONS, *PROMPTS), 1, TYPO)
        if near and name != near[0]:
            raise ConfigError(f"no option {name!r}; did you mean {near[0]}?")
    options = {**defaults, **{name: row[name] for name in OPTIONS if row.get(name) is not None}}
    return Request(tuple(prompt_ids(row, model)), **frozen(options))


def prompt_ids(row: Row, model: LanguageModel) -> list[int]:
    """Return the ids of a row's prompt, which may be ids already, or of its messages."""
    if "messages" in row:
        try:
            return model.template.encode(check_messages("messages", row["messages"]))
        except BadRecordError as error:
            raise DataError(f"the row {error}") from None
    prompt = row["prompt"]
    if isinstance(prompt, list) and all(whole(token) >= 0 for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt={show(prompt)} is {kind_of(prompt)}, not a string or a list of "
                          "ids")  # fmt: skip
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"prompt={show(prompt)} contains an unpaired surrogate") from None
    return model.encode(prompt)


def frozen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON has them in the types of a Request. Raises ConfigError."""
    found = dict(options)
    if isinstance(found.get("stop"), str):
        found["stop"] = (found["stop"],)
    for name in ("stop", "end_ids"):
        if not isinstance(found.get(name, ()), list | tuple):
            raise ConfigError(f"{name}={show(found[name])} is not a list")
        found[name] = tuple(found.get(name, ()))
    if isinstance(found.get("schema"), dict):
        found["schema"] = json.dumps(found["schema"])
    biases = found.get("logit_bias", {})
    if not isinstance(biases, dict) or not all(str(token).isdecimal() for token in biases):
        raise ConfigError(f'logit_bias={show(biases)} must map ids to numbers, {{"17": -100}}')
    found["logit_bias"] = tuple((int(token), value) for token, value in biases.items())
    return found


def answered(row: Row, part: Part, request: Request, settings: str) -> Row:
    """Return a row with its answer, or with its error."""
    if part.finish in ("error", "cancelled"):
        return failed(row, part.error or part.finish, settings)
    found = {**row, "text": part.text, "finish": part.finish}
    found |= {"prompt_tokens": len(request.ids), "tokens": len(part.ids)}
    if request.alternatives >= 0:
        found["scores"] = [score._asdict() for score in part.scores]
    if request.echo:
        found["prompt_scores"] = [score._asdict() for score in part.prompt_scores]
    return found | {"settings": settings}


def failed(row: Row, problem: str, settings: str) -> Row:
    """Return a row with what was wrong with it."""
    return {**row, "error": problem, "settings": settings}


class AnswerFile:
    """The file of answers: JSON lines, which become Parquet at the end if its name asks for it.

    `done` rows are there already, `failed` of them with an error.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings, self.done, self.failed = path, settings, 0, 0
        self.lines = path.with_name(path.name + ".jsonl") if path.suffix == ".parquet" else path
        self._file: IO[bytes] | None = None

    @contextmanager
    def opened(self, source: Path) -> Iterator[Iterator[tuple[Row, str]]]:
        """Hold the file, and give the rows of `source` that are not answered yet.

        Raises ConfigError where it can't be written, another process writes it, or it holds
        answers to other rows or by other settings.
        """
        if self.path != self.lines and self.path.exists():
            raise ConfigError(f"{self.path} is there already; choose another file")
        if self.path != self.lines:
            require_package("pyarrow", "parquet", str(self.path))
        try:
            self._file = open(self.lines, "a+b")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"can't write {self.lines}: {error.strerror}") from error
        with self._file:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is writing {self.lines}") from None
            rows = read_prompts_file(source)
            self._skip_done(rows, source)
            yield rows

    def _skip_done(self, rows: Iterator[tuple[Row, str]], source: Path) -> None:
        """Take those rows that have an answer; drop a last line that is torn."""
        assert self._file
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.done += 1
            place = f"{self.lines}:{self.done}"
            row = next(rows, None)
            try:
                old = json.loads(line)
                self.failed += "error" in old
                if old["settings"] != self.settings:
                    raise ConfigError(f"{place} was written by another model or with other options")
                same = row is not None and without_answer(row[0]) == without_answer(old)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{place} is not a row of answers; choose another file"
                ) from error
            if not same:
                raise ConfigError(f"{place} is not the answer to row {self.done} of {source}; "
                                  "choose another file")  # fmt: skip
        self._file.truncate(end)

    def write(self, row: Row) -> None:
        """Append a row. Raises ConfigError where the disk is full."""
        assert self._file
        self.failed += "error" in row
        try:
            self._file.write(as_json(row).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"can't write {self.lines}: {why(error, self.path.parent)}"
            ) from error
        self.done += 1

    def finish(self) -> None:
        """Write the Parquet file, if that is asked for."""
        if self.path == self.lines:
            return
        arrow, parquet = (importlib.import_module(f"pyarrow{name}") for name in ("", ".parquet"))
        rows = [json.loads(line) for line in self.lines.read_bytes().splitlines()]
        partial = self.path.with_name(self.path.name + ".partial")
        parquet.write_table(arrow.Table.from_pylist(rows), partial)
        os.replace(partial, self.path)
        with suppress(OSError):
            self.lines.unlink()


def as_json(row: Row) -> str:
    """Return a row as a line; what UTF-8 can't hold is escaped."""
    return json.dumps(row)


def without_answer(row: Row) -> str:
    """Return what a row holds beside its answer, as JSON: NaN is the same as NaN there."""
    return as_json({name: value for name, value in row.items() if name not in ADDED})
