"""In: a file, a folder or a glob, here or at gs:// or s3://. Out: its text files as documents.

`etils.epath` finds and opens all of them; .gz and .zst are unpacked on the way.
"""

import codecs
import fnmatch
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from typing import IO, Any

from etils import epath

from nanojaxgpt import regular
from nanojaxgpt.checks import show
from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import (
    Document,
    Refuse,
    check_text,
    find_field,
)
from nanojaxgpt.errors import ConfigError, DataError

TEXT_ENDINGS = (".txt",)
JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}  # {scheme: package}
MISSING = object()
MOST_FILES = 1_000_000  # names that a folder or a glob may look at: / and /proc never end
WILDCARD = re.compile(r"[*?[]")
JSON_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number",
              bool: "true or false", type(None): "null"}  # fmt: skip


def read_text(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per file of `location`: a file, a folder of *.txt, or a glob.

    A byte order mark is dropped; every other byte is kept, `\\r\\n` too.
    """
    for name, path in find_files("text", location, TEXT_ENDINGS):
        with open_bytes(path) as file:
            content = file.read()
        if not content.removeprefix(codecs.BOM_UTF8):
            refuse(f"{path} is empty")
        elif text := decode_utf8(content, path, 1, 0, refuse):
            yield Document(name, text)


def read_blocks(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per block of lines; blank lines part the blocks and belong to none."""
    for name, path in find_files("blocks", location, TEXT_ENDINGS):
        block, start, end = [], 0, 0
        for number, line in read_lines(path, refuse):
            if line.strip():
                block.append(line)
            elif block:
                yield from make_block(name, path, number - len(block), start, block, refuse)
                block = []
            end += len(line)
            if not block:
                start = end
        if block:
            yield from make_block(name, path, number - len(block) + 1, start, block, refuse)


def make_block(
    name: str, path: epath.Path, line: int, byte: int, block: list[bytes], refuse: Refuse
) -> Iterator[Document]:
    """Yield the lines as a document that is named by its first, unless they are refused."""
    if text := decode_utf8(b"".join(block), path, line, byte, refuse).rstrip("\r\n"):
        yield Document(f"{name}:{line}", text)


def read_jsonl(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield one document per line: the field FIELD of its JSON object, PATH[#FIELD], else `text`.

    `a.b` is the field b of the object a. Blank lines and empty texts are passed over.
    """
    location, field = split_field(location, "text")
    advice = f'write one object per line, as in {{"{field}": "..."}}'
    for name, place, record in read_objects("jsonl", location, advice, refuse):
        value = find_field(record, field, MISSING)
        if value is MISSING:
            refuse(f"{place} has no field {field!r}; it has {', '.join(record)}")
        elif text := check_text(place, value, refuse):
            yield Document(name, text)


def read_objects(
    kind: str, location: str, advice: str, refuse: Refuse
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (name, file:line, object) of each line that is not blank; `advice` ends an error."""
    for name, path in find_files(kind, location, JSON_ENDINGS):
        for number, line in read_lines(path, refuse):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                refuse(f"{path}:{number} is not UTF-8 text: {likely_format(line) or error.reason}")
                continue
            except (ValueError, RecursionError) as error:
                reason = likely_format(line) or error
                if line.lstrip().startswith(b"["):
                    reason = f"it begins an array; {advice}"
                elif line.strip() == b"{":
                    reason = f"it begins an object of several lines; {advice}"
                refuse(f"{path}:{number} is not JSON: {reason}")
                continue
            if isinstance(record, dict):
                yield f"{name}:{number}", f"{path}:{number}", record
            else:
                refuse(f"{path}:{number} holds {JSON_KINDS[type(record)]}, not an object; {advice}")


def identify_text(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the name, size and hash of every file."""
    return identify_files("text", location, TEXT_ENDINGS)


def identify_blocks(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the name, size and hash of every file."""
    return identify_files("blocks", location, TEXT_ENDINGS)


def identify_jsonl(location: str, data: sections.Data) -> dict[str, Any]:
    """Return the field, and the name, size and hash of every file."""
    location, field = split_field(location, "text")
    return dict(field=field, **identify_files("jsonl", location, JSON_ENDINGS))


def identify_files(kind: str, location: str, endings: tuple[str, ...]) -> dict[str, Any]:
    """Return the name, size and hash of every file, as it lies there: not unpacked."""
    files = []
    for name, path in find_files(kind, location, endings):
        digest, size = hashlib.sha256(), 0
        with named(path), path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
        files.append(dict(name=name, bytes=size, sha256=digest.hexdigest()))
    return dict(files=files)


def split_field(location: str, default: str) -> tuple[str, str]:
    """Return the parts of LOCATION[#FIELD]."""
    path, _, field = location.partition("#")
    return path, field or default


def check_location(kind: str, location: str) -> None:
    """Raise ConfigError for an unknown scheme, DataError where a local path can't be read."""
    path = split_field(location, "")[0] if kind in ("jsonl", "parquet") else location
    if not path:
        raise ConfigError(f"data.source={kind}: needs a path: {kind}:FILE, {kind}:FOLDER or a glob")
    check_scheme(f"data.source={kind}:{path}", path, ("https", "http", *BUCKETS))
    if "://" in path or WILDCARD.search(path):
        return
    check_local(epath.Path(path).expanduser())


def check_scheme(setting: str, path: str, known: Iterable[str] = BUCKETS) -> None:
    """Raise ConfigError, naming the setting, where `path` has a scheme that can't be opened."""
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in BUCKETS:
        names = ", ".join(f"{name}://" for name in known)
        raise ConfigError(
            f"{setting}: no scheme {show(scheme)}; known: {names}; write a local path without one"
        )


def check_local(path: epath.Path) -> None:
    """Raise DataError where a local path is missing, or a device or a pipe, which may never end."""
    try:
        regular.check_regular(path)
    except FileNotFoundError:
        raise DataError(missing_files("text", path, TEXT_ENDINGS)) from None
    except OSError as error:
        raise DataError(f"{show(str(path))} can't be read: {error.strerror}") from error


def find_files(kind: str, location: str, endings: tuple[str, ...]) -> list[tuple[str, epath.Path]]:
    """Return (name, path) of the files, sorted; a name is the path below what all files share."""
    check_location(kind, location)
    path = epath.Path(location).expanduser()
    start = count(), frozenset[str]()
    try:
        if path.is_file():
            return [(path.name, path)]
        if path.is_dir():
            paths = [p for p in walk(path, ["**", "*"], *start) if p.name.endswith(endings)]
        else:
            wild = [bool(WILDCARD.search(part)) for part in path.parts]
            plain = wild.index(True) if True in wild else len(wild) - 1
            folder, pattern = epath.Path(*path.parts[:plain]), list(path.parts[plain:])
            paths = list(walk(folder, pattern, *start))
    except DataError:
        raise
    except ImportError as error:
        scheme = location.partition(":")[0]
        package = BUCKETS.get(scheme, "fsspec")
        raise DataError(f"{location} needs the package {package}: pip install {package}") from error
    except Exception as error:  # each kind of bucket has its own errors for a missing right
        raise DataError(f"{location} can't be read: {type(error).__name__}: {error}") from error
    if not paths:
        raise DataError(missing_files(kind, path, endings))
    if "://" not in location:
        for found in paths:
            check_local(found)
    levels = zip(*(p.parent.parts for p in paths), strict=False)
    shared = len([*takewhile(lambda names: len(set(names)) == 1, levels)])
    return sorted(("/".join(p.parts[shared:]), p) for p in paths)


def walk(
    folder: epath.Path, pattern: list[str], number: Iterator[int], above: frozenset[str]
) -> Iterator[epath.Path]:
    """Yield the files below `folder` that match a glob's parts; ** stands for any folders.

    As in `glob`, no wildcard takes a name that begins with a dot. `epath` has no ** of its own; it
    does not follow a link back to a folder that the link is in: `above` are their real paths.
    `number` counts the names that are looked at. Raises DataError for more than MOST_FILES.
    """
    if not folder.is_dir():
        return
    first, *rest = pattern
    if first == "**":
        if rest:
            yield from walk(folder, rest, number, above)
        above |= {os.path.realpath(folder)}
        for path in folder.iterdir():
            inside = path.is_dir() and not path.name.startswith(".")
            if inside and os.path.realpath(path) not in above:
                yield from walk(path, pattern, number, above)
        return
    for path in folder.iterdir():
        if next(number) >= MOST_FILES:
            raise DataError(
                f"more than {MOST_FILES:,} files, as of {folder}, are too many to look through; "
                "name a smaller folder or a narrower glob, or put many texts into one jsonl: file"
            )
        hidden = path.name.startswith(".") and not first.startswith(".")
        if hidden or not fnmatch.fnmatchcase(path.name, first):
            continue
        if rest:
            yield from walk(path, rest, number, above)
        elif not path.is_dir():
            yield path


def missing_files(kind: str, path: epath.Path, endings: tuple[str, ...]) -> str:
    """Return the sentence for a path that holds no text."""
    if path.is_dir():
        wanted = ", ".join(f"*{ending}" for ending in endings)
        return f"{path} holds no {wanted} file; use a glob for other endings, {kind}:{path}/**/*.md"
    if path.name == "tinyshakespeare.txt":
        return (
            f"no file {path}; it is Tiny Shakespeare, 1,115,394 bytes, from the char-rnn "
            "repository's data/tinyshakespeare/input.txt: save it under that name, or leave "
            "data.source as it is in experiments/shakespeare_char.py, which downloads it"
        )
    return f"no file, folder or glob {path}; correct data.source"


def read_lines(path: epath.Path, refuse: Refuse) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of a file."""
    with open_bytes(path) as file:
        number = 0
        for number, line in enumerate(file, 1):
            yield number, line
        if not number:
            refuse(f"{path} is empty")


@contextmanager
def open_bytes(path: epath.Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file for reading, unpacked. Raises DataError where it can't be read to its end."""
    with named(path), path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked
        elif path.suffix == ".zst":
            try:
                zstandard = importlib.import_module("zstandard")
            except ImportError as error:
                raise DataError(
                    f"{path} needs the package zstandard: pip install nanojaxgpt[zstd]"
                ) from error
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            try:
                with io.BufferedReader(reader, 1 << 20) as unpacked:
                    yield unpacked
            except zstandard.ZstdError as error:
                raise DataError(f"{path} can't be unpacked: {error}") from error
        else:
            yield file


@contextmanager
def named(path: epath.Path) -> Iterator[None]:
    """Turn what goes wrong while reading `path` into a DataError that names it."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} can't be unpacked: {error}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def decode_utf8(content: bytes, path: epath.Path, line: int, byte: int, refuse: Refuse) -> str:
    """Return UTF-8 that begins at this line and byte of the file, without its byte order mark.

    What is not UTF-8 is refused by the place of its first wrong byte, or by the format that it
    likely has; it gives "".
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line, byte = line + content.count(b"\n", 0, error.start), byte + error.start
        reason = likely_format(content) or error.reason
        refuse(f"{path}, line {line}, byte {byte}: not UTF-8 ({reason})")
        return ""
    if "\0" in text and (encoding := wide_encoding(content)):
        refuse(f"{path} is likely {encoding} without a byte order mark; convert it to UTF-8")
        return ""
    return text if byte else text.removeprefix("\ufeff")


# What files begin with that are not text.
MAGIC = {
    b"PAR1": "it is a Parquet file: use parquet:PATH",
    b"ARROW1": "it is an Arrow file",
    b"\x1f\x8b": "it is packed by gzip: name it *.gz",
    b"\x28\xb5\x2f\xfd": "it is packed by zstd: name it *.zst",
    b"BZh": "it is packed by bzip2: unpack it",
    b"\xfd7zXZ": "it is packed by xz: unpack it",
    b"PK\x03\x04": "it is a ZIP archive: unpack it",
    b"%PDF": "it is a PDF: extract its text",
    b"SQLite format 3": "it is an SQLite database",
    codecs.BOM_UTF32_LE: "it is UTF-32: convert it to UTF-8",
    codecs.BOM_UTF32_BE: "it is UTF-32: convert it to UTF-8",
    codecs.BOM_UTF16_LE: "it is UTF-16: convert it to UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16: convert it to UTF-8",
}


def likely_format(content: bytes) -> str:
    """Return the likely format of bytes that are not UTF-8, and what to do, or ""."""
    for magic, format_ in MAGIC.items():  # UTF-32 before UTF-16, whose mark it begins with
        if content.startswith(magic):
            return format_
    if encoding := wide_encoding(content):
        return f"it is likely {encoding}: convert it to UTF-8"
    return "it holds NUL bytes" if content.startswith(b"\0") else ""


def wide_encoding(content: bytes) -> str:
    """Return UTF-16 or UTF-32 where the NULs of the first bytes stand as ASCII has them there."""
    sample = content[: min(len(content), 4096) // 4 * 4]
    for encoding, size in (("UTF-32", 4), ("UTF-16", 2)):
        places = [sample[place::size] for place in range(size)]
        empty = [bool(place) and not any(place) for place in places]
        text = [bool(place) and all(place) for place in places]
        if sum(empty) == size - 1 and sum(text) == 1 and (text[0] or text[-1]):
            return encoding
    return ""
