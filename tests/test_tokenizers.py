"""Every tokenizer gives back the text it took, and counts its bytes."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojaxgpt.data import tokenizers
from nanojaxgpt.data.sources import read_documents
from nanojaxgpt.data.subwords import cut_at_words, draw_sample, join_short
from nanojaxgpt.data.tokenizers import load_tokenizer, train_tokenizer
from nanojaxgpt.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]

TRICKY = [
    "",
    " ",
    "\n",
    "  two  spaces  ",
    "\t\ttabs\n\n\n        if x:\r\n\treturn\r",
    "a\0b\0\0",
    "<s></s><unk><0x0A><pad>",
    "\u2581 \u2581\u2581a\u2581 b\u2581",
    "\u2585 \u2047 \ufffd \ufeff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufb01 \u3000\xa0\x85\u2028",
    "\U0010ffff\x7f",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL = st.text(st.sampled_from("a \n\t\0\r\u2581\u2585\u3000<s/>\u0301é"))


@pytest.fixture(scope="module")
def corpus():
    return [document.text for document in islice(read_documents("stdlib", data_config()), 40)]


@pytest.fixture(scope="module")
def subwords(corpus):
    return train_tokenizer("sentencepiece", corpus, 1024)


def check_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(ids),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.end_id not in ids


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back(text, subwords):
    check_exact(train_tokenizer("bytes", [], 0), text)
    check_exact(train_tokenizer("chars", ["x", text], 0), text)
    check_exact(subwords, text)


@given(text=TEXTS | SPECIAL)
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back(text, subwords):
    check_exact(train_tokenizer("bytes", [], 0), text)
    check_exact(train_tokenizer("chars", ["x", text], 0), text)
    check_exact(subwords, text)


def test_bytes_vocabulary():
    tokenizer = train_tokenizer("bytes", [], 1024)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 97, 256, 300]) == "\ufffda"
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


def test_chars_vocabulary_is_sorted():
    tokenizer = train_tokenizer("chars", ["ba\U0001f600", "éa\n"], 0)
    assert tokenizer.decode(range(5)) == "\nabé\U0001f600"
    assert (tokenizer.vocab_size, tokenizer.end_id) == (5, -1)
    assert tokenizer.token_bytes().tolist() == [1, 1, 1, 2, 4]


@pytest.mark.parametrize("character", ["c", "\0", "\U0001f601"])
def test_unknown_character_is_named(character):
    tokenizer = train_tokenizer("chars", ["abd"], 0)
    with pytest.raises(DataError, match=f"U\\+{ord(character):04X}.*data.tokenizer=bytes"):
        tokenizer.encode(f"ab{character}d")


# Another process: a model must not follow the addresses of what is in memory.
CHILD = """
import sys
from nanojaxgpt.data.tokenizers import train_tokenizer
text = sys.stdin.buffer.read().decode()
print(train_tokenizer("sentencepiece", text.split("\\0"), 1024).content_hash())
"""


def test_sentencepiece_is_the_same_every_time(corpus, subwords):
    again = train_tokenizer("sentencepiece", corpus, 1024)
    assert again.content_hash() == subwords.content_hash()
    assert again.vocab_size == 1024
    command, text = [sys.executable, "-c", CHILD], "\0".join(corpus).encode()
    elsewhere = subprocess.run(command, input=text, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    assert elsewhere.stdout.decode().strip() == subwords.content_hash()
    other = train_tokenizer("sentencepiece", corpus[:-5], 1024)
    assert other.content_hash() != subwords.content_hash()


def test_sentencepiece_is_compact_on_source_code(corpus, subwords):
    text = "".join(corpus)
    assert len(text.encode()) / len(subwords.encode(text)) > 2.5
    assert len(subwords.encode("\n" + " " * 16)) <= 2


def test_sentencepiece_special_ids_stand_for_nothing(subwords):
    assert np.flatnonzero(subwords.token_bytes() == 0).tolist() == [0, subwords.end_id]
    assert subwords.decode([0, subwords.end_id, 5000]) == ""
    byte = subwords.encode("\U0001f600")[:1]
    assert subwords.decode([*byte, *subwords.encode("a")]) == "\ufffda"


def test_long_text_is_cut_without_changing_a_token(corpus, subwords, monkeypatch):
    text = "".join(corpus[:10])
    monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", len(text))
    whole = subwords.encode(text)
    monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", 500)
    assert len(list(cut_at_words(text, 500))) > 100
    np.testing.assert_array_equal(subwords.encode(text), whole)
    check_exact(subwords, "x" * 3000)


def test_corpus_too_small_for_its_vocabulary(capfd):
    with pytest.raises(DataError, match="too small for a SentencePiece vocabulary of 1024"):
        train_tokenizer("sentencepiece", ["hello world, hello"], 1024)
    with pytest.raises(DataError, match=r"raise data\.tokenizer_vocab_size"):
        train_tokenizer("sentencepiece", ["hello world, hello"], 100)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer("sentencepiece", [" ", ""], 300)
    assert capfd.readouterr().err == ""


def test_reserved_characters_do_not_spoil_a_corpus():
    tokenizer = train_tokenizer("sentencepiece", ["hello \u2585 hello\u2581hello \t\0"], 268)
    assert len(tokenizer.encode("hello")) < 5
    check_exact(tokenizer, "hello \u2585 hello\u2581hello \t\0")


def test_sample_of_a_large_corpus_is_bounded_and_spread():
    sample = draw_sample((str(n) for n in range(10_000)), 100)
    assert sample == draw_sample((str(n) for n in range(10_000)), 100)
    assert len(set(sample)) == 100
    assert 3_500 < np.mean([int(n) for n in sample]) < 6_500
    assert draw_sample("abc", 100) == ["a", "b", "c"]


def test_short_texts_are_joined_before_sampling():
    assert list(join_short(["ab", "c", "defg", "h"], 3)) == ["ab\nc", "defg", "h"]
    assert list(join_short([], 3)) == []


@pytest.mark.parametrize("spec", ["bytes", "chars", "sentencepiece"])
def test_saved_tokenizer_is_the_same(spec, tmp_path, corpus, subwords):
    tokenizer = subwords if spec == "sentencepiece" else train_tokenizer(spec, corpus, 0)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.content_hash() == tokenizer.content_hash()
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    np.testing.assert_array_equal(loaded.encode(corpus[1]), tokenizer.encode(corpus[1]))


def test_tokenizers_have_different_hashes(subwords):
    both = [train_tokenizer("chars", [text], 0) for text in ("ab", "abc")]
    hashes = {t.content_hash() for t in (*both, subwords, train_tokenizer("bytes", [], 0))}
    assert len(hashes) == 4
    assert all(len(text) == 16 for text in hashes)


def test_sentencepiece_file(tmp_path, subwords):
    path = tmp_path / "own.model"
    path.write_bytes(subwords.model)
    loaded = train_tokenizer(f"sentencepiece:{path}", [], 0)
    assert loaded.content_hash() == subwords.content_hash()
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"own.model is no SentencePiece model"):
        train_tokenizer(f"sentencepiece:{path}", [], 0)
    path.unlink()
    with pytest.raises(DataError, match=r"no tokenizer file .*own.model"):
        train_tokenizer(f"sentencepiece:{path}", [], 0)


@pytest.mark.parametrize("spec", ["", "byte", "bytes:1", "chars:x", "sentencepiece:"])
def test_unknown_tokenizer_is_a_config_error(spec):
    with pytest.raises(ConfigError, match="bytes, chars, sentencepiece"):
        train_tokenizer(spec, ["text"], 300)


def test_altered_or_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    train_tokenizer("chars", ["abc"], 0).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "characters": "abd"}))
    with pytest.raises(DataError, match="not the one that was saved"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({**description, "kind": "words"}))
    with pytest.raises(DataError, match="no tokenizer kind 'words'"):
        load_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="not a tokenizer's description"):
        load_tokenizer(tmp_path)
