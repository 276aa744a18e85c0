"""A store holds exactly the corpus, is built once, and is never used half-written or altered."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, command, data_config

from nanojaxgpt.data import shards as shards_module
from nanojaxgpt.data import sources
from nanojaxgpt.data import store as store_module
from nanojaxgpt.data.store import Store, open_store, prepare
from nanojaxgpt.errors import ConfigError, DataError

SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"


def prepare_corpus(source, tmp_path, spec="bytes", vocab_size=300, report=str, **changes):
    """Prepare one source, or a mixture of several, in one process unless `changes` say so."""
    named = dict(mixture=source) if isinstance(source, tuple) else dict(source=source)
    fields = dict(num_workers=1, tokenizer=spec, tokenizer_vocab_size=vocab_size)
    return prepare(data_config(**fields | named | changes), tmp_path / "cache", report)


def prepare_quietly(*arguments, **more):
    return prepare_corpus(*arguments, **more).parts[0].store


def read_documents(source):
    return sources.read_documents(source, data_config())


def all_tokens(store):
    """Return every token of the store."""
    return store.read([0], store.num_tokens)[0]


def folders_of(cache):
    return [path for path in cache.iterdir() if path.is_dir() and path.name != "tokenizers"]


@pytest.mark.parametrize("spec", ["bytes", "chars", "sentencepiece"])
def test_store_holds_every_document_and_its_end(spec, ten_documents, tmp_path):
    store = prepare_quietly(ten_documents, tmp_path, spec, 280)
    stops = [*store.document_starts[1:], len(all_tokens(store))]
    documents = list(read_documents(ten_documents))
    assert len(documents) == len(stops) == store.manifest["documents"]
    for document, start, stop in zip(documents, store.document_starts, stops, strict=True):
        if store.tokenizer.end_id >= 0:
            stop -= 1
            assert all_tokens(store)[stop] == store.tokenizer.end_id
        assert store.tokenizer.decode(all_tokens(store)[start:stop]) == document.text
    assert store.manifest["text_bytes"] == sum(len(text.encode()) for _, text in documents)
    assert all_tokens(store).dtype == np.uint16
    assert isinstance(store.document_starts, np.memmap)
    assert isinstance(store.shards[0].base, np.memmap)


def test_large_vocabulary_takes_four_bytes(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    text += "".join(map(chr, range(0x10000, 0x10000 + 50_000)))
    (tmp_path / "a.txt").write_text(text)
    store = prepare_quietly(f"text:{tmp_path}/a.txt", tmp_path, "chars")
    assert all_tokens(store).dtype == np.uint32
    assert store.tokenizer.decode(all_tokens(store)) == text


def test_second_time_opens_what_is_there(ten_documents, tmp_path, monkeypatch):
    lines = []
    first = prepare_quietly(ten_documents, tmp_path, "chars", report=lines.append)
    assert len(lines) == 1
    assert "10 documents" in lines[0]
    monkeypatch.setattr(store_module, "train_tokenizer", None)
    monkeypatch.setattr(store_module, "write_shards", None)
    again = prepare_quietly(ten_documents, tmp_path, "chars", report=lines.append)
    assert again.folder == first.folder
    assert again.identity() == first.identity()
    assert len(lines) == 1


def test_other_content_or_tokenizer_is_another_store(ten_documents, tmp_path):
    folders = {prepare_quietly(ten_documents, tmp_path).folder}
    folders.add(prepare_quietly(ten_documents, tmp_path, "chars").folder)
    folders.add(prepare_quietly(ten_documents, tmp_path, "sentencepiece", 280).folder)
    folders.add(prepare_quietly(ten_documents, tmp_path, "sentencepiece", 281).folder)
    Path(ten_documents.removeprefix("text:"), "0.txt").write_text("changed")
    folders.add(prepare_quietly(ten_documents, tmp_path).folder)
    assert len(folders) == 5


def test_refused_inputs_leave_nothing_behind(ten_documents, tmp_path):
    with pytest.raises(ConfigError):
        prepare_quietly(ten_documents, tmp_path, "words")
    with pytest.raises(DataError):
        prepare_quietly(ten_documents, tmp_path, "sentencepiece", 5000)
    Path(ten_documents.removeprefix("text:"), "5.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"5\.txt, line 1, byte 3: not UTF-8"):
        prepare_quietly(ten_documents, tmp_path)
    left = [path for path in (tmp_path / "cache").rglob("*") if not path.name.endswith(".lock")]
    assert left == [tmp_path / "cache/tokenizers"]


def test_cache_that_can_not_be_written_is_named(ten_documents, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"can't create the token store in {tmp_path}/file"):
        prepare(data_config(source=ten_documents), tmp_path / "file")


def contents(folder):
    """Return the bytes of every file below the folder by its name there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("spec", ["bytes", "sentencepiece"])
