"""In: text. Out: token ids, and the text again; a tokenizer is kept in a folder.

Every tokenizer trained here is exact: `decode(encode(text)) == text`, and the bytes that the ids
stand for add up to the bytes of the text. Text that spells a special token is text. One of
somebody else's may be lossy: see exactness.py.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece

from nanojaxgpt.data.subwords import SPACE_MARK, cut_after_letters, may_cut, train_sentencepiece
from nanojaxgpt.data.tokenizer_files import mark_bytes, read_model, short_hash
from nanojaxgpt.data.tokenizer_json import (
    BYTE_OF,
    build_from_json,
    build_gpt2,
    encode_all,
    find_first_id,
    is_byte_level,
)
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.regular import read_regular

KINDS = (
    "bytes, chars, sentencepiece, sentencepiece-unigram, sentencepiece:FILE, gpt2:FOLDER, hf:FILE"
)
NO_CONTROL: dict[str, int] = {}
# What the files of a tokenizer don't say, but the model that it comes with.
MARKS = ("end_id", "start_id", "vocab_size")
NO_MARKS: Mapping[str, int] = {}
TRAINED = {"chars": "", "sentencepiece": "bpe", "sentencepiece-unigram": "unigram"}


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    kind: str
    vocab_size: int
    end_id: int  # follows each document; -1: this tokenizer has no such token
    start_id: int  # begins each prompt; -1: nothing does
    spellings: tuple[str, ...]  # of tokens that are no text, or found before all others
    control: dict[str, int]  # ids of the tokens that no text becomes, by their spelling

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids of `text`, without an end token."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text; incomplete UTF-8 becomes U+FFFD, ids without text become nothing."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes that an id stands for, none for a special id."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Return int32 [V]: how many UTF-8 bytes each id stands for, 0 for special ids."""
        ...

    def content_hash(self) -> str:
        """Return 16 hex digits that name what the tokenizer does."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into an existing folder."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 and an end token."""

    kind = "bytes"
    vocab_size = 257
    end_id = 256
    start_id = -1
    spellings = ()
    control = NO_CONTROL

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(i for i in np.asarray(ids).tolist() if i < 256).decode(errors="replace")

    def piece(self, token: int) -> bytes:
        return bytes([token] if token < 256 else [])

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def content_hash(self) -> str:
        return short_hash(self.kind.encode())

    def save(self, folder: Path) -> None:
        write_description(folder, self, {})


class CharTokenizer:
    """The given characters, in the order of their code points; no end token."""

    kind = "chars"
    end_id = start_id = -1
    spellings = ()
    control = NO_CONTROL

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

    def piece(self, token: int) -> bytes:
        return self.characters[token].encode()

    def token_bytes(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.characters], np.int32)

    def content_hash(self) -> str:
        return short_hash(self.kind.encode() + self.characters.encode())

    def save(self, folder: Path) -> None:
        write_description(folder, self, dict(characters=self.characters))


