"""In: text. Out: token ids, and the text again; a tokenizer is kept in a folder.

Every tokenizer trained here is exact: `decode(encode(text)) == text`, and the bytes that the ids
stand for add up to the bytes of the text.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from nanojaxgpt.data.subwords import SPACE_MARK, cut_at_words, train_sentencepiece
from nanojaxgpt.errors import ConfigError, DataError

KINDS = "bytes, chars, sentencepiece, sentencepiece:FILE"


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    kind: str
    vocab_size: int
    end_id: int  # follows each document; -1: this tokenizer has no such token

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids of `text`, without an end token."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; incomplete UTF-8 becomes U+FFFD, ids without text become nothing."""

    def token_bytes(self) -> np.ndarray:
        """Return int32 [V]: the UTF-8 bytes each id stands for, 0 for special ids."""

    def content_hash(self) -> str:
        """Return 16 hex digits that name what the tokenizer does."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into an existing folder."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end token."""

    kind = "bytes"
    vocab_size = 257
    end_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def content_hash(self) -> str:
        return short_hash(self.kind.encode())

    def save(self, folder: Path) -> None:
        write_description(folder, self, {})


class CharTokenizer:
    """The given characters, in the order of their code points; no end token."""

    kind = "chars"
    end_id = -1

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self._codes_V = code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids of `text`. Raises DataError for a character outside the set."""
        codes = code_points(text)
        ids = np.searchsorted(self._codes_V, codes).astype(np.int32)
        unknown = self._codes_V[np.minimum(ids, self.vocab_size - 1)] != codes
        if unknown.any():
            character = text[int(unknown.argmax())]
            raise DataError(
                f"character {character!r} (U+{ord(character):04X}) is not among the "
                f"{self.vocab_size} that this tokenizer was built from; leave it out, "
                "or train with data.tokenizer=bytes"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = (i for i in np.asarray(ids).tolist() if i < self.vocab_size)
        return "".join(self.characters[i] for i in known)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.characters], np.int32)

    def content_hash(self) -> str:
        return short_hash(self.kind.encode() + self.characters.encode())

    def save(self, folder: Path) -> None:
        write_description(folder, self, dict(characters=self.characters))


# Longer texts take 3 times as long in one call, and memory in proportion.
SEGMENT_CHARS = 1 << 16
# A model that leaves this as it is leaves every text as it is.
PROBE = "  two\t spaces\n\n e\u0301 \ufb01 \u3000 "


class SentencePieceTokenizer:
    """A SentencePiece model.

    A model that normalizes text or has no byte pieces stays as lossy as its author made it.
    Raises DataError where `model` is no SentencePiece model; `origin` names it.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{origin} is no SentencePiece model") from error
        self.model = model
        self.vocab_size = self._processor.vocab_size()
        if not self.vocab_size:
            raise DataError(f"{origin} is an empty SentencePiece model")
        self.end_id = self._processor.eos_id()
        self._bytes_V = np.array([self._count_bytes(i) for i in range(self.vocab_size)], np.int32)
        # A mark that stands in the text itself would come back as a space.
        self._mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        keeps_text = self._processor.normalize(PROBE) == PROBE.replace(" ", SPACE_MARK)
        self._exact = keeps_text and all(map(self._processor.is_byte, self._mark_ids))

    def encode(self, text: str) -> np.ndarray:
        if not self._exact:
            return np.array(self._processor.encode(text), np.int32)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                ids += self._mark_ids
            for segment in cut_at_words(part, SEGMENT_CHARS):
                ids += self._processor.encode(segment)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = (i for i in np.asarray(ids).tolist() if i < self.vocab_size)
        return self._processor.decode([i for i in known if self._bytes_V[i]])

    def token_bytes(self) -> np.ndarray:
        return self._bytes_V

    def _count_bytes(self, token_id: int) -> int:
        if self._processor.is_byte(token_id):
            return 1
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return 0
        return len(self._processor.id_to_piece(token_id).replace(SPACE_MARK, " ").encode())

    def content_hash(self) -> str:
        return short_hash(self.kind.encode() + self.model)

    def save(self, folder: Path) -> None:
        (folder / "sentencepiece.model").write_bytes(self.model)
        write_description(folder, self, {})


def train_tokenizer(spec: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer that `spec` (`data.tokenizer`) names, trained on `texts` if it learns.

    `vocab_size` counts for `sentencepiece` alone. Raises ConfigError for an unknown spec, DataError
    for a model file that can't be used or a corpus that can't fill the vocabulary.
    """
    kind, _, file = spec.partition(":")
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "chars":
        return CharTokenizer(character for text in texts for character in set(text))
    if spec == "sentencepiece":
        return SentencePieceTokenizer(train_sentencepiece(texts, vocab_size), "the trained model")
    if kind == "sentencepiece" and file:
        return SentencePieceTokenizer(read_model(Path(file).expanduser()), file)
    raise ConfigError(f"data.tokenizer={spec!r} is none of {KINDS}")


def tokenizer_identity(spec: str, vocab_size: int) -> dict[str, Any]:
    """Return what decides the tokenizer that `spec` gives on a corpus. Raises as training does."""
    kind, _, file = spec.partition(":")
    if kind == "sentencepiece" and file:
        model = read_model(Path(file).expanduser())
        return dict(kind=kind, sha256=hashlib.sha256(model).hexdigest())
    return dict(kind=spec, vocab_size=vocab_size) if spec == "sentencepiece" else dict(kind=spec)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer saved in `folder`. Raises DataError: missing, altered or unknown."""
    path = Path(folder) / "tokenizer.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        kind, content_hash = description["kind"], description["hash"]
        if kind == "bytes":
            tokenizer: Tokenizer = ByteTokenizer()
        elif kind == "chars":
            tokenizer = CharTokenizer(description["characters"])
        elif kind == "sentencepiece":
            model_path = path.with_name("sentencepiece.model")
            tokenizer = SentencePieceTokenizer(read_model(model_path), str(model_path))
        else:
            raise DataError(f"{path}: no tokenizer kind {kind!r}; another version wrote it")
    except OSError as error:
        raise DataError(f"no tokenizer in {folder}: {error.strerror}: {error.filename}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a tokenizer's description: {error!r}") from error
    if tokenizer.content_hash() != content_hash:
        raise DataError(f"the tokenizer in {folder} is not the one that was saved there")
    return tokenizer


def code_points(text: str) -> np.ndarray:
    """Return the uint32 code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def read_model(path: Path) -> bytes:
    """Return the bytes of a model file. Raises DataError where there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"no SentencePiece model {path}: {error.strerror}") from error


def short_hash(data: bytes) -> str:
    """Return 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_description(folder: Path, tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    """Write tokenizer.json: kind, hash and what else the kind needs."""
    description = dict(kind=tokenizer.kind, hash=tokenizer.content_hash(), **fields)
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=2) + "\n")
