"""What the sources yield, in which order, and what they refuse."""

import hashlib
import os
from pathlib import Path

import pytest
from conftest import SHARED, data_config

from nanojaxgpt.data import sources
from nanojaxgpt.data.sources import Document
from nanojaxgpt.data.sources import stdlib as stdlib_source
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


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match="known: stdlib, text, blocks, jsonl, tfds, hf"):
        read_documents("csv:a")