class WordTokenizer:
    """The given words, as a generated task uses them, with spaces between; no end token."""

    kind = "words"
    end_id = start_id = -1
    spellings = ()
    control = NO_CONTROL

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self.vocab_size = len(self.words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids of `text`. Raises DataError for a word outside the vocabulary."""
        try:
            return np.array([self._ids[word] for word in text.split()], np.int32)
        except KeyError as error:
            near = " ".join(self.words[:12])
            raise DataError(
                f"{error} is not a word of this task; its words are {near} ..."
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = (i for i in np.asarray(ids).tolist() if i < self.vocab_size)
        return " ".join(self.words[i] for i in known)

    def piece(self, token: int) -> bytes:
        return f"{self.words[token]} ".encode()

    def token_bytes(self) -> np.ndarray:
        return np.array([len(f"{word} ".encode()) for word in self.words], np.int32)

    def content_hash(self) -> str:
        return short_hash(" ".join((self.kind, *self.words)).encode())

    def save(self, folder: Path) -> None:
        write_description(folder, self, dict(words=self.words))


# Longer texts take 3 times as long in one call, and memory in proportion.
SEGMENT_CHARS = 1 << 16
# A model that leaves this as it is leaves every text as it is.
PROBE = "  two\t spaces\n\n e\u0301 \ufb01 \u3000 "


class SentencePieceTokenizer:
    """A SentencePiece model.

    A model that normalizes text or has no byte pieces stays as lossy as its author made it.
    A long text is cut where that can't change a token: before spaces, if no piece has one after
    another character, and if all scores are whole numbers, as those of merges are: sums of others
    are rounded by how far into a text they are, and decide between near ties.
    `marks` may name another end_id, and a start_id.
    Raises DataError where `model` is not a SentencePiece model; `origin` names it.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str, marks: Mapping[str, int] = NO_MARKS) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"{origin} is not a SentencePiece model") from error
        self.model = model
        self.vocab_size = self._processor.vocab_size()
        if not self.vocab_size:
            raise DataError(f"{origin} is an empty SentencePiece model")
        self.marks = dict(marks)
        self.end_id = marks.get("end_id", self._processor.eos_id())
        self.start_id = marks.get("start_id", -1)
        self.first_id = self._processor.bos_id()  # what start_id is for its author
        sizes = [len(self.piece(i)) for i in range(self.vocab_size)]
        self._bytes_V = np.array(sizes, np.int32)
        # A mark that stands in the text itself would come back as a space.
        self._mark_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]
        keeps_text = self._processor.normalize(PROBE) == PROBE.replace(" ", SPACE_MARK)
        self.exact = keeps_text and all(map(self._processor.is_byte, self._mark_ids))
        ids = range(self.vocab_size)
        pieces = list(map(self._processor.id_to_piece, ids))
        self.control = {pieces[i]: i for i in ids if self._processor.is_control(i)}
        textless = zip(ids, pieces, strict=True)
        self.spellings = tuple(piece for i, piece in textless if not self._bytes_V[i])
        self._can_cut = all(SPACE_MARK not in piece.lstrip(SPACE_MARK) for piece in pieces) and all(
            self._processor.get_score(i).is_integer() for i in ids
        )

    def pieces(self) -> list[tuple[str, float]]:
        """Return the spelling and the score of each token."""
        known = self._processor
        return [(known.id_to_piece(i), known.get_score(i)) for i in range(self.vocab_size)]

    def special(self) -> list[int]:
        """Return the ids that are no text, first the one for what has no piece."""
        known, ids = self._processor, range(self.vocab_size)
        return [known.unk_id(), *filter(known.is_control, ids)]

    def encode(self, text: str) -> np.ndarray:
        if not self.exact:
            return np.array(self._processor.encode(text), np.int32)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                ids += self._mark_ids
            segments = cut_after_letters(part, SEGMENT_CHARS) if self._can_cut else [part]
            for segment in segments:
                ids += self._processor.encode(segment)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = (i for i in np.asarray(ids).tolist() if i < self.vocab_size)
        return self._processor.decode([i for i in known if self._bytes_V[i]])

    def token_bytes(self) -> np.ndarray:
        return self._bytes_V

    def piece(self, token: int) -> bytes:
        spelled = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes.fromhex(spelled[3:5])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return spelled.replace(SPACE_MARK, " ").encode()

    def content_hash(self) -> str:
        return short_hash(self.kind.encode() + self.model + mark_bytes(self.marks))

    def save(self, folder: Path) -> None:
        (folder / "sentencepiece.model").write_bytes(self.model)
        write_description(folder, self, self.marks)


# What ends a document in the vocabularies that people share, the surest first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
GPT2_FILES = ("encoder.json", "vocab.bpe")  # what they are called in a run's folder
GPT2_NAMES = (GPT2_FILES, ("vocab.json", "merges.txt"), ("gpt2_encoder.json", "gpt2_vocab.bpe"))
HF_FILES = ("huggingface.json",)
LARGEST_VOCABULARY = 1 << 24  # above every one in use; a table of all ids is kept


class JsonTokenizer:
    """A tokenizer that the package `tokenizers` runs: GPT-2's two files or a tokenizer.json.

    It stays as lossy as its author made it. `marks` may name its end_id, else the likeliest of
    END_TOKENS is it, a start_id, and a vocab_size that leaves out special tokens from there on.
    Raises DataError where the files are no tokenizer; `origin` names them.
    """

    def __init__(
        self, kind: str, files: dict[str, bytes], origin: str, marks: Mapping[str, int] = NO_MARKS
    ) -> None:
        self.kind, self.files, self.marks = kind, files, dict(marks)
        build = build_gpt2 if kind == "gpt2" else build_from_json
        try:
            self._tokenizer, settings = build(*files.values())
            self._byte_level, self._can_cut = is_byte_level(settings), may_cut(settings)
        except Exception as error:  # the package raises nothing more special
            raise DataError(f"{origin} can't be read as a tokenizer: {error}") from error
        self._tokenizer.encode_special_tokens = True
        model = settings["model"]
        self._prefix = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else ""
        self._byte_fallback = model.get("byte_fallback", False)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        size = marks.get("vocab_size", LARGEST_VOCABULARY)
        vocabulary = {p: i for p, i in vocabulary.items() if i < size or i not in special}
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            number = f"the id {self.vocab_size - 1:,}" if vocabulary else "no tokens"
            raise DataError(f"{origin} can't be used as a tokenizer: its vocabulary has {number}")
        likely = next((vocabulary[token] for token in END_TOKENS if token in vocabulary), -1)
        self.end_id, self.start_id = marks.get("end_id", likely), marks.get("start_id", -1)
        self.spellings = tuple(token.content for token in added.values())
        self.control: dict[str, int] = {
            token.content: i for i, token in added.items() if token.special and i < self.vocab_size
        }
        self._special = special | {self.end_id, self.start_id}
        self._bytes: list[bytes] = [b""] * self.vocab_size
        for piece, number in vocabulary.items():
            if number in added and number not in self._special:
                self._bytes[number] = added[number].content.encode()
            elif number not in self._special:
                self._bytes[number] = self._piece_bytes(piece)

    @property
    def first_id(self) -> int:
        """What start_id is for its author; -1: nothing."""
        return find_first_id(self._tokenizer)

    def token_id(self, token: str) -> int:
        """Return the id of a token; -1: it has none of this spelling."""
        found = self._tokenizer.token_to_id(token)
        return -1 if found is None else found

    def _piece_bytes(self, piece: str) -> bytes:
        if self._byte_level:
            return b"".join(BYTE_OF.get(c) or c.encode() for c in piece)
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.removeprefix(self._prefix).replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        parts = list(cut_after_letters(text, SEGMENT_CHARS)) if self._can_cut else [text]
        return encode_all(self._tokenizer, parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = [i for i in np.asarray(ids).tolist() if i < self.vocab_size]
        if self._byte_level:
            return b"".join(self._bytes[i] for i in known).decode(errors="replace")
        return self._tokenizer.decode([i for i in known if i not in self._special])

    def piece(self, token: int) -> bytes:
        return self._bytes[token]

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._bytes], np.int32)

    def content_hash(self) -> str:
        content = b"\0".join([self.kind.encode(), *self.files.values()])
        return short_hash(content + mark_bytes(self.marks))

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        write_description(folder, self, self.marks)


