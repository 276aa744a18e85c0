"""Tokenizers and chat templates of Hugging Face folders, in and out."""

import functools
import json

import pytest
import tokenizers
from conftest import ROOT

from nanojaxgpt.data.tokenizer_json import BYTE_OF
from nanojaxgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from nanojaxgpt.errors import DataError
from nanojaxgpt.interchange.hf_tokenizer import (
    named_tokens,
    open_chat_template,
    open_tokenizer,
    write_tokenizer,
)
from nanojaxgpt.text_stream import encode_prompt

TEXT = "the bear saw the\n sea  and é"


def bear_tokenizer(start: bool) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer as Llama 3's, with `start` putting a token before each text."""
    merges = [("t", "h"), ("th", "e"), ("e", "a")]
    pieces = [*BYTE_OF, *(a + b for a, b in merges)]
    found = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    )
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.add_special_tokens(["<|begin|>", "<|stop|>", "<|endoftext|>"])
    if start:
        found.post_processor = tokenizers.processors.TemplateProcessing(
            "<|begin|> $A", special_tokens=[("<|begin|>", found.token_to_id("<|begin|>"))]
        )
    return found


@pytest.fixture
def bear(tmp_path):
    """Return a folder with a tokenizer that begins each text."""
    bear_tokenizer(start=True).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_marks_come_from_the_model_and_are_kept(bear, tmp_path):
    begin, stop, end = 259, 260, 261
    plain = read_tokenizer(f"hf:{bear / 'tokenizer.json'}")
    assert (plain.start_id, plain.end_id) == (-1, end)
    found = open_tokenizer(bear, [stop], 300)
    assert (found.start_id, found.end_id) == (begin, stop)
    assert encode_prompt(found, "the") == [begin, 257]
    assert encode_prompt(found, "") == [begin]
    assert found.decode([begin, 257, stop]) == "the"
    (tmp_path / "saved").mkdir()
    found.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.start_id, again.end_id) == (begin, stop)
    assert again.content_hash() == found.content_hash() != plain.content_hash()


def test_the_end_token_that_a_tokenizer_names(bear):
    settings = bear / "tokenizer_config.json"
    for token in ("<|stop|>", {"content": "<|stop|>"}):
        settings.write_text(json.dumps({"eos_token": token}))
        assert open_tokenizer(bear, [], 300).end_id == 260
    settings.write_text("{}")
    assert open_tokenizer(bear, [], 300).end_id == 261


def test_special_tokens_beyond_the_table_are_left_out(bear):
    """As Gemma 3's, whose small models have no row for the token of an image."""
    found = open_tokenizer(bear, [260], 261)
    assert found.vocab_size == 261
    with pytest.raises(DataError, match="259 tokens, but the model's embedding table 256 rows"):
        open_tokenizer(bear, [], 256)


def every_kind(folder):
    """Yield our tokenizers of every kind."""
    yield "bytes", ByteTokenizer()
    yield "chars", CharTokenizer(TEXT)
    yield "words", WordTokenizer(sorted(set(TEXT.split())))
    merges = [("t", "h"), ("th", "e")]
    pieces = [*BYTE_OF, *(a + b for a, b in merges), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    yield "gpt2", open_tokenizer(folder, [258], 300)
    (folder / "tokenizer.json").write_bytes(bear_tokenizer(start=True).to_str().encode())
    yield "hf", open_tokenizer(folder, [260], 300)
    for kind in ("sentencepiece", "sentencepiece-unigram"):
        yield kind, train_tokenizer(kind, [(ROOT / "README.md").read_text()], 500)


def test_every_tokenizer_comes_back(tmp_path):
    for kind, tokenizer in every_kind(tmp_path):
        folder = tmp_path / kind
        folder.mkdir()
        write_tokenizer(folder, tokenizer, 64, "{{ x }}")
        again = open_tokenizer(folder, [tokenizer.end_id] * (tokenizer.end_id >= 0), 500)
        assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist(), kind
        assert (again.end_id, again.start_id) == (tokenizer.end_id, tokenizer.start_id), kind
        assert again.decode(again.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT)), kind
        assert open_chat_template(folder) == "{{ x }}"


@pytest.mark.slow
def test_transformers_encodes_alike(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    for kind, tokenizer in every_kind(tmp_path):
        folder = tmp_path / kind
        folder.mkdir()
        write_tokenizer(folder, tokenizer, 64, "{{ messages[0].content }}")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs(TEXT).input_ids == encode_prompt(tokenizer, TEXT), kind
        ids = tokenizer.encode(TEXT).tolist()
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), kind
        assert theirs.eos_token_id == (tokenizer.end_id if tokenizer.end_id >= 0 else None), kind
        said = theirs.apply_chat_template([dict(role="user", content="hi")], tokenize=False)
        assert said == "hi"


def test_chat_templates(tmp_path):
    settings = tmp_path / "tokenizer_config.json"
    assert open_chat_template(tmp_path) == ""
    several = [dict(name="tool_use", template="b"), dict(name="default", template="c")]
    for given, text in (("a", "a"), (several, "c"), (several[:1], ""), (None, "")):
        settings.write_text(json.dumps({"chat_template": given}))
        assert open_chat_template(tmp_path) == text
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    assert open_chat_template(tmp_path) == "of its own file"
    (tmp_path / "chat_template.jinja").write_text("x" * 70_000)
    with pytest.raises(DataError, match="70,000 bytes"):
        open_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings.write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(DataError, match="not a text"):
        open_chat_template(tmp_path)
    settings.write_text("[")
    with pytest.raises(DataError, match="not JSON"):
        open_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(("normalizer",), [[]]), (("model", "vocab"), {}), (("pre_tokenizer",), 3),
     (("model",), dict(type="BPE", vocab={"a": 0}, merges=[], unk_token="nowhere")),
     (("model", "continuing_subword_prefix"), "\u00e9" * 1000)],
)  # fmt: skip
def test_settings_that_the_package_fails_on(place, value, bear):
    """It raises a plain Exception, or panics, as soon as it reads them or at the first text."""
    path = bear / "tokenizer.json"
    content = json.loads(path.read_text())
    functools.reduce(dict.get, place[:-1], content)[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError):
        open_tokenizer(bear, [], 300).encode("the \u4f60")


def test_odd_names_in_the_settings(bear):
    named = [dict(name=[], template="x"), dict(name="default", template="y")]
    settings = dict(chat_template=named, eos_token="\ud800", bos_token={"content": "\ud800"})
    (bear / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_chat_template(bear) == "y"
    assert named_tokens(bear, open_tokenizer(bear, [], 300)) == {}


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-unigram"])
def test_sentencepiece_as_a_tokenizer_json(kind, tmp_path):
    text = (ROOT / "README.md").read_text()
    tokenizer = train_tokenizer(kind, [text], 600)
    write_tokenizer(tmp_path, tokenizer, 64, "")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for part in (text[:5000], " two  spaces ", "", "\u20ac \U0001f600 x", "a\n\n b\t"):
        ids = tokenizer.encode(part).tolist()
        assert again.encode(part).ids == ids
        assert again.decode(ids) == part
