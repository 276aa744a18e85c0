"""What the sources yield, in which order, and what they refuse."""

import gzip
import hashlib
import json
import os
import sys
import time
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, data_config, write_tfds
from etils import epath
from etils.epath import backend

from nanojaxgpt.data import sources
from nanojaxgpt.data.sources import files, weighted_sources
from nanojaxgpt.data.sources import stdlib as stdlib_source
from nanojaxgpt.data.sources.documents import Document
from nanojaxgpt.errors import ConfigError, DataError

SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")


def read_documents(source, report=print, **changes):
    return sources.read_documents(source, data_config(**changes), report)


def source_identity(source, **changes):
    return sources.source_identity(source, data_config(**changes))


@pytest.fixture(scope="module")
def stdlib():
    return list(read_documents("stdlib"))


def test_stdlib_has_source_and_topics_but_no_tests(stdlib):
    names = [document.name for document in stdlib]
    assert len(names) == len(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert any(name.startswith("topics/") for name in names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "encodings", "idlelib"}
    assert "pydoc_data/topics.py" not in names
    assert all(document.text for document in stdlib)


def test_stdlib_order_is_shuffled_and_repeats(stdlib):
    names = [document.name for document in stdlib]
    assert names != sorted(names)
    assert names == [document.name for document in read_documents("stdlib")]
    tail = names[-len(names) // 5 :]
    assert len({name[0] for name in tail}) > 10  # no run of neighbours


def test_stdlib_identity_follows_the_content(monkeypatch):
    before = source_identity("stdlib")
    assert before == source_identity("stdlib")
    monkeypatch.setattr(stdlib_source, "stdlib_topics", lambda: iter([Document("topics/x", "y")]))
    assert source_identity("stdlib")["sha256"] != before["sha256"]


def test_stdlib_skips_what_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/hidden.py").write_text("x = 2\n")
    monkeypatch.setattr(stdlib_source.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(stdlib_source.stdlib_modules()) == [Document("good.py", "x = 1\n")]


def test_stdlib_without_any_part_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_source.sysconfig, "get_path", lambda name: str(tmp_path / "absent"))
    monkeypatch.setattr(stdlib_source, "stdlib_topics", lambda: iter(()))
    with pytest.raises(DataError, match=r"data\.source=text:PATH"):
        list(read_documents("stdlib"))


def test_text_file_keeps_its_bytes(tmp_path):
    path = tmp_path / "a.txt"
    data = "one\r\ntwo\rthree\n\x00 \U0001f600".encode()
    path.write_bytes(b"\xef\xbb\xbf" + data)
    (document,) = read_documents(f"text:{path}")
    assert document.name == "a.txt"
    assert document.text.encode() == data


def test_text_folder_is_recursive_and_sorted(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "ignored.md"):
        (tmp_path / name).write_text(name)
    expected = [Document(name, name) for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert list(read_documents(f"text:{tmp_path}")) == expected
    assert list(read_documents(f"text:{tmp_path}/*.md")) == [Document("ignored.md", "ignored.md")]
    assert list(read_documents(f"text:{tmp_path}/**/*.txt")) == expected


def test_a_folder_is_walked_to_an_end(tmp_path, monkeypatch):
    corpus, elsewhere = tmp_path / "corpus" / "a", tmp_path / "elsewhere"
    for folder in (corpus, elsewhere):
        folder.mkdir(parents=True)
        (folder / "b.txt").write_text(folder.name)
    (corpus / "loop").symlink_to(tmp_path / "corpus")
    (corpus / "linked").symlink_to(elsewhere)
    source = f"text:{tmp_path}/corpus"
    expected = [Document("b.txt", "a"), Document("linked/b.txt", "elsewhere")]
    assert list(read_documents(source)) == expected
    monkeypatch.setattr(files, "MOST_FILES", 3)
    with pytest.raises(DataError, match=r"more than 3 files, .*name a smaller folder"):
        list(read_documents(source))


def test_text_identity_is_names_sizes_hashes_wherever_the_folder_lies(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    here = source_identity(f"text:{tmp_path}/here")
    assert here == source_identity(f"text:{tmp_path}/there/a.txt")
    sha256 = hashlib.sha256(b"same").hexdigest()
    assert here == {"kind": "text", "files": [{"name": "a.txt", "bytes": 4, "sha256": sha256}]}
    (tmp_path / "there/a.txt").write_text("SAME")
    assert here != source_identity(f"text:{tmp_path}/there")


def test_missing_text_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"absent/a\.txt"):
        list(read_documents(f"text:{tmp_path}/absent/a.txt"))
    with pytest.raises(DataError, match=r"holds no \*.txt"):
        list(read_documents(f"text:{tmp_path}"))


def test_missing_tinyshakespeare_says_where_it_comes_from(tmp_path):
    with pytest.raises(DataError, match="1,115,394 bytes, from the char-rnn repository's data/"):
        list(read_documents(f"text:{tmp_path}/tinyshakespeare.txt"))


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_empty_text_is_an_error(tmp_path, data):
    (tmp_path / "empty.txt").write_bytes(data)
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        list(read_documents(f"text:{tmp_path}"))


def test_text_that_is_not_utf8_gives_line_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("\ufeffgood\nbad ".encode() + b"\xe9 line\n")
    with pytest.raises(DataError, match=r"latin\.txt, line 2, byte 12: not UTF-8"):
        list(read_documents(f"text:{tmp_path}/latin.txt"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_unreadable_text_is_an_error(tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(DataError, match=r"secret\.txt can't be read"):
        list(read_documents(f"text:{tmp_path}"))


@pytest.mark.parametrize("source", ["", "txt:a", "stdlib:a", "text:", "text"])
def test_unknown_source_is_a_config_error(source):
    with pytest.raises(ConfigError, match=r"data\.source"):
        list(read_documents(source))
    with pytest.raises(ConfigError, match=r"data\.source"):
        source_identity(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("csv:a", "no kind 'csv'"),
        ("notes/", "did you mean data.source=text:notes/?"),
        ("a.jsonl#body", "did you mean data.source=jsonl:a.jsonl#body?"),
        ("json:a", "did you mean jsonl?"),
        ("stdlb", "did you mean stdlib?"),
    ],
)
def test_unknown_kind_suggests_and_lists_the_known_ones(source, words):
    with pytest.raises(ConfigError, match="known: stdlib, text, blocks, jsonl, parquet") as caught:
        read_documents(source)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1\x15\x04\x15\x9e", "it is a Parquet file"),
        ("plain".encode("utf-16"), "UTF-16"),
        ("plain".encode("utf-32"), "UTF-32"),
        ("plain text".encode("utf-16-le"), "likely UTF-16"),
        ("plain text".encode("utf-32-be"), "likely UTF-32"),
        (b"\x00" * 64 + b"\xff", "it holds NUL bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_files_of_another_format_are_named(kind, content, words, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_documents(f"{kind}:{tmp_path}/a"))
    assert words in str(caught.value)
    assert ("UTF-32" in str(caught.value)) == ("UTF-32" in words)


@pytest.mark.parametrize("kind", ["text", "blocks", "jsonl", "parquet"])
@pytest.mark.parametrize("location", ["ftp://x/y", "file:///x/*.txt", "GS://x", "://x"])
def test_an_unknown_scheme_names_the_known_ones(kind, location):
    known = "known: https://, http://, gs://, s3://, az://, hf://; write a local path without one"
    for function in (source_identity, lambda source: list(read_documents(source))):
        with pytest.raises(ConfigError, match=known):
            function(f"{kind}:{location}")
    with pytest.raises(ConfigError, match=r"data\.tfds_dir=.*known: gs://"):
        source_identity("tfds:lm1b", tfds_dir=location)


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for source in ("text:/dev/zero", "jsonl:/dev/zero", f"text:{tmp_path}", f"text:{tmp_path}/*"):
        with pytest.raises(DataError, match="is a device, a pipe or a socket"):
            list(read_documents(source))


def test_blocks_are_parted_by_blank_lines(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \n\nthree \x00\n\n")
    (tmp_path / "a.txt").write_text("\n\nonly")
    assert list(read_documents(f"blocks:{tmp_path}")) == [
        Document("a.txt:3", "only"),
        Document("b.txt:1", "one\r\ntwo"),
        Document("b.txt:6", "three \x00"),
    ]
    assert source_identity(f"blocks:{tmp_path}")["kind"] == "blocks"


def test_block_that_is_not_utf8_gives_line_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nfine\nbad \xe9\n\nlast")
    with pytest.raises(DataError, match=r"a\.txt, line 4, byte 15: not UTF-8"):
        list(read_documents(f"blocks:{tmp_path}"))
    said = []
    found = list(read_documents(f"blocks:{tmp_path}", said.append, bad_text="skip"))
    assert [document.text for document in found] == ["good", "last"]
    assert said[-1] == f"skipped 1 bad texts of blocks:{tmp_path}"


def write_jsonl(path, *records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst"])
def test_json_lines(tmp_path, ending):
    write_jsonl(tmp_path / f"a{ending}", {"text": "é\n\0", "id": 1}, {"text": ""}, {"text": "two"})
    expected = [Document(f"a{ending}:1", "é\n\0"), Document(f"a{ending}:3", "two")]
    assert list(read_documents(f"jsonl:{tmp_path}")) == expected
    assert list(read_documents(f"jsonl:{tmp_path}/a{ending}")) == expected
    assert list(read_documents(f"jsonl:{tmp_path}/*{ending}#text")) == expected


def test_json_field_is_chosen_and_identified(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"text": "a", "body": "b"})
    assert [d.text for d in read_documents(f"jsonl:{tmp_path}#body")] == ["b"]
    assert source_identity(f"jsonl:{tmp_path}#body") != source_identity(f"jsonl:{tmp_path}")


def test_fields_within_fields(tmp_path):
    records = [{"a": {"b": {"c": "deep"}, "d": "shallow"}}, {"a.d": "by its name", "a": {"d": "x"}}]
    write_jsonl(tmp_path / "a.jsonl", *records)
    assert [d.text for d in read_documents(f"jsonl:{tmp_path}#a.d")] == ["shallow", "by its name"]
    skipping = dict(report=str, bad_text="skip")
    assert [d.text for d in read_documents(f"jsonl:{tmp_path}#a.b.c", **skipping)] == ["deep"]
    for field in ("a.b.x", "a.d.x"):
        with pytest.raises(DataError, match=rf"a\.jsonl:1 has no field '{field}'; it has a;"):
            list(read_documents(f"jsonl:{tmp_path}#{field}"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', ":2 is not JSON"),
        (b'{"text": "\xe9"}', ":2 is not UTF-8"),
        (b"[", ":2 is not JSON: it begins an array.*one object per line"),
        (b'[{"text": "a"},', ":2 is not JSON: it begins an array"),
        (b"{", ":2 is not JSON: it begins an object.*one object per line"),
        (b'["text"]', ":2 holds an array, not an object"),
        (b"[" * 5000, ":2 is not JSON"),
        (bytes(9), ":2 is not JSON: it holds NUL bytes"),
        (b'{"title": "x"}', ":2 has no field 'text'; it has title"),
        (b'{"text": 1}', ":2 holds an integer where its text should be"),
        (b'{"text": "\\ud800"}', r":2 holds an unpaired surrogate, U\+D800"),
    ],
)
def test_bad_json_is_refused_or_skipped(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}')
    with pytest.raises(DataError, match=rf"a\.jsonl{problem}.*data\.bad_text=skip"):
        list(read_documents(f"jsonl:{path}"))
    said = []
    found = list(read_documents(f"jsonl:{path}", said.append, bad_text="skip"))
    assert [document.text for document in found] == ["one", "three"]
    assert f"skipped: {path}:2" in said[0]
    assert said[1:] == [f"skipped 1 bad texts of jsonl:{path}"]


def test_only_the_first_bad_texts_are_reported_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 50 + '{"text": "x"}')
    said = []
    assert len(list(read_documents(f"jsonl:{tmp_path}", said.append, bad_text="skip"))) == 1
    assert len(said) == 11
    assert said[-1].startswith("skipped 50 bad texts")


def test_nothing_but_bad_text_is_an_error_even_when_skipped(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="has no text"):
        list(read_documents(f"text:{tmp_path}", str, bad_text="skip"))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_archive_is_named(tmp_path, ending):
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"neither gzip nor zstd")
    pytest.importorskip("zstandard")
    with pytest.raises(DataError, match=rf"a\.jsonl{ending} can't be unpacked"):
        list(read_documents(f"jsonl:{tmp_path}"))


def test_truncated_gzip_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write_jsonl(path, *({"text": str(n)} for n in range(1000)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz can't be unpacked"):
        list(read_documents(f"jsonl:{path}"))


def test_zstandard_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"pip install nanojaxgpt\[zstd\]"):
        list(read_documents(f"jsonl:{tmp_path}"))


@pytest.fixture
def bucket(monkeypatch):
    """Return a folder at s3:// that is kept in memory, where epath finds it."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(
        type(backend.fsspec_backend), "_get_filesystem", lambda self, name: memory()
    )
    return epath.Path("s3://bucket/corpus")


def test_files_may_lie_in_a_bucket(bucket, tmp_path):
    (bucket / "deep").mkdir(parents=True)
    for name in ("b.txt", "deep/a.txt", "c.md"):
        (bucket / name).write_text(name)
    expected = [Document(name, name) for name in ("b.txt", "deep/a.txt")]
    assert list(read_documents(f"text:{bucket}")) == expected
    assert list(read_documents(f"text:{bucket}/**/*.txt")) == expected
    assert list(read_documents(f"text:{bucket}/*.md")) == [Document("c.md", "c.md")]
    (tmp_path / "b.txt").write_text("b.txt")
    assert source_identity(f"text:{bucket}/b.txt") == source_identity(f"text:{tmp_path}/b.txt")
    (bucket / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    assert [d.text for d in read_documents(f"jsonl:{bucket}/a.jsonl.gz")] == ["packed"]
    with pytest.raises(DataError, match="no file, folder or glob s3://bucket/absent"):
        list(read_documents("text:s3://bucket/absent/*.txt"))


def prepare_dataset(tmp_path, name, texts, field="text"):
    """Write a TensorFlow Dataset with the name and the features of a published one."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {field: tfds.features.Text(), "number": tfds.features.Scalar(np.int32)}
    records = [{field: text, "number": number} for number, text in enumerate(texts)]
    write_tfds(tmp_path, name, features, train=records, test=records)


def test_prepared_dataset_is_read(tmp_path):
    texts = [f"sentence {number} é\0" for number in range(600)]
    prepare_dataset(tmp_path, "lm1b", [*texts, ""])
    found = list(read_documents("tfds:lm1b", tfds_dir=str(tmp_path)))
    assert sorted(document.text for document in found) == sorted(texts)
    assert len({document.name for document in found}) == 600
    half = list(read_documents("tfds:lm1b:1.1.0@test[:50%]#text", tfds_dir=str(tmp_path)))
    assert 299 <= len(half) <= 301
    train, test = (source_identity(f"tfds:lm1b@{split}", tfds_dir=str(tmp_path))
                   for split in ("train", "test"))  # fmt: skip
    assert train == source_identity("tfds:lm1b", tfds_dir=str(tmp_path))
    assert (train["dataset"], train["examples"]) == ("lm1b/1.1.0", 601)
    assert train != test


def test_dataset_needs_a_split_field_and_version_that_exist(tmp_path):
    prepare_dataset(tmp_path, "lambada", ["word"], field="passage")
    assert [d.text for d in read_documents("tfds:lambada", tfds_dir=str(tmp_path))] == ["word"]
    for location, problem in {
        "lambada@dev": "no split 'dev'; available: .*train",
        "lambada#number": "no text field 'number'; choose one with #FIELD: passage",
        "lambada/": "is not tfds:NAME",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            list(read_documents(f"tfds:{location}", tfds_dir=str(tmp_path)))
    with pytest.raises(DataError, match=r"lambada/2\.0\.0; available versions: 1\.1\.0"):
        list(read_documents("tfds:lambada:2.0.0", tfds_dir=str(tmp_path)))


def test_prepared_dataset_that_can_not_be_read_is_named(tmp_path):
    prepare_dataset(tmp_path, "lm1b", ["text"])
    (records,) = (tmp_path / "lm1b/1.1.0").glob("lm1b-train.array_record*")
    records.write_bytes(records.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"lm1b/1\.1\.0 can't be read"):
        list(read_documents("tfds:lm1b", tfds_dir=str(tmp_path)))
    info = tmp_path / "lm1b/1.1.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"(?s)not in array_record format; .*file_format="):
        list(read_documents("tfds:lm1b", tfds_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["c4/en", "lm1b", "wiki40b"])
def test_unprepared_dataset_is_refused_at_once(tmp_path, name):
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"(?s)no prepared dataset {tmp_path}/{name}.*\(\)"):
        source_identity(f"tfds:{name}", tfds_dir=str(tmp_path))
    assert time.monotonic() - began < 60  # and not after 204 s of retried downloads


def test_without_tensorflow_datasets_a_source_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    words = r"tfds:lm1b: tensorflow_datasets is not installed: pip install 'nanojaxgpt\[tfds\]'"
    for check in (read_documents, source_identity):
        with pytest.raises(ConfigError, match=words):
            list(check("tfds:lm1b", tfds_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=words):
        sources.check_sources(data_config(mixture=("1 tfds:lm1b", "1 stdlib:")))


def test_own_builders_read_the_files_in_manual_dir(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    folders = dict(manual_dir=str(manual), tfds_dir=str(tmp_path / "tfds"))
    with pytest.raises(DataError, match=r"1,115,394 bytes, from the char-rnn"):
        list(read_documents("tfds:tiny_shakespeare", **folders))
    for name in ("b", "a", "tinyshakespeare"):
        (manual / f"{name}.txt").write_bytes(f"\ufeff{name}\r\n\0é".encode())
    found = [d.text for d in read_documents("tfds:local_text", **folders)]
    assert found == [f"{name}\r\n\0é" for name in ("a", "b", "tinyshakespeare")]
    before = source_identity("tfds:local_text", **folders)
    (manual / "a.txt").write_text("A")
    assert next(read_documents("tfds:local_text", **folders)).text == "A"
    assert source_identity("tfds:local_text", **folders) != before
    (document,) = read_documents("tfds:tiny_shakespeare", **folders)
    assert document.text == "tinyshakespeare\r\n\0é"
    kept = dict(tfds_dir=folders["tfds_dir"])  # what was prepared is enough
    assert list(read_documents("tfds:tiny_shakespeare", **kept)) == [document]


@needs_shakespeare
def test_tiny_shakespeare_is_the_plain_file(tmp_path):
    folders = dict(manual_dir=str(SHAKESPEARE.parent), tfds_dir=str(tmp_path))
    (built,) = read_documents("tfds:tiny_shakespeare", **folders)
    (plain,) = read_documents(f"text:{SHAKESPEARE}")
    assert built.text == plain.text


class Rows(list):
    """What the tests need of a `datasets.Dataset`."""

    _fingerprint = "f00d"

    def __init__(self, rows, **types_of):
        super().__init__(rows)
        self.features = {k: types.SimpleNamespace(dtype=v) for k, v in types_of.items()}

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_hugging_face_datasets_are_loaded_by_name(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((*arguments, named["split"]))
        if named["split"] == "absent":
            raise ValueError("Unknown split")
        rows = [{"text": "one", "title": "x"}, {"text": "", "title": "y"}]
        return Rows(rows, text="string", title="string", label="int64")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_documents("hf:owner/name")) == [Document("train/0", "one")]
    texts = [d.text for d in read_documents("hf:owner/name/config@test[:2]#title")]
    assert texts == ["x", "y"]
    assert asked == [("owner/name", None, "train"), ("owner/name", "config", "test[:2]")]
    assert source_identity("hf:owner/name#title")["fingerprint"] == "f00d"
    with pytest.raises(ConfigError, match="choose one with #FIELD: text, title"):
        list(read_documents("hf:owner/name#label"))
    with pytest.raises(DataError, match="can't be loaded: ValueError: Unknown split"):
        list(read_documents("hf:owner/name@absent"))


def test_hugging_face_fields_within_fields(monkeypatch):
    made = Rows([{"a": {"b": "deep"}, "c.d": "flat"}])
    text, number = types.SimpleNamespace(dtype="string"), types.SimpleNamespace(dtype="int64")
    made.features = {"a": {"b": text, "n": number}, "c.d": text}
    package = types.SimpleNamespace(load_dataset=lambda *_, **__: made)
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert [d.text for d in read_documents("hf:owner/name#a.b")] == ["deep"]
    assert [d.text for d in read_documents("hf:owner/name#c.d")] == ["flat"]
    with pytest.raises(ConfigError, match=r"choose one with #FIELD: a\.b, c\.d"):
        list(read_documents("hf:owner/name"))


def test_hugging_face_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["one", "two é"], "label": [0, 1]})
    made.save_to_disk(str(tmp_path / "saved"))
    assert [d.text for d in read_documents(f"hf:{tmp_path}/saved")] == ["one", "two é"]
    assert source_identity(f"hf:{tmp_path}/saved")["rows"] == 2


def test_hugging_face_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install nanojaxgpt\[huggingface\]"):
        list(read_documents("hf:owner/name"))


def test_mixture_names_weights():
    mixture = ("3 text:a b.txt", "0.25 jsonl:b.jsonl")
    assert weighted_sources(data_config(mixture=mixture)) == [
        (Fraction(3), "text:a b.txt"),
        (Fraction(1, 4), "jsonl:b.jsonl"),
    ]
    assert weighted_sources(data_config(source="text:a")) == [(Fraction(1), "text:a")]


@pytest.mark.parametrize("item", ["text:a", "0 text:a", "0.0 text:a", "-1 text:a", "2", "1e3 a:b"])
def test_mixture_without_a_weight_is_refused(item):
    with pytest.raises(ConfigError, match=rf"data\.mixture.*{item}"):
        weighted_sources(data_config(mixture=(item,)))
