"""In: a Parquet file, a folder or a glob, and a field. Out: its rows as documents, by `pyarrow`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from etils import epath

from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import (
    Document,
    Refuse,
    check_text,
    choose_field,
    find_field,
)
from nanojaxgpt.data.sources.files import find_files, identify_files, named, split_field
from nanojaxgpt.errors import ConfigError, DataError

ENDINGS = (".parquet",)
READ_AT_ONCE = 256  # rows
BUFFER_BYTES = 1 << 20  # without it pyarrow holds the whole column of a row group


def read_parquet(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per row that has any text: the field FIELD of PATH[#FIELD].

    Without FIELD it is `text`, or the only column that holds text.
    """
    path, field = split_field(location, "")
    files = find_files("parquet", path, ENDINGS)
    field = find_column(files[0][1], field)
    for name, path in files:
        with open_parquet(path) as file:
            if field not in text_columns(file.schema_arrow):
                raise DataError(f"{path} has no text field {field!r}, as the first file has")
            for number, value in enumerate(field_values(file, field), 1):
                place = f"{path}, row {number}"
                if isinstance(value, UnicodeDecodeError):
                    refuse(f"{place}, byte {value.start}: not UTF-8 ({value.reason})")
                elif text := check_text(place, value, refuse):
                    yield Document(f"{name}:{number}", text)


def read_rows(location: str, refuse: Refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, all fields) of each row."""
    for _, path in find_files("parquet", location, ENDINGS):
        with open_parquet(path) as file:
            first = 1
            for batch in file.iter_batches(READ_AT_ONCE):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:
                    last = first + batch.num_rows - 1
                    refuse(f"{path}, rows {first} to {last}: not UTF-8 ({error.reason})")
                    rows = []
                for number, row in enumerate(rows, first):
                    yield f"{path}, row {number}", row
                first += batch.num_rows


def identify_rows(location: str) -> dict[str, Any]:
    """Return the name, size and hash of every file."""
    return identify_files("parquet", location, ENDINGS)


def identify_parquet(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the field, and the name, size and hash of every file."""
    path, field = split_field(location, "")
    files = find_files("parquet", path, ENDINGS)
    field = find_column(files[0][1], field)
    return dict(field=field, **identify_files("parquet", path, ENDINGS))


def find_column(path: epath.Path, field: str) -> str:
    """Return the field to read, as a file has it. Raises ConfigError, DataError."""
    with open_parquet(path) as file:
        return choose_field(f"parquet:{path}", field, text_columns(file.schema_arrow))


@contextmanager
def open_parquet(path: epath.Path) -> Iterator[Any]:
    """Open a Parquet file. Raises ConfigError without pyarrow, DataError where it can't be read."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"parquet:{path} needs the package pyarrow: pip install nanojaxgpt[parquet]"
        ) from error
    arrow_error = importlib.import_module("pyarrow").ArrowException
    try:
        with (
            named(path),
            path.open("rb") as file,
            parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False) as opened,
        ):
            yield opened
    except arrow_error as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {error}") from error


def text_columns(fields: Any, above: str = "") -> list[str]:
    """Return the names of the columns that hold text, `a.b` for a field of a struct."""
    types = importlib.import_module("pyarrow.types")
    found = []
    for field in fields:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_struct(kind):
            found += text_columns(kind, f"{above}{field.name}.")
        elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            found.append(above + field.name)
    return found


def field_values(file: Any, field: str) -> Iterator[Any]:
    """Yield a field of every row; in place of one that is not UTF-8, the error."""
    groups = range(file.num_row_groups)
    batches = (file.iter_batches(READ_AT_ONCE, [group], [field]) for group in groups)
    for batch in chain.from_iterable(batches):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = []  # one of them is not UTF-8: read them one by one
        for number in range(batch.num_rows):
            try:
                row = rows[number] if rows else batch.slice(number, 1).to_pylist()[0]
                yield find_field(row, field)
            except UnicodeDecodeError as error:
                yield error
