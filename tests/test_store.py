"""A store holds exactly the corpus, is built once, and is never used half-written or altered."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanojaxgpt.data import store as store_module
from nanojaxgpt.data.sources import read_documents
from nanojaxgpt.data.store import Store, open_store, prepare
from nanojaxgpt.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("NANOJAXGPT_SHARED") or ROOT.parent / "shared")
SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"


@pytest.fixture
def corpus(tmp_path):
    """Ten documents, each longer than the one before."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"é document {number}\n" * (number + 1))
    return f"text:{folder}"


def prepare_quietly(source, tmp_path, spec="bytes", vocab_size=300):
    return prepare(source, spec, vocab_size, tmp_path / "cache", report=lambda line: None)


@pytest.mark.parametrize("spec", ["bytes", "chars", "sentencepiece"])
def test_store_holds_every_document_and_its_end(spec, corpus, tmp_path):
    store = prepare_quietly(corpus, tmp_path, spec, 280)
    stops = [*store.document_starts[1:], len(store.tokens)]
    documents = list(read_documents(corpus))
    assert len(documents) == len(stops) == store.manifest["documents"]
    for document, start, stop in zip(documents, store.document_starts, stops, strict=True):
        if store.tokenizer.end_id >= 0:
            stop -= 1
            assert store.tokens[stop] == store.tokenizer.end_id
        assert store.tokenizer.decode(store.tokens[start:stop]) == document.text
    assert store.manifest["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)


def test_large_vocabulary_takes_four_bytes(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    text += "".join(map(chr, range(0x10000, 0x10000 + 50_000)))
    (tmp_path / "a.txt").write_text(text)
    store = prepare_quietly(f"text:{tmp_path}/a.txt", tmp_path, "chars")
    assert store.tokens.dtype == np.uint32
    assert store.tokenizer.decode(store.tokens) == text


def test_second_time_opens_what_is_there(corpus, tmp_path, monkeypatch):
    lines = []
    first = prepare(corpus, "bytes", 0, tmp_path / "cache", report=lines.append)
    assert len(lines) == 1
    assert "10 documents" in lines[0]
    monkeypatch.setattr(store_module, "train_tokenizer", None)
    again = prepare(corpus, "bytes", 0, tmp_path / "cache", report=lines.append)
    assert again.folder == first.folder
    assert again.identity() == first.identity()
    assert len(lines) == 1


def test_other_content_or_tokenizer_is_another_store(corpus, tmp_path):
    folders = {prepare_quietly(corpus, tmp_path).folder}
    folders.add(prepare_quietly(corpus, tmp_path, "chars").folder)
    folders.add(prepare_quietly(corpus, tmp_path, "sentencepiece", 280).folder)
    folders.add(prepare_quietly(corpus, tmp_path, "sentencepiece", 281).folder)
    Path(corpus.removeprefix("text:"), "0.txt").write_text("changed")
    folders.add(prepare_quietly(corpus, tmp_path).folder)
    assert len(folders) == 5


def test_refused_inputs_leave_nothing_behind(corpus, tmp_path):
    with pytest.raises(ConfigError):
        prepare_quietly(corpus, tmp_path, "words")
    with pytest.raises(DataError):
        prepare_quietly(corpus, tmp_path, "sentencepiece", 5000)
    assert list((tmp_path / "cache").glob("*")) == []


def test_cache_that_can_not_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"can't write the token store below {tmp_path}/file"):
        prepare(corpus, "bytes", 0, tmp_path / "file", report=lambda line: None)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "tokenizer/sentencepiece.model"])
def test_damaged_store_is_refused(name, damage, corpus, tmp_path):
    folder = prepare_quietly(corpus, tmp_path, "sentencepiece", 280).folder
    open_store(folder)
    damage(folder / name)
    with pytest.raises(DataError, match=f"(?s){Path(name).parts[0]}.*delete the folder {folder}"):
        prepare_quietly(corpus, tmp_path, "sentencepiece", 280)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"format": 1}', '{"format": 0}'])
def test_damaged_manifest_is_refused(text, corpus, tmp_path):
    path = prepare_quietly(corpus, tmp_path).folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=r"manifest.json.*delete the folder"):
        open_store(path.parent)


