"""In: documents and a tokenizer. Out: numbered shards of tokens in a folder, by many processes.

What a shard holds follows from the documents alone, not from how many processes there are or
from how often they were killed. A shard is finished when its description NUMBER.json is there.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt.data.exactness import Loss, count_loss
from nanojaxgpt.data.sources.documents import Document
from nanojaxgpt.data.tokenizers import Tokenizer, load_tokenizer

SHARD_BYTES = 32 << 20  # of text: a few seconds' work, so that little is lost to a kill
TOKEN_DTYPES = ("<u2", "<u4")
EDGE_BYTES = 1 << 16  # of a file's beginning and end, hashed apart to tell large files quickly

UNGUARDED = 'the training script lacks `if __name__ == "__main__":`'

Shard = tuple[int, list[str]]  # its number and its texts


def write_shards(
    folder: Path, documents: Iterator[Document], tokenizer: Tokenizer, num_workers: int, lossy: bool
) -> list[dict[str, Any]]:
    """Tokenize the documents into `folder`, which holds `tokenizer`; return what each shard is.

    What is lost by a `lossy` tokenizer is found by decoding; else only bytes are compared. Shards
    that are finished already stay as they are. `num_workers` 0 means one process per core; a single
    shard is made by this process. Raises OSError where it can't write.
    """
    cut = enumerate(cut_shards(show_progress(documents)))
    waiting = ((number, texts) for number, texts in cut if not is_complete(folder, number))
    first = list(islice(waiting, 2))
    num_workers = num_workers or os.cpu_count() or 1
    if len(first) < 2 or num_workers == 1:
        for number, texts in chain(first, waiting):
            write_shard(folder, number, texts, tokenizer, lossy)
    else:
        write_in_parallel(folder, chain(first, waiting), num_workers, lossy)
    finished = sorted(folder.glob("[0-9]*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text())["shard"] for path in finished]


def write_in_parallel(folder: Path, shards: Iterator[Shard], num_workers: int, lossy: bool) -> None:
    """Have processes write the shards, with one more in hand than there are processes."""
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that runs jax may hang
    under_way: deque[Future] = deque()
    with ProcessPoolExecutor(num_workers, spawn, initializer=start_worker) as pool:
        try:
            for number, texts in shards:
                if len(under_way) > num_workers:
                    under_way.popleft().result()
                under_way.append(pool.submit(write_shard_apart, folder, number, texts, lossy))
            while under_way:
                under_way.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a tokenizing process ended suddenly: it ran out of memory (lower "
                f"data.num_workers), or {UNGUARDED}"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def start_worker() -> None:
    """Leave signals to the parent, end with it, and keep to one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def is_starting_worker() -> bool:
    """Return whether this process is a worker that runs its parent's script to begin with."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def write_shard_apart(folder: Path, number: int, texts: list[str], lossy: bool) -> None:
    """Write a shard with the tokenizer that lies in its folder."""
    write_shard(folder, number, texts, load_once(folder / "tokenizer"), lossy)


load_once = functools.cache(load_tokenizer)


def write_shard(
    folder: Path, number: int, texts: list[str], tokenizer: Tokenizer, lossy: bool
) -> None:
    """Write a shard's tokens and its documents' lengths, then what describes them."""
    dtype = token_dtype(tokenizer)
    end = np.array([tokenizer.end_id] if tokenizer.end_id >= 0 else [], dtype)
    parts = [part for text in texts for part in (tokenizer.encode(text).astype(dtype), end)]
    tokens = np.concatenate(parts)
    lengths = [len(parts[i]) + len(end) for i in range(0, len(parts), 2)]
    path = folder / f"{number:05}.tokens"
    lengths_bytes = np.array(lengths, "<i8").tobytes()
    write_whole(path, tokens.tobytes())
    write_whole(path.with_suffix(".lengths"), lengths_bytes)
    shard = dict(
        file=path.name,
        tokens=len(tokens),
        documents=len(texts),
        text_bytes=sum(len(text.encode()) for text in texts),
        **count_losses(tokenizer, texts, parts[::2], lossy)._asdict(),
        **describe_file(path),
    )
    sealed = dict(shard=shard, hash=content_hash(shard, lengths_bytes))
    write_whole(path.with_suffix(".json"), json.dumps(sealed).encode())


def count_losses(
    tokenizer: Tokenizer, texts: list[str], ids: list[np.ndarray], lossy: bool
) -> Loss:
    """Return the loss of a shard's texts as `ids`; only some are decoded unless `lossy`."""
    bytes_V, total = tokenizer.token_bytes(), np.zeros(len(Loss._fields), np.int64)
    for text, own in zip(texts, ids, strict=True):
        counted = int(bytes_V[own].sum())
        if lossy or counted != len(text.encode()):
            total += count_loss(tokenizer, text, own, counted)
    return Loss(*total.tolist())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there complete or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def read_lengths(folder: Path, shard: dict[str, Any]) -> np.ndarray:
    """Return int64 [documents]: the tokens of each document of a finished shard."""
    return np.fromfile((folder / shard["file"]).with_suffix(".lengths"), "<i8")


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the type that a tokenizer's ids are kept in."""
    return np.dtype(TOKEN_DTYPES[tokenizer.vocab_size > 1 << 16])


def cut_shards(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Yield the texts of each shard: documents, whole, until they have SHARD_BYTES."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= SHARD_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def is_complete(folder: Path, number: int) -> bool:
    """Return whether a shard needs no more work.

    Its description and its documents' lengths are compared with their hash here; its tokens are
    when the store is opened.
    """
    path = folder / f"{number:05}.json"
    try:
        sealed = json.loads(path.read_text())
        shard, lengths = sealed["shard"], path.with_suffix(".lengths").read_bytes()
        same = sealed["hash"] == content_hash(shard, lengths)
        return same and path.with_suffix(".tokens").stat().st_size == shard["size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def content_hash(content: Any, more: bytes = b"") -> str:
    """Return the SHA-256, in hex, of JSON-able content, however it is laid out, and `more`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode() + more).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size, its hash, and a hash of its first and last EDGE_BYTES."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(size=path.stat().st_size, sha256=digest, edges=edge_hash(path))


def edge_hash(path: Path) -> str:
    """Return the SHA-256 of a file's first and last EDGE_BYTES in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def show_progress(documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents and say how many: twice a second on a terminal's last line, else rarely.

    A line of its own follows every half minute where there is no terminal.
    """
    is_terminal = sys.stderr.isatty()
    pause, form = (0.5, "\r{}\033[K") if is_terminal else (30, "{}\n")
    num_chars, shown = 0, time.monotonic()
    for number, document in enumerate(documents):
        if time.monotonic() - shown > pause:
            shown = time.monotonic()
            text = f"tokenizing: {number:,} documents, {num_chars / 1e6:,.1f} M characters"
            print(form.format(text), end="", file=sys.stderr, flush=True)
        yield document
        num_chars += len(document.text)
    if is_terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
