"""Every tokenizer gives back the text it took, and counts its bytes."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojaxgpt.data import tokenizers
from nanojaxgpt.data.sources import read_documents
from nanojaxgpt.data.subwords import cut_after_letters, cut_at_words, draw_sample, join_short
from nanojaxgpt.data.tokenizer_json import BYTE_OF
from nanojaxgpt.data.tokenizers import load_tokenizer, read_tokenizer, train_tokenizer
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
    "<|endoftext|> the <|endoftext|>",
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


@pytest.fixture(scope="module")
def unigram(corpus):
    return train_tokenizer("sentencepiece-unigram", corpus[:12], 1024)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return a small byte-level vocabulary in GPT-2's format, from its two files."""
    return read_tokenizer(f"gpt2:{write_gpt2(tmp_path_factory.mktemp('gpt2'))}")


def write_gpt2(folder, names=("encoder.json", "vocab.bpe")):
    """Write the 256 bytes, some merges and the end token as GPT-2 writes its own."""
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "Ã ©", "e n", "en d", "Ċ Ċ"]
    pieces = [*BYTE_OF, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / names[0]).write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def check_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(ids),)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert b"".join(tokenizer.piece(i) for i in ids.tolist()) == text.encode()
    assert tokenizer.end_id not in ids


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back(text, subwords, unigram, gpt2):
    check_exact(train_tokenizer("bytes", [], 0), text)
    check_exact(train_tokenizer("chars", ["x", text], 0), text)
    check_exact(subwords, text)
    check_exact(unigram, text)
    check_exact(gpt2, text)


@given(text=TEXTS | SPECIAL)
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back(text, subwords, unigram, gpt2):
    check_exact(train_tokenizer("bytes", [], 0), text)
    check_exact(train_tokenizer("chars", ["x", text], 0), text)
    check_exact(subwords, text)
    check_exact(unigram, text)
    check_exact(gpt2, text)


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
    few = corpus[:4]
    unigrams = {train_tokenizer("sentencepiece-unigram", few, 400).content_hash() for _ in "ab"}
    assert len(unigrams) == 1
    assert subwords.content_hash() not in unigrams


def test_sentencepiece_is_compact_on_source_code(corpus, subwords, unigram):
    text = "".join(corpus)
    assert len(text.encode()) / len(subwords.encode(text)) > 2.5
    assert len(text.encode()) / len(unigram.encode(text)) > 2
    assert not np.array_equal(unigram.encode(text), subwords.encode(text))
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


@pytest.mark.parametrize("spec", ["bytes", "chars", "sentencepiece", "gpt2", "hf"])
def test_saved_tokenizer_is_the_same(spec, tmp_path, corpus, subwords, gpt2, qwen):
    known = dict(sentencepiece=subwords, gpt2=gpt2, hf=qwen)
    tokenizer = known[spec] if spec in known else train_tokenizer(spec, corpus, 0)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.content_hash() == tokenizer.content_hash()
    assert (loaded.vocab_size, loaded.end_id) == (tokenizer.vocab_size, tokenizer.end_id)
    np.testing.assert_array_equal(loaded.encode(corpus[1]), tokenizer.encode(corpus[1]))


def test_devices_and_pipes_are_not_read(tmp_path):
    pipe = tmp_path / "tokenizer.json"
    os.mkfifo(pipe)
    for spec in ("hf:/dev/null", "sentencepiece:/dev/null", f"hf:{pipe}", f"sentencepiece:{pipe}"):
        with pytest.raises(DataError, match="it is a device, a pipe or a socket"):
            read_tokenizer(spec)
    with pytest.raises(DataError, match="it is a device, a pipe or a socket"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "words"), [({}, "has no tokens"), ({"a": 2**32 - 1}, "has the id 4,294,967,295")]
)
def test_a_vocabulary_that_no_model_can_have_is_refused(vocabulary, words, tmp_path):
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (tmp_path / "t.json").write_text(json.dumps({"model": model}))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("")
    for spec in (f"hf:{tmp_path}/t.json", f"gpt2:{tmp_path}"):
        with pytest.raises(DataError, match=f"as a tokenizer: its vocabulary {words}"):
            read_tokenizer(spec)


def test_an_old_file_without_the_models_type_is_read(tmp_path):
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    for number, more in enumerate(({}, {"type": "BPE"})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"model": more | model}))
        assert read_tokenizer(f"hf:{path}").encode("aba").tolist() == [2, 0]


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
    with pytest.raises(DataError, match=r"own.model is not a SentencePiece model"):
        train_tokenizer(f"sentencepiece:{path}", [], 0)
    path.unlink()
    with pytest.raises(DataError, match=r"no tokenizer file .*own.model"):
        train_tokenizer(f"sentencepiece:{path}", [], 0)