def test_tokenizer_of_another_store_is_refused(corpus, tmp_path):
    folder = prepare_quietly(corpus, tmp_path).folder
    other = prepare_quietly(corpus, tmp_path, "chars")
    other.tokenizer.save(folder / "tokenizer")
    with pytest.raises(DataError, match="not the one that the tokens were made with"):
        open_store(folder)


CHILD = """
import os, signal, sys, time
from pathlib import Path
from nanojaxgpt.data import tokenizers
from nanojaxgpt.data.store import prepare

source, cache, mode, flags = sys.argv[1:]
encode, calls = tokenizers.ByteTokenizer.encode, []

def interrupted(self, text):
    calls.append(text)
    if mode == "kill" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "meet" and len(calls) == 5:
        Path(flags, str(os.getpid())).touch()
        while len(os.listdir(flags)) < 2:
            time.sleep(0.01)
    return encode(self, text)

tokenizers.ByteTokenizer.encode = interrupted
store = prepare(source, "bytes", 0, Path(cache), report=lambda line: None)
print(len(calls), store.identity()["tokens"])
"""


def start_child(source, tmp_path, mode):
    (tmp_path / "flags").mkdir(exist_ok=True)
    arguments = [source, str(tmp_path / "cache"), mode, str(tmp_path / "flags")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_two_processes_at_once_agree(corpus, tmp_path):
    children = [start_child(corpus, tmp_path, "meet") for _ in range(2)]
    printed = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert printed[0] == printed[1]
    assert printed[0][0] == "10"  # each of them built, neither waited for the other
    (folder,) = (tmp_path / "cache").iterdir()
    assert open_store(folder).identity()["tokens"] == printed[0][1]


def test_killed_preparation_is_never_used(corpus, tmp_path):
    child = start_child(corpus, tmp_path, "kill")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    (stale,) = (tmp_path / "cache").iterdir()
    assert not (stale / "manifest.json").exists()
    store = prepare_quietly(corpus, tmp_path)
    assert store.folder != stale
    assert store.manifest["documents"] == 10


def make_store(lengths):
    starts = np.cumsum([0, *lengths[:-1]])
    return Store(Path(), {}, np.zeros(sum(lengths), np.uint16), starts, None)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("lengths", [[100], [10] * 10, [95, 5], [5, 95], [1, 2, 3, 50, 4, 40]])
def test_split_shares_no_document(fraction, lengths):
    store = make_store(lengths)
    (first, cut), (again, stop) = store.split(fraction)
    assert (first, again, stop) == (0, cut, sum(lengths))
    if len(lengths) > 1:
        assert cut in {*np.cumsum(lengths).tolist()}
        assert cut <= max(int(stop * (1 - fraction)), lengths[0])
    else:
        assert cut == int(stop * (1 - fraction))


def test_split_cuts_at_the_last_border_before_the_fraction():
    assert make_store([30, 30, 30, 10]).split(0.1) == ((0, 90), (90, 100))
    assert make_store([30, 30, 29, 11]).split(0.1) == ((0, 89), (89, 100))
    assert make_store([30, 30, 31, 9]).split(0.1) == ((0, 60), (60, 100))
    assert make_store([95, 5]).split(0.1) == ((0, 95), (95, 100))
    assert make_store([30, 70]).split(0.0) == ((0, 100), (100, 100))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
def test_tinyshakespeare_is_split_as_published(tmp_path):
    store = prepare_quietly(f"text:{SHAKESPEARE}", tmp_path, "chars")
    assert store.tokenizer.vocab_size == 65
    assert store.split(0.1) == ((0, 1_003_854), (1_003_854, 1_115_394))


def test_progress_is_shown_on_a_terminal_alone(corpus, monkeypatch, capsys):
    ticks = iter(range(1000))
    monkeypatch.setattr(store_module.time, "monotonic", lambda: next(ticks))
    documents = list(read_documents(corpus))
    assert list(store_module.show_progress(iter(documents))) == documents
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(store_module.show_progress(iter(documents))) == documents
    printed = capsys.readouterr().err
    assert "\rtokenizing: 9 documents" in printed
    assert "\n" not in printed


def test_manifest_is_complete(corpus, tmp_path):
    store = prepare_quietly(corpus, tmp_path)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["tokens"] == len(store.tokens)
    assert manifest["files"]["tokens.bin"]["bytes"] == 2 * len(store.tokens)
    assert manifest["source"]["kind"] == "text"
    assert set(store.identity()) == {"source", "tokenizer", "tokens", "documents"}
