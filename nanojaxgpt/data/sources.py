"""In: the name of a source, as in `data.source`. Out: its documents, and what identifies them."""

import codecs
import glob
import hashlib
import importlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanojaxgpt.errors import ConfigError, DataError


@dataclass(frozen=True)
class DataConfig:
    """Which corpus, and how it becomes tokens: the fields of the config's section `data`."""

    source: str
    mixture: tuple[str, ...]
    tokenizer: str
    tokenizer_vocab_size: int
    packing: str
    validation_fraction: float
    validation_documents: int
    validation_source: str
    bad_text: str
    tfds_dir: str
    manual_dir: str
    num_workers: int
    prefetch_batches: int
    cache_dir: str


class Document(NamedTuple):
    """One text; its name is unique in its source and the same on every machine."""

    name: str
    text: str


def read_documents(source: str) -> Iterator[Document]:
    """Yield the documents of `source` in an order that depends on their names alone.

    Raises ConfigError for a source that does not exist, DataError for data that can't be read.
    """
    reader, location = find_source(source)
    return reader.read(location)


def source_identity(source: str) -> dict[str, Any]:
    """Return what tells this content from any other, ready for JSON. Raises as `read_documents`."""
    reader, location = find_source(source)
    return {"kind": source.partition(":")[0], **reader.identify(location)}


def read_stdlib(location: str = "") -> Iterator[Document]:
    """Yield the standard library's own source files and the topics of the language reference.

    Ordered by a hash of the name, so that a tail of the corpus is a random choice of documents.
    """
    if location:
        raise ConfigError(f"data.source=stdlib takes no path, not {location!r}")
    documents = [*stdlib_modules(), *stdlib_topics()]
    if not documents:
        raise DataError(
            "this Python has neither its library's source nor the language reference; "
            "set data.source=text:PATH"
        )
    yield from sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())


def identify_stdlib(location: str = "") -> dict[str, Any]:
    """Return the Python version and a hash of every name and text."""
    content, num_documents = hashlib.sha256(), 0
    for name, text in read_stdlib(location):
        for part in (name.encode(), text.encode()):
            content.update(len(part).to_bytes(8, "little") + part)
        num_documents += 1
    return dict(
        python=platform.python_version(), documents=num_documents, sha256=content.hexdigest()
    )


# Tests, tables and installed packages; the two applications repeat what the library shows.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
EXCLUDED_FOLDERS |= {"encodings", "idlelib", "turtledemo"}
# The topics come as documents of their own; the others were generated with this machine's paths.
EXCLUDED_PREFIXES = ("pydoc_data/topics.py", "_sysconfigdata", "config-")


def stdlib_modules() -> Iterator[Document]:
    """Yield every UTF-8 source file of the standard library that has any text."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if name.startswith(EXCLUDED_PREFIXES):
                continue
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            if text:
                yield Document(name, text)


def stdlib_topics() -> Iterator[Document]:
    """Yield the topics of the language reference, where this Python ships them."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topics/{name}", text)


def read_text(location: str) -> Iterator[Document]:
    """Yield one document per file of `location`: a file, a folder of *.txt, or a glob.

    A byte order mark is dropped; every other byte is kept, `\\r\\n` too.
    """
    for name, path in text_files(location):
        yield Document(name, decode_text(read_bytes(path), path))


def identify_text(location: str) -> dict[str, Any]:
    """Return the name, size and hash of every file."""
    files = []
    for name, path in text_files(location):
        data = read_bytes(path)
        files.append(dict(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    return dict(files=files)


def text_files(location: str) -> list[tuple[str, Path]]:
    """Return (name, path) of the files, sorted; a name is the path below what all files share."""
    if not location:
        raise ConfigError("data.source=text: needs a path: text:FILE, text:FOLDER or text:GLOB")
    path = Path(location).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        paths = [p for p in path.rglob("*.txt") if p.is_file()]
    else:
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
    if not paths:
        raise DataError(missing_text(path))
    shared = Path(os.path.commonpath([p.parent for p in paths]))
    return sorted((p.relative_to(shared).as_posix(), p) for p in paths)


def missing_text(path: Path) -> str:
    """Return the sentence for a path that holds no text."""
    if path.is_dir():
        return f"{path} holds no *.txt file; name a glob for other endings, text:{path}/**/*.md"
    if path.name == "tinyshakespeare.txt":
        return (
            f"no file {path}; it is Tiny Shakespeare, 1,115,394 bytes, from the char-rnn "
            "repository's data/tinyshakespeare/input.txt: save it under that name"
        )
    return f"no file, folder or glob {path}; correct data.source"


def read_bytes(path: Path) -> bytes:
    """Return what the file holds. Raises DataError where it is empty or can't be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    if not data.removeprefix(codecs.BOM_UTF8):
        raise DataError(f"{path} is empty; leave it out of data.source")
    return data


def decode_text(data: bytes, path: Path) -> str:
    """Return UTF-8 `data` as text. Raises DataError with the place of the first wrong byte."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}, byte {error.start}: not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from error


class Source(NamedTuple):
    """The two functions of a kind of source; both take what follows the colon in its name."""

    read: Callable[[str], Iterator[Document]]
    identify: Callable[[str], dict[str, Any]]


SOURCES: dict[str, Source] = {
    "stdlib": Source(read_stdlib, identify_stdlib),
    "text": Source(read_text, identify_text),
}


def find_source(source: str) -> tuple[Source, str]:
    """Return the functions of "KIND:LOCATION" and the location. Raises ConfigError."""
    kind, _, location = source.partition(":")
    if kind not in SOURCES:
        raise ConfigError(f"data.source={source!r}: no kind {kind!r}; known: {', '.join(SOURCES)}")
    return SOURCES[kind], location