def test_any_number_of_processes_writes_the_same(spec, ten_documents, tmp_path, small_shards):
    one = prepare_quietly(ten_documents, tmp_path / "1", spec, 280, num_workers=1)
    two = prepare_quietly(ten_documents, tmp_path / "2", spec, 280, num_workers=2)
    assert len(one.manifest["shards"]) == 5
    assert contents(one.folder) == contents(two.folder)
    whole = np.concatenate([np.fromfile(path, "<u2") for path in one.folder.glob("*.tokens")])
    assert len(whole) == one.num_tokens


def test_shards_hold_whole_documents(ten_documents, tmp_path, monkeypatch):
    one = prepare_quietly(ten_documents, tmp_path)
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100)
    many = prepare_quietly(ten_documents, tmp_path)
    assert (len(one.shards), len(many.shards)) == (1, 5)
    np.testing.assert_array_equal(all_tokens(one), all_tokens(many))
    np.testing.assert_array_equal(one.document_starts, many.document_starts)
    assert set(many.shard_starts[:-1]) <= set(many.document_starts)
    assert many.num_documents == 10


def test_rows_are_read_across_shards(ten_documents, tmp_path, small_shards):
    store = prepare_quietly(ten_documents, tmp_path)
    whole = all_tokens(store)
    for length in (1, 7, 100, 500, len(whole)):
        starts_B = np.random.default_rng(length).integers(0, len(whole) - length + 1, 50)
        rows = store.read(starts_B, length)
        assert rows.dtype == np.uint16
        np.testing.assert_array_equal(rows, [whole[start : start + length] for start in starts_B])


def test_only_some_shards_are_open_at_once(ten_documents, tmp_path, monkeypatch, small_shards):
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    store = prepare_quietly(ten_documents, tmp_path)
    assert len(store.read(np.zeros(1, int), store.num_tokens)[0]) == store.num_tokens
    assert store.shards._map.cache_info().currsize == 2


# What the child tokenizes is written down; it stops, by SIGKILL or a file, at the fifth text.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from nanojaxgpt.config import base_config, sections
from nanojaxgpt.data import shards, tokenizers
from nanojaxgpt.data.store import prepare

source, cache, mode, flag = sys.argv[1:]
shards.SHARD_BYTES = 100
encode, calls = tokenizers.ByteTokenizer.encode, []

def interrupted(self, text):
    if not text.startswith("é document"):  # one that probes the tokenizer
        return encode(self, text)
    calls.append(text)
    if mode == "kill" and len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "slow" and len(calls) == 5:
        print("half", flush=True)
        while not os.path.exists(flag):
            time.sleep(0.01)
    return encode(self, text)

tokenizers.ByteTokenizer.encode = interrupted
data = sections.Data(**base_config().data.to_dict() | dict(source=source, num_workers=1))
store = prepare(data, Path(cache), report=lambda line: print(line, flush=True)).parts[0].store
print(len(calls), store.identity()["tokens"])
"""


def start_child(source, tmp_path, mode):
    arguments = [source, str(tmp_path / "cache"), mode, str(tmp_path / "flag")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_second_process_waits_and_says_so(ten_documents, tmp_path):
    first = start_child(ten_documents, tmp_path, "slow")
    assert first.stdout.readline() == "half\n"
    second = start_child(ten_documents, tmp_path, "plain")
    assert "another process is preparing" in second.stdout.readline()
    (tmp_path / "flag").touch()
    (*_, made), (*_, found) = (child.communicate(timeout=60)[0].split("\n")[:-1]
                              for child in (first, second))  # fmt: skip
    assert made.split()[0] == "10"
    assert found.split() == ["0", made.split()[1]]


def test_killed_preparation_goes_on_where_it_was(ten_documents, tmp_path, small_shards):
    child = start_child(ten_documents, tmp_path, "kill")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    (unfinished,) = folders_of(tmp_path / "cache")
    assert unfinished.name.endswith(".unfinished")
    (unfinished / "00003.tokens.123").touch()  # as a kill within a write leaves it
    done = len(list(unfinished.glob("*.json")))
    child = start_child(ten_documents, tmp_path, "plain")
    calls = int(child.communicate(timeout=60)[0].split("\n")[-2].split()[0])
    assert 0 < done < 5
    assert calls <= 10 - done
    store = prepare_quietly(ten_documents, tmp_path)
    fresh = prepare_quietly(ten_documents, tmp_path / "fresh")
    assert contents(store.folder) == contents(fresh.folder)
    assert folders_of(tmp_path / "cache") == [store.folder]


# As version 2 of the format wrote them: a run of that time must find the same data.
IDENTITIES = {
    "bytes": ("277089d91c0bdf4f", "55e9649615f384c0", "38008a3c7d734583"),
    "chars": ("7ee7a29be549cc70", "4143428e59d05b09", "8c5e1d809226eae0"),
}


@pytest.mark.parametrize("spec", IDENTITIES)
def test_identity_is_what_older_runs_wrote_down(spec, ten_documents, tmp_path, small_shards):
    found = prepare_quietly(ten_documents, tmp_path, spec).identity()
    assert found["source"] == "55cddc3a54f930b7"
    assert (found["tokenizer"], found["tokens"], found["documents"][:16]) == IDENTITIES[spec]


def alive(pid):
    """Return whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# Every text takes a tenth of a second in a process of its own, which the parent's end must end.
