"""How the package `tokenizers` is used: a tokenizer.json, GPT-2's two files, byte-level pieces."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nanojaxgpt.data.subwords import SPACE_MARK
from nanojaxgpt.errors import DataError


def byte_characters() -> dict[str, bytes]:
    """Return the byte that each character stands for in a byte-level vocabulary.

    Printable bytes stand for themselves, the others for the code points from 256 on (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return {c: bytes([byte]) for c, byte in zip(characters, printable + others, strict=True)}


BYTE_OF = byte_characters()


def build_gpt2(vocabulary: bytes, merges: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer of GPT-2's two files, and its settings as a tokenizer.json has them."""
    import tokenizers

    lines = merges.decode().split("\n")
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocabulary), pairs))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    step = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
    return found, dict(model=dict(type="BPE"), pre_tokenizer=step)


def build_from_json(content: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the same of a tokenizer.json, the format of the package `tokenizers`."""
    import tokenizers

    with explained_failure("its settings contradict each other"):
        found = tokenizers.Tokenizer.from_str(content.decode())
    if getattr(found.model, "dropout", None):  # leaves out merges at random
        found.model.dropout = None
    found.no_truncation()
    found.no_padding()
    settings = json.loads(content)
    settings["model"].setdefault("type", type(found.model).__name__)  # old files leave it out
    return found, settings


@contextmanager
def explained_failure(what: str) -> Iterator[None]:
    """Raise DataError where the package fails; a panic of Rust is not even an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {error}") from error


def encode_all(tokenizer: Any, parts: Sequence[str]) -> np.ndarray:
    """Return the ids of texts, int32, one after the other. Raises DataError where it panics."""
    with explained_failure(f"the tokenizer fails on {sum(map(len, parts)):,} characters"):
        encodings = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
    return np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])


def is_byte_level(settings: dict[str, Any]) -> bool:
    """Return whether the pieces of a tokenizer.json are written in BYTE_OF's characters."""
    normalizer, splitter = (settings.get(k) or {} for k in ("normalizer", "pre_tokenizer"))
    steps = [*normalizer.get("normalizers", [normalizer])]
    steps += splitter.get("pretokenizers", [splitter])
    return any(step.get("type") == "ByteLevel" for step in steps)


def find_first_id(found: Any) -> int:
    """Return the id that a tokenizer's author puts before each text, as Llama 3's; -1: none."""
    with explained_failure("the tokenizer fails on one character"):
        plain = found.encode("a", add_special_tokens=False).ids
        ids = found.encode("a").ids
    return ids[0] if ids[1 : 1 + len(plain)] == plain and ids[: len(plain)] != plain else -1


def token_of(content: bytes, number: int) -> str:
    """Return the spelling of a token of a tokenizer.json."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(content.decode()).id_to_token(number) or ""


def export_gpt2(vocabulary: bytes, merges: bytes, end: str) -> bytes:
    """Return the tokenizer.json of GPT-2's two files, with `end` as a special token unless ""."""
    import tokenizers

    found, _ = build_gpt2(vocabulary, merges)
    return finish_json(found, tokenizers.decoders.ByteLevel(), end)


def export_bytes(end: str) -> bytes:
    """Return a tokenizer.json whose ids are the bytes of UTF-8, then `end`."""
    import tokenizers

    pieces = {piece: byte[0] for piece, byte in BYTE_OF.items()} | {end: 256}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    return finish_json(found, tokenizers.decoders.ByteLevel(), end)


def export_characters(characters: str) -> bytes:
    """Return a tokenizer.json whose ids number these characters."""
    import tokenizers

    pieces = {character: number for number, character in enumerate(characters)}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    return finish_json(found, tokenizers.decoders.Fuse(), "")


def export_words(words: Sequence[str]) -> bytes:
    """Return a tokenizer.json whose ids number these words, with spaces between."""
    import tokenizers

    pieces = {word: number for number, word in enumerate(words)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, words[0]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return finish_json(found, None, "")


def export_sentencepiece(pieces: Sequence[tuple[str, float]], special: Sequence[int]) -> bytes:
    """Return the tokenizer.json of an exact SentencePiece model: its pieces with their scores.

    Scores that are whole numbers are the order of merges, others log-probabilities.
    """
    import tokenizers

    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    unknown = pieces[special[0]][0]
    if all(score.is_integer() for _, score in pieces):
        texts = {piece for number, (piece, _) in enumerate(pieces) if number not in special}
        merges = [
            (piece[:cut], piece[cut:])
            for piece, _ in sorted(pieces, key=lambda one: -one[1])
            for cut in range(1, len(piece))
            if piece in texts and {piece[:cut], piece[cut:]} <= texts
        ]
        model: Any = tokenizers.models.BPE(
            ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    else:
        model = tokenizers.models.Unigram(list(pieces), special[0], byte_fallback=True)
    found = tokenizers.Tokenizer(model)
    found.normalizer = tokenizers.normalizers.Replace(" ", SPACE_MARK)
    steps = tokenizers.decoders
    parts = [steps.Replace(SPACE_MARK, " "), steps.ByteFallback(), steps.Fuse()]
    found.add_special_tokens([pieces[number][0] for number in special])
    return finish_json(found, steps.Sequence(parts), "")


def finish_json(found: Any, decoder: Any, end: str) -> bytes:
    """Return a tokenizer as JSON, with its decoder and its end token."""
    import tokenizers

    if decoder is not None:
        found.decoder = decoder
    if end:
        found.add_special_tokens([tokenizers.AddedToken(end, special=True, normalized=False)])
    return found.to_str().encode()
