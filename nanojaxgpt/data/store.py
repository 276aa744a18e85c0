"""In: the config's section `data`. Out: its corpus as token ids on disk, opened as memmaps."""

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.config import sections
from nanojaxgpt.data import shards
from nanojaxgpt.data.exactness import Loss, find_loss
from nanojaxgpt.data.examples import Recipe, write_example_shards
from nanojaxgpt.data.manifests import (
    FORMAT,
    read_manifest,
    read_starts,
    refusal,
    write_manifest,
)
from nanojaxgpt.data.shards import content_hash, token_dtype, write_shards
from nanojaxgpt.data.sources import (
    find_source,
    read_documents,
    source_identity,
    weighted_sources,
)
from nanojaxgpt.data.sources.documents import BadTexts
from nanojaxgpt.data.sources.download import hold_lock
from nanojaxgpt.data.sources.records import is_examples
from nanojaxgpt.data.tokenizers import (
    TRAINED,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from nanojaxgpt.errors import ConfigError, DataError, UserError

TOKENIZER_FORMAT = 2  # raise it whenever the same corpus would train another tokenizer
OPEN_SHARDS = 256  # each mapped file costs a descriptor, of which a process often has 1,024

ACCEPT_LOSS = (
    "choose another tokenizer, or accept and count the loss with data.lossy_tokenizer=True"
)

Span = tuple[int, int]  # token positions [start, stop)
Report = Callable[[str], object]


@dataclass(frozen=True)
class Store:
    """A tokenized source: each document's tokens, then the end token where there is one."""

    folder: Path
    manifest: dict[str, Any]
    shards: Sequence[np.ndarray]  # uint16 or uint32, on disk
    shard_starts: np.ndarray  # int64 [num_shards + 1], the last one is num_tokens
    document_starts: np.ndarray  # int64 [num_documents], on disk
    tokenizer: Tokenizer
    weights: Sequence[np.ndarray] = ()  # uint8, on disk: a token's in the loss; (): all are 1

    @property
    def examples(self) -> dict[str, Any]:
        """What is known of examples for fine-tuning; of documents nothing."""
        return self.manifest.get("examples", {})

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its texts, by their numbers; () of other documents."""
        return tuple(self.examples.get("labels", ()))

    @property
    def num_tokens(self) -> int:
        """All tokens, of training and validation."""
        return int(self.shard_starts[-1])

    @property
    def num_documents(self) -> int:
        """All documents, of training and validation."""
        return len(self.document_starts)

    def read(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Return [B, length]: the tokens from each start on, in the store's own dtype.

        Every start must leave `length` tokens up to the end of the store.
        """
        return self._read(self.shards, starts_B, length)

    def read_weights(self, starts_B: np.ndarray, length: int) -> np.ndarray:
        """Return uint8 [B, length]: the weights of these tokens, of a store that has them."""
        return self._read(self.weights, starts_B, length)

    def _read(self, shards: Sequence[np.ndarray], starts_B: np.ndarray, length: int) -> np.ndarray:
        starts_B = np.asarray(starts_B, np.int64)
        shard_B = np.searchsorted(self.shard_starts, starts_B, side="right") - 1
        offset_B = starts_B - self.shard_starts[shard_B]
        rows = np.empty((len(starts_B), length), shards[0].dtype)
        # A loop over slices takes half a microsecond a row; indexing windows takes twenty a shard.
        for row, number, offset in zip(rows, shard_B.tolist(), offset_B.tolist(), strict=True):
            piece = shards[number][offset : offset + length]
            row[: len(piece)] = piece
            filled = len(piece)
            while filled < length:
                number += 1
                piece = shards[number][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return rows

    def identity(self) -> dict[str, str]:
        """Return the hashes that name the source, the tokenizer and the tokens."""
        files = [shard["weights"]["sha256"] for shard in self.manifest["shards"] if self.examples]
        weights = {"weights": content_key(files)} if files else {}
        return dict(
            source=content_key(self.manifest["source"]),
            tokenizer=self.manifest["tokenizer_hash"],
            tokens=content_key([shard["sha256"] for shard in self.manifest["shards"]]),
            documents=self.manifest["documents_file"]["sha256"],
            **weights,
        )

    def loss(self) -> Loss:
        """Return the loss of the documents as they became tokens."""
        return Loss(*(self.manifest[count] for count in Loss._fields))

    def split(self, validation_fraction: float, validation_documents: int = 0) -> tuple[Span, Span]:
        """Return the spans of training and validation tokens, which share no document.

        `validation_documents` counts from the end. Else one document is cut at its token
        int(n * (1 - validation_fraction)); several at the last border up to there, or at the
        first one if the first document reaches further. Raises DataError where the documents
        asked for leave none to train on. The two documents of a preference count as one.
        """
        starts_P = self.document_starts[:: 2 if self.examples.get("kind") == "preferences" else 1]
        if validation_documents >= len(starts_P):
            raise DataError(
                f"data.validation_documents={validation_documents} leaves nothing to train on: "
                f"{self.folder} has {len(starts_P):,} documents"
            )
        cut = int(self.num_tokens * (1 - validation_fraction))
        if validation_documents:
            cut = int(starts_P[-validation_documents])
        elif len(starts_P) > 1 and cut < self.num_tokens:
            last = np.searchsorted(starts_P, cut, side="right") - 1
            cut = int(starts_P[max(last, 1)])
        return (0, cut), (cut, self.num_tokens)


class Part(NamedTuple):
    """A source to train on, how often relative to the others, and its tokens."""

    source: str
    weight: Fraction
    store: Store


class Corpus(NamedTuple):
    """All that is trained on, by one tokenizer, and `data.validation_source` where it is set."""

    parts: tuple[Part, ...]
    validation: Store | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of every part."""
        return self.parts[0].store.tokenizer

    def identity(self) -> dict[str, Any]:
        """Return the hashes of every part with its weight, ready for JSON."""
        parts = [{"weight": str(part.weight), **part.store.identity()} for part in self.parts]
        validation = self.validation.identity() if self.validation else {}
        labels = {"labels": list(self.labels)} if self.labels else {}
        return dict(parts=parts, validation=validation, **labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of texts, of which all parts have the same."""
        return self.parts[0].store.labels


class Shards(Sequence):
    """The shards of a store, each mapped when it is first read; the last OPEN_SHARDS stay so."""

    def __init__(self, folder: Path, files: list[str], dtype: np.dtype) -> None:
        self._paths, self._dtype = [folder / file for file in files], dtype
        self._map = functools.lru_cache(OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._map(number)

    def _open(self, number: int) -> np.ndarray:
        path = self._paths[number]  # IndexError ends an iteration
        if not path.stat().st_size:
            return np.zeros(0, self._dtype)
        return np.asarray(np.memmap(path, self._dtype, "r"))  # slices of a memmap cost more


def prepare(
    data: sections.Data,
    cache_dir: Path,
    report: Report = print,
    inherited: Tokenizer | None = None,
    template: str = "",
) -> Corpus:
    """Return the corpus, building the missing stores below `cache_dir`.

    `inherited` is the tokenizer of the parameters to start from, which `data` must not contradict,
    `template` the chat template for examples. Labels are numbered as in the first source. Raises
    ConfigError and DataError as the sources and the tokenizer do, ConfigError where the validation
    source is one to train on, and DataError where a store can't be written or was altered.
    """
    weighted = weighted_sources(data)
    contents = [source_identity(source, data) for _, source in weighted]
    if data.validation_source:
        held_out = source_identity(data.validation_source, data)
        for (_, source), content in zip(weighted, contents, strict=True):
            if content == held_out:
                raise ConfigError(
                    f"data.validation_source={data.validation_source} is also a training source, "
                    f"{source}; name another, or use data.validation_fraction"
                )
    try:
        tokenizer = inherited or ByteTokenizer()
        if data.tokenizer:
            tokenizer = prepare_tokenizer(data, contents, Path(cache_dir), report)
            advice = "leave data.tokenizer unset (--config.data.tokenizer=) to inherit it"
            check_inherited(tokenizer, inherited, f"data.tokenizer={data.tokenizer}", advice)
        prepared = functools.partial(
            prepare_store,
            tokenizer=tokenizer,
            lossy=check_exact(tokenizer, data, cache_dir),
            data=data,
            cache_dir=cache_dir,
            report=report,
            template=template,
        )
        labels: tuple[str, ...] = ()
        parts = []
        for (weight, source), content in zip(weighted, contents, strict=True):
            parts.append(Part(source, weight, prepared(source, content, labels=labels)))
            labels = labels or parts[0].store.labels
        validation = None
        if source := data.validation_source:
            validation = prepared(source, held_out, labels=labels)
    except OSError as error:
        raise DataError(f"can't create the token store in {cache_dir}: {error}") from error
    return Corpus(tuple(parts), validation)


def describe_corpus(corpus: Corpus) -> list[tuple[str, ...]]:
    """Return a table of the corpus as text: a header, then a row for each source."""
    header = ("source", "documents", "bytes", "tokens", "bytes/token", "shards", "folder")
    rows = [(part.source, part.store) for part in corpus.parts]
    rows += [("validation", corpus.validation)] if corpus.validation else []
    table: list[tuple[str, ...]] = [header]
    for name, store in rows:
        text_bytes = store.manifest["text_bytes"]
        counts = store.num_documents, text_bytes, store.num_tokens
        ratio = f"{text_bytes / max(store.num_tokens, 1):.2f}"
        cells = *map("{:,}".format, counts), ratio, f"{len(store.shards):,}", str(store.folder)
        table.append((name, *cells))
    return table


def check_exact(tokenizer: Tokenizer, data: sections.Data, cache_dir: Path) -> bool:
    """Return whether the tokenizer is lossy. Raises DataError if so and `data` won't have it."""
    loss = find_loss(tokenizer)
    if loss and not data.lossy_tokenizer:
        name, advice = data.tokenizer or "of init", ACCEPT_LOSS
        if data.tokenizer in TRAINED:  # by an older version: today's are exact
            advice = f"delete the folder {cache_dir}/tokenizers to train it again"
        raise DataError(f"the tokenizer {name} is lossy: {loss}; {advice}")
    return bool(loss)


def check_inherited(
    tokenizer: Tokenizer, inherited: Tokenizer | None, named: str, advice: str
) -> None:
    """Raise ConfigError if the tokenizer `named` gives ids another meaning than `inherited`."""
    if inherited and tokenizer.content_hash() != inherited.content_hash():
        there, here = (
            f"{one.kind}, {one.vocab_size:,} ids, hash {one.content_hash()}"
            for one in (inherited, tokenizer)
        )
        raise ConfigError(
            f"{named} gives a different tokenizer ({here}) from that of the model in init "
            f"({there}), so token ids would select the wrong embeddings; {advice}"
        )


def prepare_tokenizer(
    data: sections.Data, contents: list[dict[str, Any]], cache_dir: Path, report: Report
) -> Tokenizer:
    """Return the tokenizer of `data`; one that learns does so once for the same sources."""
    if data.tokenizer not in TRAINED:
        return read_tokenizer(data.tokenizer)
    size = data.tokenizer_vocab_size if TRAINED[data.tokenizer] else 0
    content = dict(format=TOKENIZER_FORMAT, kind=data.tokenizer, vocab_size=size, sources=contents)
    content["bad_text"] = data.bad_text
    folder = cache_dir / "tokenizers" / content_key(content)
    with making(folder, report) as unfinished:
        if unfinished:
            texts = (
                document.text
                for _, source in weighted_sources(data)
                for document in read_documents(source, data, report=lambda _: None)
            )
            tokenizer = train_tokenizer(data.tokenizer, texts, data.tokenizer_vocab_size)
            tokenizer.save(unfinished)
    try:
        return load_tokenizer(folder)
    except DataError as error:
        raise refusal(folder, "tokenizer.json", f"can't be used ({error})") from error


def prepare_store(
    source: str,
    content: dict[str, Any],
    tokenizer: Tokenizer,
    lossy: bool,
    data: sections.Data,
    cache_dir: Path,
    report: Report,
    template: str = "",
    labels: tuple[str, ...] = (),
) -> Store:
    """Return the store of one source, whose identity is `content`, tokenized where it is not.

    Examples are written by the chat `template`; `labels` (default: the source's own) give each its
    number. Raises DataError where its texts lose anything by the tokenizer, unless `data` accepts
    that.
    """
    key = dict(format=FORMAT, source=content, tokenizer=tokenizer.content_hash())
    key |= dict(bad_text=data.bad_text, shard_bytes=shards.SHARD_BYTES)
    recipe = None
    if is_examples(source):
        kind, location = source.partition(":")[0], find_source(source, data)[1]
        recipe = Recipe(kind, location, data, template, labels, lossy)
        key |= {"examples": recipe.key()}
    folder = Path(cache_dir) / content_key(key)
    with making(folder, report) as unfinished:
        if unfinished:
            started = time.perf_counter()
            (unfinished / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(unfinished / "tokenizer")
            facts = None
            if recipe:
                bad = BadTexts(data.bad_text, report)
                found, facts = write_example_shards(unfinished, recipe, tokenizer, bad)
            else:
                documents = read_documents(source, data, report)
                found = write_shards(unfinished, documents, tokenizer, data.num_workers, lossy)
            manifest = write_manifest(unfinished, content, found, tokenizer, facts)
            report(
                f"tokenized {source}: {manifest['documents']:,} documents, "
                f"{manifest['text_bytes']:,} bytes, {manifest['tokens']:,} tokens of "
                f"{tokenizer.vocab_size:,} in {time.perf_counter() - started:.1f} s: {folder}"
            )
    store = open_store(folder)
    if any(loss := store.loss()):
        line = (
            f"{source} is altered by its tokenizer: {loss.changed_documents:,} of "
            f"{store.num_documents:,} documents change, {loss.changed_characters:,} characters "
            f"don't come back, {loss.miscounted_bytes:,} bytes are miscounted"
        )
        if not data.lossy_tokenizer:
            raise DataError(f"{line}; {ACCEPT_LOSS}")
        report(line)
    return store


@contextmanager
def making(folder: Path, report: Report) -> Iterator[Path | None]:
    """Give the unfinished `folder` to one process at a time, and rename it once it is complete.

    Gives None if the folder exists. The next process takes over what a killed one left; after a
    UserError nothing is left.
    """
    if folder.exists():
        yield None
        return
    if shards.is_starting_worker():  # it would wait for its parent, which waits for it
        raise DataError(f"can't prepare the data: {shards.UNGUARDED}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock_path, unfinished = (folder.with_name(folder.name + e) for e in (".lock", ".unfinished"))
    with hold_lock(lock_path, f"another process is preparing {folder}", report):
        if folder.exists():
            yield None
            return
        unfinished.mkdir(exist_ok=True)
        try:
            yield unfinished
        except UserError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        os.rename(unfinished, folder)


def open_store(folder: Path) -> Store:
    """Return the store in `folder`, checked against its manifest; it takes no memory to speak of.

    Raises DataError that names the file which is missing, truncated, altered or swapped.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shard_starts, document_starts = read_starts(folder, manifest)
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except DataError as error:
        raise refusal(folder, "tokenizer", f"can't be used ({error})") from error
    if tokenizer.content_hash() != manifest["tokenizer_hash"]:
        raise refusal(folder, "tokenizer", "is not the one that the tokens were made with")
    dtype = token_dtype(tokenizer)
    if dtype.str != manifest["dtype"]:
        what = f"says {manifest['dtype']}, but its tokenizer needs {dtype.str}"
        raise refusal(folder, "manifest.json", what)
    opened = Shards(folder, [shard["file"] for shard in manifest["shards"]], dtype)
    files = [shard["weights"]["file"] for shard in manifest["shards"] if "examples" in manifest]
    weights = Shards(folder, files, np.dtype(np.uint8)) if files else ()
    return Store(folder, manifest, opened, shard_starts, document_starts, tokenizer, weights)


def content_key(content: Any) -> str:
    """Return 16 hex digits that name JSON-able content."""
    return content_hash(content)[:16]
