"""Whether a tokenizer gives back and counts every text is tried on it; what is lost is counted."""

import re

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface
from conftest import SHARED, data_config
from test_tokenizers import TRICKY, check_exact
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nanojaxgpt.data import tokenizers
from nanojaxgpt.data.exactness import find_loss, probes
from nanojaxgpt.data.store import prepare
from nanojaxgpt.data.subwords import cut_after_letters
from nanojaxgpt.data.tokenizer_json import BYTE_OF
from nanojaxgpt.data.tokenizers import read_tokenizer, train_tokenizer
from nanojaxgpt.errors import DataError

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("a", "Ġ"), ("Ġ", "Ġ"), ("n", "Ġ"), ("Ã", "©")]
WORDS_CAFE = "only café in 42 words"


def byte_level(without="", **parts):
    """Return a byte-level BPE of the package, some of its characters left out."""
    merges = [pair for pair in MERGES if not set(without) & set("".join(pair))]
    pieces = [c for c in BYTE_OF if c not in without] + [a + b for a, b in merges]
    made = huggingface.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def metaspace():
    """Return a Unigram model as Llama's are written, of ASCII, bytes and one heading."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "##"]
    pieces += map(chr, range(33, 127))
    scored = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    made = huggingface.Tokenizer(models.Unigram(scored, 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return made


def wordpiece():
    pieces = {"[UNK]": 0, "plain": 1, "##s": 2, "word": 3}
    made = huggingface.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made


def with_token(made, **settings):
    made.add_tokens([AddedToken("<t>", normalized=False, **settings)])
    return made


def split(pattern):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


@pytest.fixture
def read(tmp_path):
    """Return a function that reads one of the package's tokenizers as `hf:FILE`."""

    def read_one(made):
        made.save(str(tmp_path / "made.json"))
        return read_tokenizer(f"hf:{tmp_path}/made.json")

    return read_one


def test_probe_has_every_byte_that_utf8_has():
    seen = {byte for text in probes(read_tokenizer("bytes")) for byte in text.encode()}
    assert set(range(256)) - seen == {0xC0, 0xC1, *range(0xF5, 0x100)}  # which no text has


def test_tokenizers_of_here_are_exact():
    for spec in ("bytes", "chars"):
        assert find_loss(train_tokenizer(spec, ["abc"], 0)) == ""


@pytest.mark.skipif(
    not (SHARED / "data" / "gpt2_vocab.bpe").exists(), reason=f"no vocabulary in {SHARED}/data"
)
def test_gpt2_is_exact_and_cut_where_the_package_cuts(monkeypatch):
    gpt2 = read_tokenizer(f"gpt2:{SHARED / 'data'}")
    assert find_loss(gpt2) == ""
    text = (SHARED / "data" / "tinyshakespeare.txt").read_text()[:200_000]
    monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", 100)
    whole = gpt2._tokenizer.encode(text, add_special_tokens=False).ids
    assert gpt2.encode(text).tolist() == whole


@pytest.mark.parametrize("spec", ["sentencepiece", "sentencepiece-unigram"])
@pytest.mark.parametrize("spaces", ["", " "])
def test_sentencepiece_trained_without_spaces_is_exact(spec, spaces):
    texts = ["ab\tcd\tabc\tbcd\n" * 4000 + spaces + "日本語のテキスト\n日本のテスト\n" * 40]
    tokenizer = train_tokenizer(spec, texts, 280)
    assert find_loss(tokenizer) == ""
    for text in ("a b", texts[0][:100], *TRICKY):
        check_exact(tokenizer, text)