@pytest.mark.parametrize(
    "spec", ["", "byte", "bytes:1", "chars:x", "sentencepiece:", "gpt2", "hf:"]
)
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
    path.write_text(json.dumps({**description, "kind": "morse"}))
    with pytest.raises(DataError, match="no tokenizer kind 'morse'"):
        load_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="not a tokenizer's description"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return a byte-level tokenizer.json with special tokens, whose splits are those of Qwen."""
    from tokenizers import AddedToken, Regex, Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ċ", "Ċ"), (";", "Ċ")]
    pieces = [*BYTE_OF, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    splits = [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = Sequence(splits)
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    made.save(str(path))
    return read_tokenizer(f"hf:{path}")


@pytest.mark.parametrize("text", [*TRICKY, "a <think> b<|im_end|>", "the the;\n\n the"])
def test_tokenizer_json_is_exact_where_it_is_byte_level(text, qwen):
    check_exact(qwen, text)


def test_special_tokens_of_a_tokenizer_json(qwen):
    special = [261, 262]
    assert (qwen.vocab_size, qwen.end_id) == (264, 261)
    assert not set(special) & set(qwen.encode("<|endoftext|><|im_end|>").tolist())
    assert qwen.encode("<think>").tolist() == [263]
    assert qwen.decode([261, *qwen.encode("the"), 262, 999]) == "the"
    assert qwen.token_bytes()[[*special, 263]].tolist() == [0, 0, 7]


def test_other_tokenizer_json_counts_its_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = {"<unk>": 0.0, "\u2581the": -1.0, "\u2581": -2.0, "<0xC3>": -3.0, "<0xA9>": -3.0}
    pieces = list(scores.items())
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(f"hf:{tmp_path}/tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("the the é")) == "the the é"
    assert tokenizer.token_bytes().tolist() == [5, 4, 1, 1, 1]
    assert tokenizer.end_id == -1


def test_long_text_is_cut_for_gpt2_without_changing_a_token(corpus, gpt2, qwen, monkeypatch):
    text = "".join(corpus[:10])
    for tokenizer in (gpt2, qwen):
        monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", len(text))
        whole = tokenizer.encode(text)
        monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", 50)
        np.testing.assert_array_equal(tokenizer.encode(text), whole)
    parts = list(cut_after_letters("one  two\n   three four ", 1))
    assert parts == ["one", "  two\n   three", " four", " "]
    assert list(cut_after_letters("\n  \n", 1)) == ["\n  \n"]


@pytest.mark.parametrize("names", tokenizers.GPT2_NAMES)
def test_gpt2_files_may_have_any_of_their_names(names, gpt2, tmp_path):
    found = read_tokenizer(f"gpt2:{write_gpt2(tmp_path, names)}")
    assert found.content_hash() == gpt2.content_hash()
    assert (
        found.encode(" the end").tolist()
        == [258, 32 - 32 + 256 + 4, 0][:1] + found.encode(" end").tolist()
    )


def test_vocabulary_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no GPT-2 vocabulary in .*encoder.json and vocab.bpe"):
        read_tokenizer(f"gpt2:{tmp_path}")
    with pytest.raises(DataError, match=r"no tokenizer file .*absent.json"):
        read_tokenizer(f"hf:{tmp_path}/absent.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json can't be read as a tokenizer"):
        read_tokenizer(f"hf:{tmp_path}/tokenizer.json")
    write_gpt2(tmp_path)
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match="can't be read as a tokenizer"):
        read_tokenizer(f"gpt2:{tmp_path}")


# The ids are those of tiktoken 0.14.0, its encoding built from the same two files by
# tiktoken.load.data_gym_to_mergeable_bpe_ranks and GPT-2's pattern, without special tokens.
GPT2_IDS = {
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?": (
        "464 2068 7586 21831 18045 625 1511 16931 6844 11 1595 470 340 30"
    ),
    "  Two  spaces\tand a tab\n\n    indented = True  ": (
        "220 4930 220 9029 197 392 257 7400 628 220 220 220 773 4714 796 6407 220 220"
    ),
    "naïve café: “quoted” … €20 👩‍👩‍👧": (
        "2616 38776 40304 25 564 250 421 5191 447 251 3926 10432 1238 50169 102 447 235 41840 "
        "102 447 235 41840 100"
    ),
    "<|endoftext|> is text here, \x00 too": (
        "27 91 437 1659 5239 91 29 318 2420 994 11 220 188 1165"
    ),
    "Привет, мир! Как дела сегодня?": (
        "140 253 21169 18849 38857 16843 20375 11 12466 120 18849 21169 0 12466 248 16142 "
        "31583 12466 112 16843 30143 16142 220 21727 16843 140 111 25443 112 22177 40623 30"
    ),
    "我能吞下玻璃而不伤身体。": (
        "22755 239 47797 121 28938 252 10310 233 163 236 119 163 240 225 32003 234 38834 "
        "27670 97 164 118 104 19526 241 16764"
    ),
    "今日は良い天気ですね。": (
        "20015 232 33768 98 31676 164 231 107 18566 25465 36365 245 30640 33623 2515 255 16764"
    ),
    "مرحبا بالعالم، كيف حالك؟": (
        "25405 26897 148 255 39848 12919 17550 101 23525 44690 23525 25405 148 234 18923 225 "
        "22654 149 223 17550 255 23525 149 225 148 253"
    ),
    "नमस्ते दुनिया, आप कैसे हैं?": (
        "11976 101 11976 106 11976 116 24231 235 11976 97 24231 229 28225 99 24231 223 11976 "
        "101 11976 123 11976 107 48077 11 28225 228 11976 103 28225 243 24231 230 11976 116 "
        "24231 229 28225 117 24231 230 11976 224 30"
    ),
    "Ελληνικά: αβγ, 1.5 €": (
        "138 243 39377 39377 138 115 26180 29945 43000 138 105 25 26367 26638 42063 11 352 13 "
        "20 10432"
    ),
}


@pytest.mark.skipif(
    not (SHARED / "data" / "gpt2_vocab.bpe").exists(),
    reason=f"no vocabulary in {SHARED}/data",
)
def test_gpt2_gives_the_ids_of_tiktoken():
    tokenizer = read_tokenizer(f"gpt2:{SHARED / 'data'}")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (50257, 50256)
    for text, ids in GPT2_IDS.items():
        assert tokenizer.encode(text).tolist() == [int(number) for number in ids.split()]
        check_exact(tokenizer, text)
