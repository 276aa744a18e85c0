"""Parquet files as sources, written by pyarrow itself."""

import sys

import pytest
from conftest import data_config

from nanojaxgpt.data import sources
from nanojaxgpt.data.sources.documents import Document
from nanojaxgpt.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read_documents(source, **changes):
    return list(sources.read_documents(source, data_config(**changes), lambda _: None))


def identity(source):
    return sources.source_identity(source, data_config())


def test_rows_come_in_order_over_row_groups_and_files(tmp_path):
    texts = [f"row {number} é\n\0" for number in range(1000)]
    for name, part in (("b", texts[700:]), ("a", texts[:700])):
        table = pa.table({"text": part, "number": range(len(part))})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
    (tmp_path / "ignored.txt").touch()
    found = read_documents(f"parquet:{tmp_path}")
    assert [document.text for document in found] == texts
    assert [found[n].name for n in (0, 699, 700)] == [
        "a.parquet:1", "a.parquet:700", "b.parquet:1",
    ]  # fmt: skip
    assert found == read_documents(f"parquet:{tmp_path}/*.parquet#text")
    assert identity(f"parquet:{tmp_path}") == identity(f"parquet:{tmp_path}/**/*.parquet#text")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.utf8())]
)
def test_fields_of_any_text_type_and_depth(tmp_path, kind):
    inner = pa.array(["deep", "", "deeper"], pa.string()).cast(kind)
    flat = pa.array(["one", "two", "three"], pa.string()).cast(kind)
    nested = pa.StructArray.from_arrays([inner, pa.array([1, 2, 3])], ["b", "number"])
    parquet.write_table(pa.table({"a": nested, "c.d": flat}), tmp_path / "x.parquet")
    source = f"parquet:{tmp_path}/x.parquet"
    assert [d.text for d in read_documents(f"{source}#a.b")] == ["deep", "deeper"]
    assert [d.text for d in read_documents(f"{source}#c.d")] == ["one", "two", "three"]
    assert identity(f"{source}#a.b") != identity(f"{source}#c.d")
    for field, words in (("", "no single text field"), ("#a.number", "'a.number'")):
        with pytest.raises(ConfigError, match=rf"{words}; choose one with #FIELD: a\.b, c\.d"):
            read_documents(source + field)


def test_bad_rows_are_refused_or_skipped(tmp_path):
    path = tmp_path / "x.parquet"
    raw = pa.array([b"good", b"caf\xe9", None, b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(4, *raw.buffers()[1:], raw.buffers()[0], raw.null_count)
    parquet.write_table(pa.table({"body": text}), path)
    with pytest.raises(DataError, match=r"x\.parquet, row 2, byte 3: not UTF-8"):
        read_documents(f"parquet:{path}")
    assert read_documents(f"parquet:{path}", bad_text="skip") == [
        Document("x.parquet:1", "good"), Document("x.parquet:4", "fine"),
    ]  # fmt: skip


def test_what_is_no_parquet_file_or_has_other_columns(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"text": ["a" * 1000] * 99}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no text field 'text'"):
        read_documents(f"parquet:{tmp_path}")
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (b"", b"just text", whole[:-40], whole[:-8] + b"\0" * 4 + b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet (is not a Parquet file|can't be read)"):
            read_documents(f"parquet:{tmp_path}/a.parquet")
    with pytest.raises(DataError, match="no file, folder or glob"):
        read_documents(f"parquet:{tmp_path}/absent.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install nanojaxgpt\[parquet\]"):
        read_documents(f"parquet:{tmp_path}/b.parquet")
