"""In: a source and a tokenizer's spec. Out: the corpus as token ids on disk, opened as a memmap."""

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt.data.sources import Document, read_documents, source_identity
from nanojaxgpt.data.tokenizers import (
    Tokenizer,
    load_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from nanojaxgpt.errors import DataError

FORMAT = 1  # raise it whenever the same source and spec would give other tokens or files
HASHED_BYTES = 256 << 20  # above this, opening checks sizes alone: hashing takes a second per GB

Span = tuple[int, int]  # token positions [start, stop)


@dataclass(frozen=True)
class Store:
    """A tokenized corpus: each document's tokens, then the end token where there is one."""

    folder: Path
    manifest: dict[str, Any]
    tokens: np.ndarray  # uint16 or uint32 [num_tokens], on disk
    document_starts: np.ndarray  # int64 [num_documents]
    tokenizer: Tokenizer

    @property
    def num_tokens(self) -> int:
        """All tokens, of training and validation."""
        return len(self.tokens)

    def read(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Return [B, length]: the tokens from each start on, in the store's own dtype.

        Every start must leave `length` tokens up to the end of the store.
        """
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, length)
        return windows[starts_B]

    def identity(self) -> dict[str, str]:
        """Return the hashes that name the source, the tokenizer and the tokens."""
        return dict(
            source=content_key(self.manifest["source"]),
            tokenizer=self.manifest["tokenizer_hash"],
            tokens=self.manifest["files"]["tokens.bin"]["sha256"],
            documents=self.manifest["files"]["documents.npy"]["sha256"],
        )

    def split(self, validation_fraction: float, validation_documents: int = 0) -> tuple[Span, Span]:
        """Return the spans of training and validation tokens, which share no document.

        `validation_documents` counts from the end. Else one document is cut at its token
        int(n * (1 - validation_fraction)); several at the last border up to there, or at the
        first one if the first document reaches further.
        """
        num_tokens = len(self.tokens)
        cut = int(num_tokens * (1 - validation_fraction))
        if len(self.document_starts) > 1:
            borders = np.append(self.document_starts[1:], num_tokens)
            cut = int(borders[max(np.searchsorted(borders, cut, side="right") - 1, 0)])
        return (0, cut), (cut, num_tokens)


def prepare(
    source: str,
    tokenizer_spec: str,
    tokenizer_vocab_size: int,
    cache_dir: Path,
    report: Callable[[str], object] = print,
) -> Store:
    """Return the store of this corpus and tokenizer, building it below `cache_dir` if need be.

    The folder appears under its name only when it is complete, so that a killed or a second
    process does no harm. Raises ConfigError and DataError as the source and the tokenizer do, and
    DataError where the store can't be written or was altered.
    """
    source_content = source_identity(source)
    tokenizer_content = tokenizer_identity(tokenizer_spec, tokenizer_vocab_size)
    key = content_key(dict(format=FORMAT, source=source_content, tokenizer=tokenizer_content))
    folder = Path(cache_dir) / key
    if folder.exists():
        return open_store(folder)
    unfinished = folder.with_name(f"{key}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        (unfinished / "tokenizer").mkdir(parents=True)
        started = time.perf_counter()
        texts = (document.text for document in read_documents(source))
        tokenizer = train_tokenizer(tokenizer_spec, texts, tokenizer_vocab_size)
        manifest = write_store(unfinished, source_content, read_documents(source), tokenizer)
        seconds = time.perf_counter() - started
        publish(unfinished, folder)
    except OSError as error:
        raise DataError(f"can't write the token store below {cache_dir}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report(
        f"tokenized {source}: {manifest['documents']:,} documents, {manifest['bytes']:,} bytes, "
        f"{manifest['tokens']:,} tokens of {tokenizer.vocab_size:,} in {seconds:.1f} s: {folder}"
    )
    return open_store(folder)


def open_store(folder: Path) -> Store:
    """Return the store in `folder`, checked against its manifest.

    Raises DataError that names the file which is missing, truncated or altered.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise refusal(folder, "manifest.json", f"has format {manifest['format']}, not {FORMAT}")
        for name, expected in manifest["files"].items():
            check_file(folder, name, expected)
        tokens = np.memmap(folder / "tokens.bin", np.dtype(manifest["dtype"]), "r")
        document_starts = np.load(folder / "documents.npy")
        tokenizer_hash = manifest["tokenizer_hash"]
    except OSError as error:
        raise refusal(folder, error.filename, f"can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refusal(folder, "manifest.json", f"is not a manifest ({error!r})") from error
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except DataError as error:
        raise refusal(folder, "tokenizer", f"can't be used ({error})") from error
    if tokenizer.content_hash() != tokenizer_hash:
        raise refusal(folder, "tokenizer", "is not the one that the tokens were made with")
    return Store(folder, manifest, tokens, document_starts, tokenizer)


def check_file(folder: Path, name: str, expected: dict[str, Any]) -> None:
    """Raise DataError unless the file has the size and, up to HASHED_BYTES, the hash expected."""
    size = (folder / name).stat().st_size
    if size != expected["bytes"]:
        raise refusal(folder, name, f"has {size:,} bytes instead of {expected['bytes']:,}")
    if size <= HASHED_BYTES and file_hash(folder / name) != expected["sha256"]:
        raise refusal(folder, name, "was altered: its SHA-256 is not the manifest's")


def refusal(folder: Path, name: str, what: str) -> DataError:
    """Return the error for a file of the store in `folder`, with what to do about it."""
    return DataError(f"{folder / name} {what}; delete the folder {folder} to have it built again")


def write_store(
    folder: Path,
    source_content: dict[str, Any],
    documents: Iterator[Document],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Write every file of a store into `folder`; the manifest, returned, comes last."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = np.array([tokenizer.end_id] if tokenizer.end_id >= 0 else [], dtype)
    starts, num_tokens, num_bytes = [], 0, 0
    with (folder / "tokens.bin").open("wb") as file:
        for document in show_progress(documents):
            ids = np.concatenate([tokenizer.encode(document.text).astype(dtype), end])
            ids.tofile(file)
            starts.append(num_tokens)
            num_tokens += len(ids)
            num_bytes += len(document.text.encode())
    np.save(folder / "documents.npy", np.array(starts, np.int64))
    tokenizer.save(folder / "tokenizer")
    manifest = dict(
        format=FORMAT,
        source=source_content,
        tokenizer_hash=tokenizer.content_hash(),
        dtype=dtype.str,
        tokens=num_tokens,
        documents=len(starts),
        bytes=num_bytes,
        files={name: describe_file(folder / name) for name in ("tokens.bin", "documents.npy")},
    )
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def publish(unfinished: Path, folder: Path) -> None:
    """Give a complete store its name, unless another process was faster."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not folder.exists():
            raise


def show_progress(documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents; on a terminal, count them on one line, twice a second."""
    is_terminal = sys.stderr.isatty()
    num_chars, shown = 0, time.monotonic()
    for number, document in enumerate(documents):
        if is_terminal and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            text = f"\rtokenizing: {number:,} documents, {num_chars / 1e6:,.1f} M characters"
            print(text, end="", file=sys.stderr, flush=True)
        yield document
        num_chars += len(document.text)
    if is_terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and the hash that `check_file` compares."""
    return dict(bytes=path.stat().st_size, sha256=file_hash(path))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(content: dict[str, Any]) -> str:
    """Return 16 hex digits that name JSON-able content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