LOSSY = {
    "no é": (byte_level(without="©"), "comes back as"),
    "no space": (byte_level(without="Ġ"), "comes back as"),
    "unknown": (
        byte_level(model=models.BPE({"a": 0, "?": 1}, [], unk_token="?")),
        "'a b' comes back as 'a",
    ),
    "a space before": (
        byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "'a b' comes back as ' a b'",
    ),
    "NFC": (byte_level(normalizer=normalizers.NFC()), "comes back as"),
    "stripped": (with_token(byte_level(), rstrip=True), r"<t> a<t>b .*comes back as '<t>a<t>b"),
    "removed": (
        byte_level(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        ),
        "'a b' comes back as 'ab'",
    ),
    "a mark before": (metaspace(), "'a b' has 3 bytes of UTF-8, but its tokens count 4"),
    "lower case": (wordpiece(), "comes back as"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_tokenizer_is_found(name, read):
    made, said = LOSSY[name]
    assert re.search(said, find_loss(read(made)))


EXACT = {
    "ByteLevel": byte_level(),
    "ByteLevel without a pattern": byte_level(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "ByteLevel as a normalizer": byte_level(
        normalizer=normalizers.ByteLevel(),
        pre_tokenizer=pre_tokenizers.Split(Regex("Ġ?[^Ġ]+"), "isolated"),
    ),
    "GPT-2's pattern": byte_level(pre_tokenizer=split(GPT2_PATTERN)),
    "Llama 3's pattern": byte_level(pre_tokenizer=split(LLAMA3_PATTERN)),
    "a pattern over spaces": byte_level(pre_tokenizer=split(r"\w+ \w+|\s+|\S")),
    "an added token": with_token(byte_level()),
}  # fmt: skip
MAY_CUT = {"ByteLevel", "GPT-2's pattern", "Llama 3's pattern", "an added token"}


@pytest.mark.parametrize("name", EXACT)
def test_exact_tokenizer_counts_and_cuts_as_the_package(name, read, monkeypatch):
    made = EXACT[name]
    tokenizer = read(made)
    assert find_loss(tokenizer) == ""
    for text in ("plain words café", WORDS_CAFE, *TRICKY):
        check_exact(tokenizer, text)
    assert tokenizer._can_cut == (name in MAY_CUT)
    monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", 20)
    text = "an answer in  a <t> the\n the banana the then \n\n a the" * 20
    assert tokenizer.encode(text).tolist() == made.encode(text, add_special_tokens=False).ids


def test_a_cut_would_change_tokens_where_spaces_are_merged(read):
    """Without a pattern, what stands before a space may be one token with it."""
    made = EXACT["ByteLevel without a pattern"]
    text = "an answer in the banana " * 4
    parts = list(cut_after_letters(text, 20))
    cut = [token for part in parts for token in made.encode(part).ids]
    assert len(parts) > 2
    assert cut != made.encode(text).ids == read(made).encode(text).tolist()


@pytest.mark.parametrize("unsafe", [
    dict(normalizer=normalizers.Sequence([normalizers.NFC()])),
    dict(pre_tokenizer=split(r"(?<= )\w+|\s+|\S")),
    dict(pre_tokenizer=split(r" ?\p{L}+| ?\p{N}+")),  # which leaves white space to what is left
])  # fmt: skip
def test_unproven_tokenizer_is_never_cut(unsafe, read):
    assert not read(byte_level(**unsafe))._can_cut
    assert not read(with_token(byte_level(), rstrip=True))._can_cut


def test_dropout_is_for_others(read):
    made = byte_level()
    exact = made.encode("the then the").ids
    made.model.dropout = 0.9
    assert all(read(made).encode("the then the").tolist() == exact for _ in range(20))


def test_only_word_pieces_have_a_prefix(read):
    tokenizer = read(metaspace())
    pieces = tokenizer._tokenizer.get_vocab()
    counts = {piece: tokenizer.token_bytes()[pieces[piece]] for piece in ("##", "#", "\u2581")}
    assert counts == {"##": 2, "#": 1, "\u2581": 1}
    assert read(wordpiece()).token_bytes().tolist() == [5, 5, 1, 4]


@pytest.mark.parametrize("spec", ["sentencepiece", "sentencepiece-unigram"])
def test_long_texts_get_sentencepieces_own_tokens(spec, monkeypatch):
    words = np.random.default_rng(0).choice(
        ["the", "ash", "beech\n", "fir,", "日本", "日本語"], 9000
    )
    text = " ".join(words)
    tokenizer = train_tokenizer(spec, [text], 278)
    own = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    monkeypatch.setattr(tokenizers, "SEGMENT_CHARS", 30)
    assert tokenizer._can_cut == (spec == "sentencepiece")
    for one in (text, text.replace(" ", "")):  # where there is no space, there is no place to cut
        assert tokenizer.encode(one).tolist() == own.encode(one)


def prepared(read, made, tmp_path, texts, lossy=True):
    read(made)
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    data = data_config(source=f"jsonl:{tmp_path}/a.jsonl", tokenizer=f"hf:{tmp_path}/made.json",
                       lossy_tokenizer=lossy, num_workers=1)  # fmt: skip
    said = []
    return prepare(data, tmp_path / "cache", said.append).parts[0].store, said


def test_lossy_tokenizer_is_refused_or_its_loss_is_counted(read, tmp_path):
    made = byte_level(without="©")
    texts = [WORDS_CAFE, "plain words", "éé"]
    with pytest.raises(DataError, match=r"made\.json is lossy: 'plain words café' comes back as "
                       r".*data\.lossy_tokenizer=True"):  # fmt: skip
        prepared(read, made, tmp_path, texts, lossy=False)
    assert not list((tmp_path / "cache").rglob("*.tokens"))
    for _ in range(2):  # made, then opened
        store, said = prepared(read, made, tmp_path, texts)
        loss = store.loss()
        assert (loss.changed_documents, loss.changed_characters) == (2, 3)
        # Each é is Ã© there, of which Ã alone is left.
        assert loss.miscounted_bytes == 3
        assert "2 of 3 documents change, 3 characters don't come back, 3 bytes" in said[-1]


def test_loss_in_a_corpus_is_found_where_no_probe_finds_it(read, tmp_path, monkeypatch):
    monkeypatch.setattr("nanojaxgpt.data.store.find_loss", lambda _: "")
    made = byte_level(without="©")
    store, _ = prepared(read, made, tmp_path, ["plain words"], lossy=False)
    assert not any(store.loss())
    with pytest.raises(DataError, match=r"1 of 2 documents change"):
        prepared(read, made, tmp_path, ["plain words", WORDS_CAFE], lossy=False)
