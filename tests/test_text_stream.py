"""Text as its ids arrive: the same whatever the chunks, cut at stop strings, never taken back."""

import functools

import numpy as np
import pytest

from nanojaxgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    train_tokenizer,
)
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.text_stream import TextStream, encode_prompt

TEXT = "The café 😀 has \ufffd two  spaces\n\nand ends 日本. ENDEND"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return a tokenizer whose tokens are bytes, characters, words or pieces."""
    if kind == "pieces":
        return train_tokenizer("sentencepiece", ["the cat has two spaces and ends. "] * 50, 290)
    makers = {"bytes": ByteTokenizer, "chars": lambda: CharTokenizer(TEXT)}
    return makers[kind]() if kind in makers else WordTokenizer(TEXT.split())


def chunks(ids: list[int], seed: int) -> list[list[int]]:
    """Return the ids in chunks of 0 to 8."""
    rng, parts = np.random.default_rng(seed), []
    while ids:
        size = rng.integers(0, 9)
        parts.append(ids[:size])
        ids = ids[size:]
    return parts


def run(stream: TextStream, parts: list[list[int]]) -> tuple[str, list[str]]:
    """Return the whole text, and what each chunk and the end gave."""
    pieces = [stream.add(part) for part in parts] + [stream.close()]
    assert "".join(pieces) == stream.text
    assert stream.add([0]) == stream.close() == ""
    return stream.text, pieces


@pytest.mark.parametrize("kind", ["bytes", "chars", "words", "pieces"])
@pytest.mark.parametrize("prompt_len", [1, 7])
def test_chunks_give_the_text_of_the_whole(kind, prompt_len):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXT).tolist()
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:prompt_len])
    for seed in range(20):
        parts = chunks(ids[prompt_len:], seed)
        stream = TextStream(tokenizer, ids[:prompt_len])
        text, pieces = run(stream, parts)
        assert prompt + text == whole
        assert stream.finish == "length"
        assert not pieces[-1]  # streamed, not kept for the end


@pytest.mark.parametrize("kind", ["bytes", "chars", "pieces"])
@pytest.mark.parametrize(
    "stop",
    [("😀",), ("two  spaces",), ("ENDEND",), ("\n\n", "two"), ("ENDING", "END"), ("nothing",)],
)
def test_text_ends_before_the_first_stop_string(kind, stop):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXT).tolist()
    rest = tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
    expected = rest[: min([rest.find(s) for s in stop if s in rest], default=len(rest))]
    for parts in (chunks(ids[1:], 0), [[token] for token in ids[1:]], [ids[1:]]):
        stream = TextStream(tokenizer, ids[:1], stop)
        assert run(stream, parts)[0] == expected
        assert stream.finish == ("stop" if expected != rest else "length")


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(ByteTokenizer(), b"x", ("STOP",))
    pieces = [stream.add(list(part)) for part in (b"a S", b"T", b"O", b"Z S", b"STO", b"P b")]
    assert pieces == ["a ", "", "", "STOZ ", "S", ""]
    assert (stream.finish, stream.text) == ("stop", "a STOZ S")
    stream = TextStream(ByteTokenizer(), b"STO", ("STOP",))  # a stop string is not in the prompt
    assert stream.add(list(b"P STO")) == "P "
    assert stream.close() == "STO"
    assert stream.finish == "length"


def test_incomplete_characters_are_held_back():
    stream = TextStream(ByteTokenizer(), b"x")
    smile = list("😀".encode())
    assert [stream.add([byte]) for byte in smile] == ["", "", "", "😀"]
    assert stream.add([*smile, smile[0]]) == "😀"
    assert stream.close() == "\ufffd"
    never = TextStream(ByteTokenizer(), b"x")
    assert run(never, [[0xFF] * 3] * 4)[0] == "\ufffd" * 12


@pytest.mark.parametrize(("end_ids", "text"), [((256,), "ab c"), ((256, ord(" ")), "ab")])
def test_text_ends_at_any_of_the_end_ids(end_ids, text):
    stream = TextStream(ByteTokenizer(), b"x", ("c!",), end_ids)
    assert run(stream, [list(b"ab c"), [256, 256], [256]])[0] == text
    assert stream.finish == "end"
    stream = TextStream(ByteTokenizer(), b"x", ("b c",), (256,))
    assert stream.add([*b"ab c", 256]) == "a"
    assert stream.finish == "stop"


def test_only_the_last_ids_are_decoded_again():
    tokenizer, sizes = ByteTokenizer(), []

    class Counting(ByteTokenizer):
        def decode(self, ids):
            sizes.append(len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Counting(), [97] * 1000)
    for _ in range(500):
        stream.add([98] * 8)
    assert stream.text == "b" * 4000
    assert max(sizes[3:]) == 16


def test_prompts_are_encoded_or_refused():
    assert encode_prompt(ByteTokenizer(), "ab") == [97, 98]
    assert encode_prompt(ByteTokenizer(), "") == [256]
    assert encode_prompt(tokenizer_of("pieces"), "") == [tokenizer_of("pieces").end_id]
    for kind, text in (("chars", ""), ("words", ""), ("words", " \n")):
        with pytest.raises(ConfigError, match="no end token to start from"):
            encode_prompt(tokenizer_of(kind), text)
    with pytest.raises(DataError, match="'Z'"):
        encode_prompt(tokenizer_of("chars"), "Z")
