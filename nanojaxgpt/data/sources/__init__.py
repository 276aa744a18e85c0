"""In: the name of a source, as in `data.source`. Out: its documents, and what identifies them."""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from nanojaxgpt.checks import show
from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import BadTexts, Document, Source
from nanojaxgpt.data.sources.download import check_digest, fetch, is_url
from nanojaxgpt.data.sources.files import (
    check_location,
    identify_blocks,
    identify_jsonl,
    identify_text,
    read_blocks,
    read_jsonl,
    read_text,
)
from nanojaxgpt.data.sources.hub import identify_hub, read_hub
from nanojaxgpt.data.sources.parquet import identify_parquet, read_parquet
from nanojaxgpt.data.sources.records import KINDS, readers, split_container
from nanojaxgpt.data.sources.stdlib import identify_stdlib, read_stdlib
from nanojaxgpt.data.sources.tfds import check_tfds, identify_tfds, read_tfds
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.names import nearest

SOURCES: dict[str, Source] = {
    "stdlib": Source(read_stdlib, identify_stdlib),
    "text": Source(read_text, identify_text),
    "blocks": Source(read_blocks, identify_blocks),
    "jsonl": Source(read_jsonl, identify_jsonl),
    "parquet": Source(read_parquet, identify_parquet),
    "tfds": Source(read_tfds, identify_tfds),
    "hf": Source(read_hub, identify_hub),
    **{kind: Source(*readers(kind)) for kind in KINDS},
}
PATH_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".gz": "jsonl", ".parquet": "parquet"}
OTHER_KINDS = {"txt": "text", "file": "text", "json": "jsonl", "huggingface": "hf", "hub": "hf"}
DOWNLOADED = ("text", "blocks", "jsonl", "parquet", *KINDS)  # whose location may be a URL


def read_documents(
    source: str, data: sections.Data, report: Callable[[str], object] = print
) -> Iterator[Document]:
    """Yield the documents of `source` in an order that is the same on every machine.

    `data` gives bad_text, tfds_dir and manual_dir; `report` is told of skipped texts. Raises
    ConfigError for a source that does not exist, DataError for data that can't be read.
    """
    reader, location = find_source(source, data)
    return drop_bad(reader.read, location, source, BadTexts(data.bad_text, report), data)


def drop_bad(
    read: Callable, location: str, source: str, bad: BadTexts, data: sections.Data
) -> Iterator[Document]:
    """Yield what `read` does. Raises DataError where that is nothing."""
    empty = True
    for document in read(location, data, bad):
        empty = False
        yield document
    bad.close(source)
    if empty:
        raise DataError(f"{source} has no text; correct data.source")


def source_identity(source: str, data: sections.Data) -> dict[str, Any]:
    """Return the identity of this content, ready for JSON. Raises as `read_documents`."""
    reader, location = find_source(source, data, verify=True)
    kind, _, named = source.partition(":")
    identity = {"kind": kind, **reader.identify(location, data)}
    if kind in DOWNLOADED and is_url(named):  # it may have come before data.sha256 was set
        came = f"{location}, downloaded from {named},"
        check_digest(came, identity["files"][0]["sha256"], data.sha256)
    return identity


def weighted_sources(data: sections.Data) -> list[tuple[Fraction, str]]:
    """Return (weight, source) of all that is trained on. Raises ConfigError."""
    weighted = []
    for item in data.mixture or (f"1 {data.source}",):
        weight, _, source = item.strip().partition(" ")
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or not source.strip():
            raise ConfigError(
                f'data.mixture: {item!r} is not a weight and a source, as in "3 text:a.txt"'
            )
        if not Fraction(weight):
            raise ConfigError(f"data.mixture: the weight in {item!r} must be above 0")
        weighted.append((Fraction(weight), source.strip()))
    return weighted


def find_source(source: str, data: sections.Data, verify: bool = False) -> tuple[Source, str]:
    """Return the functions of "KIND:LOCATION" and the location, a URL's file by its path.

    With `verify`, a damaged download is replaced. Raises ConfigError, and DataError for a URL that
    can't be downloaded.
    """
    kind, _, location = source.partition(":")
    reader, location = split_source(source)
    if kind in DOWNLOADED and is_url(location):
        url, hash_sign, field = location.partition("#")
        location = f"{fetch(url, data, verify)}{hash_sign}{field}"
    return reader, location


def split_source(source: str) -> tuple[Source, str]:
    """Return the functions of "KIND:LOCATION" and the location. Raises ConfigError."""
    kind, _, location = source.partition(":")
    if kind in SOURCES:
        return SOURCES[kind], location
    known = f"known: {', '.join(SOURCES)}"
    if names_a_path(source):
        likely = PATH_KINDS.get(Path(source.partition("#")[0]).suffix, "text")
        right = f"data.source={likely}:{source}"
        raise ConfigError(f"data.source={show(source)} has no kind; did you mean {right}? {known}")
    hint = nearest(OTHER_KINDS.get(kind, kind), SOURCES)
    raise ConfigError(f"data.source={show(source)}: no kind {show(kind)}{hint or ';'} {known}")


def names_a_path(source: str) -> bool:
    """Return whether a source is a bare path, without its kind."""
    try:
        return ":" not in source and ("/" in source or "." in source or Path(source).exists())
    except OSError:
        return False


def check_sources(data: sections.Data) -> None:
    """Raise ConfigError or DataError where a source has no kind, no file or no package to read it.

    Nothing is read.
    """
    sources = [source for _, source in weighted_sources(data)]
    for source in [*sources, data.validation_source]:
        if source:
            _, location = split_source(source)
            kind = source.partition(":")[0]
            if kind in KINDS:
                container, location = split_container(location)
                kind = container or kind
            if kind in DOWNLOADED and not is_url(location):
                check_location(kind, location)
            elif kind == "tfds":
                check_tfds(location)