PARALLEL = """
import multiprocessing, sys, threading, time
from pathlib import Path
from nanojaxgpt.config import base_config, sections
from nanojaxgpt.data import shards
from nanojaxgpt.data.store import prepare

if __name__ == "__main__":
    shards.SHARD_BYTES = 100
    def tell():
        while not list(Path(sys.argv[2]).glob("*/00001.json")):
            time.sleep(0.005)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    threading.Thread(target=tell, daemon=True).start()
    data = base_config().data.to_dict() | dict(source=sys.argv[1], num_workers=2)
    prepare(sections.Data(**data), Path(sys.argv[2]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_killed_preparation_leaves_no_process(tmp_path, small_shards):
    line = json.dumps({"text": "word " * 20_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 300)
    (tmp_path / "child.py").write_text(PARALLEL)
    source = f"jsonl:{tmp_path}/a.jsonl"
    child = subprocess.Popen(
        [sys.executable, tmp_path / "child.py", source, tmp_path / "cache"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = [int(pid) for pid in child.stdout.readline().split()]
    child.kill()
    child.wait()
    assert len(workers) == 2
    waited = time.monotonic()
    while any(map(alive, workers)) and time.monotonic() - waited < 20:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    (unfinished,) = folders_of(tmp_path / "cache")
    kept = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.tokens")}
    assert 1 < len(kept) < 300
    store = prepare_quietly(source, tmp_path, num_workers=2)
    same = [name for name, when in kept.items()
            if (store.folder / name).stat().st_mtime_ns == when]  # fmt: skip
    assert len(same) > len(kept) - 3  # but for those whose description was not written yet
    assert store.num_tokens == 300 * 100_001


def test_script_without_a_guard_is_told_so(ten_documents, tmp_path):
    (tmp_path / "child.py").write_text(PARALLEL.replace('__name__ == "__main__"', "True"))
    found = subprocess.run(
        [sys.executable, tmp_path / "child.py", ten_documents, tmp_path / "cache"],
        capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 1
    assert 'lacks `if __name__ == "__main__":`' in found.stderr.splitlines()[-1]


def test_mixture_has_one_tokenizer_and_weights(ten_documents, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "ß"}\n{"text": "x"}\n')
    other = f"jsonl:{tmp_path}/b.jsonl"
    mixed = prepare_corpus((f"3 {ten_documents}", f"0.5 {other}"), tmp_path, "chars")
    assert [(part.source, str(part.weight)) for part in mixed.parts] == [
        (ten_documents, "3"),
        (other, "1/2"),
    ]
    assert "ß" in mixed.tokenizer.characters
    assert len({part.store.tokenizer.content_hash() for part in mixed.parts}) == 1
    assert mixed.parts[1].store.num_tokens == 2
    again = prepare_corpus((f"3 {ten_documents}", f"1 {other}"), tmp_path, "chars")
    assert again.parts[1].store.folder == mixed.parts[1].store.folder
    assert again.identity() != mixed.identity()
    assert json.loads(json.dumps(mixed.identity())) == mixed.identity()


def test_validation_source_has_its_own_store(ten_documents, tmp_path):
    (tmp_path / "held.txt").write_text("document")
    held = f"text:{tmp_path}/held.txt"
    found = prepare_corpus(ten_documents, tmp_path, "chars", validation_source=held)
    assert found.validation.num_tokens == 8
    assert found.validation.tokenizer.content_hash() == found.tokenizer.content_hash()
    assert found.identity()["validation"] == found.validation.identity()
    plain = prepare_corpus(ten_documents, tmp_path, "chars")
    assert plain.validation is None
    assert plain.tokenizer.content_hash() == found.tokenizer.content_hash()
    with pytest.raises(ConfigError, match=r"data\.validation_source=.* is also a training source"):
        prepare_corpus(ten_documents, tmp_path, "chars", validation_source=ten_documents + "/*.txt")


def test_skipped_texts_are_counted(ten_documents, tmp_path):
    lines = ['{"text": "good"}', "{", '{"body": 1}', '{"text": "\\ud800"}', '{"text": "fine"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said, source = [], f"jsonl:{tmp_path}/a.jsonl"
    store = prepare_quietly(source, tmp_path, "chars", report=said.append, bad_text="skip")
    assert store.num_documents == 2
    for line, problem in zip(said, (":2 is not JSON", ":3 has no field", ":4 holds"), strict=False):
        assert problem in line
    assert said[3] == f"skipped 3 bad texts of {source}"
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not JSON.*data\.bad_text=skip"):
        prepare_quietly(source, tmp_path)


def make_store(lengths):
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.zeros(sum(lengths), np.uint16)
    return Store(Path(), {}, [tokens], np.array([0, len(tokens)]), starts, None)


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


def test_split_by_documents():
    assert make_store([30, 30, 30, 10]).split(0.5, 1) == ((0, 90), (90, 100))
    assert make_store([30, 30, 30, 10]).split(0.0, 3) == ((0, 30), (30, 100))
    with pytest.raises(DataError, match="validation_documents=4 leaves nothing"):
        make_store([30, 30, 30, 10]).split(0.1, 4)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
def test_tinyshakespeare_is_split_as_published(tmp_path):
    store = prepare_quietly(f"text:{SHAKESPEARE}", tmp_path, "chars")
    assert store.tokenizer.vocab_size == 65
    assert store.split(0.1) == ((0, 1_003_854), (1_003_854, 1_115_394))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
def test_tinyshakespeare_gives_the_same_tokens_from_its_builder(tmp_path):
    folders = dict(manual_dir=str(SHAKESPEARE.parent), tfds_dir=str(tmp_path / "tfds"))
    plain = prepare_quietly(f"text:{SHAKESPEARE}", tmp_path, "chars")
    built = prepare_quietly("tfds:tiny_shakespeare", tmp_path, "chars", **folders)
    assert built.folder != plain.folder
    np.testing.assert_array_equal(all_tokens(built), all_tokens(plain))


def test_progress_is_shown_on_a_terminal_alone(ten_documents, monkeypatch, capsys):
    ticks = iter(range(1000))
    monkeypatch.setattr(shards_module.time, "monotonic", lambda: next(ticks))
    documents = list(read_documents(ten_documents))
    assert list(shards_module.show_progress(iter(documents))) == documents
    assert capsys.readouterr() == ("", "")
    assert list(shards_module.show_progress(iter(documents * 4))) == documents * 4
    assert capsys.readouterr().err.startswith("tokenizing: 30 documents, 0.0 M characters\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(shards_module.show_progress(iter(documents))) == documents
    printed = capsys.readouterr().err
    assert "\rtokenizing: 9 documents" in printed
    assert "\n" not in printed


def test_prepare_prints_a_table_and_is_instant_the_second_time(ten_documents, tmp_path):
    arguments = ["prepare", "--config=experiments/quickstart.py",
                 f"--config.data.source={ten_documents}", "--config.data.tokenizer=bytes",
                 f"--config.data.cache_dir={tmp_path}/cache"]  # fmt: skip
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    header, row = first.stdout.splitlines()
    (folder,) = folders_of(tmp_path / "cache")
    assert header.split() == ["source", "documents", "bytes", "tokens", "bytes/token", "shards",
                              "folder"]  # fmt: skip
    store = open_store(folder)
    assert row.split() == [ten_documents, "10", f"{store.manifest['text_bytes']:,}",
                           f"{store.num_tokens:,}", "0.99", "1", str(folder)]  # fmt: skip
    again = command(*arguments)
    assert again.stdout == first.stdout
    assert "prepared already" in again.stderr
    wrong = command(*arguments, "--config.data.source=text:/absent")
    assert wrong.returncode == 3
    assert "no file, folder or glob /absent" in wrong.stderr