def train_tokenizer(spec: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer that `spec` (`data.tokenizer`) names, trained on `texts` if it learns.

    `vocab_size` counts for SentencePiece alone. Raises ConfigError for an unknown spec, DataError
    for a file that can't be used or a corpus that can't fill the vocabulary.
    """
    if spec == "chars":
        return CharTokenizer(character for text in texts for character in set(text))
    if spec in TRAINED:
        model = train_sentencepiece(texts, vocab_size, TRAINED[spec])
        return SentencePieceTokenizer(model, "the trained model")
    return read_tokenizer(spec)


def read_tokenizer(spec: str) -> Tokenizer:
    """Return a tokenizer that learns nothing. Raises ConfigError, DataError as training does."""
    kind, _, location = spec.partition(":")
    path = Path(location).expanduser()
    if spec == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece" and location:
        return SentencePieceTokenizer(read_model(path), location)
    if kind == "gpt2" and location:
        for names in GPT2_NAMES:
            if all((path / name).is_file() for name in names):
                contents = [read_model(path / name) for name in names]
                return JsonTokenizer(kind, dict(zip(GPT2_FILES, contents, strict=True)), location)
        pairs = ", ".join(" and ".join(names) for names in GPT2_NAMES)
        raise DataError(f"data.tokenizer={spec}: no GPT-2 vocabulary in {path}: {pairs}")
    if kind == "hf" and location:
        return JsonTokenizer(kind, {HF_FILES[0]: read_model(path)}, location)
    raise ConfigError(f"data.tokenizer={spec!r} must be one of {KINDS}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer saved in `folder`. Raises DataError: missing, altered or unknown."""
    path = Path(folder) / "tokenizer.json"
    try:
        description = json.loads(read_regular(path))
        kind, content_hash = description["kind"], description["hash"]
        marks = {name: int(description[name]) for name in MARKS if name in description}
        if kind == "bytes":
            tokenizer: Tokenizer = ByteTokenizer()
        elif kind == "chars":
            tokenizer = CharTokenizer(description["characters"])
        elif kind == "words":
            tokenizer = WordTokenizer(description["words"])
        elif kind == "sentencepiece":
            model_path = path.with_name("sentencepiece.model")
            tokenizer = SentencePieceTokenizer(read_model(model_path), str(model_path), marks)
        elif kind in ("gpt2", "hf"):
            names = GPT2_FILES if kind == "gpt2" else HF_FILES
            files = {name: read_model(path.with_name(name)) for name in names}
            tokenizer = JsonTokenizer(kind, files, str(folder), marks)
        else:
            raise DataError(
                f"{path}: no tokenizer kind {kind!r}; the file was written by another version"
            )
    except OSError as error:
        raise DataError(f"no tokenizer in {folder}: {error.strerror}: {error.filename}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer's description: {error!r}") from error
    if tokenizer.content_hash() != content_hash:
        raise DataError(f"the tokenizer in {folder} is not the one that was saved there")
    return tokenizer


def code_points(text: str) -> np.ndarray:
    """Return the uint32 code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def write_description(folder: Path, tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Write tokenizer.json: kind, hash and what else the kind needs."""
    description = dict(kind=tokenizer.kind, hash=tokenizer.content_hash(), **fields)
    (folder / "tokenizer.json").write_text(json.dumps(description, indent=2) + "\n")
