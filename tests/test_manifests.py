"""A store's manifest is held against its own hash, against itself and against its files."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_store import prepare_quietly, read_documents

from nanojaxgpt.data import manifests
from nanojaxgpt.data import shards as shards_module
from nanojaxgpt.data.store import open_store
from nanojaxgpt.data.tokenizers import read_tokenizer
from nanojaxgpt.errors import DataError


def test_manifest_is_complete(ten_documents, tmp_path):
    store = prepare_quietly(ten_documents, tmp_path)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["tokens"] == store.num_tokens
    (shard,) = manifest["shards"]
    assert shard["size"] == 2 * store.num_tokens
    assert (shard["documents"], shard["text_bytes"]) == (10, manifest["text_bytes"])
    assert manifest["source"]["kind"] == "text"
    assert set(store.identity()) == {"source", "tokenizer", "tokens", "documents"}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["00001.tokens", "documents.npy", "tokenizer/sentencepiece.model"])
def test_damaged_store_is_refused(name, damage, ten_documents, tmp_path, small_shards):
    folder = prepare_quietly(ten_documents, tmp_path, "sentencepiece", 280).folder
    open_store(folder)
    damage(folder / name)
    with pytest.raises(DataError, match=f"(?s){Path(name).parts[0]}.*delete the folder {folder}"):
        prepare_quietly(ten_documents, tmp_path, "sentencepiece", 280)


@pytest.mark.parametrize("limit", [manifests.HASHED_BYTES, 0])
def test_swapped_shards_are_refused(limit, tmp_path, monkeypatch, small_shards):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{c * 100}"}}\n' for c in "abc"))
    folder = prepare_quietly(f"jsonl:{tmp_path}/a.jsonl", tmp_path).folder
    (folder / "00000.tokens").rename(folder / "x")
    (folder / "00002.tokens").rename(folder / "00000.tokens")
    (folder / "x").rename(folder / "00002.tokens")
    monkeypatch.setattr(manifests, "HASHED_BYTES", limit)
    with pytest.raises(DataError, match=r"00000\.tokens was altered"):
        open_store(folder)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[" * 100_000, "[]", '{"format": 1}', '{"format": 0}']
)
def test_damaged_manifest_is_refused(text, ten_documents, tmp_path):
    path = prepare_quietly(ten_documents, tmp_path).folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=r"manifest.json.*delete the folder"):
        open_store(path.parent)


@pytest.fixture
def store_folder(ten_documents, tmp_path, small_shards):
    """Return the folder of a store of five shards."""
    return prepare_quietly(ten_documents, tmp_path).folder


def test_any_flipped_bit_of_the_manifest_is_refused(store_folder):
    path = store_folder / "manifest.json"
    good = path.read_bytes()
    content = json.loads(good)
    refused = 0
    for bit in np.random.default_rng(0).permutation(8 * len(good))[:400].tolist():
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if says(damaged) == content:  # white space
            open_store(store_folder)
            continue
        with pytest.raises(DataError, match=f"{path} .*delete the folder {store_folder} "):
            open_store(store_folder)
        refused += 1
    assert refused > 300


def says(text):
    """Return the content of JSON, or nothing where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def change_manifest(folder, change):
    """Change a manifest, and seal it again as if it had been written so."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(manifests.seal(content)))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dtype="<u4"),
        lambda m: m.update(dtype="|u1"),
        lambda m: m.update(dtype="object"),
        lambda m: m.update(shards=[]),
        lambda m: m.update(tokens=m["tokens"] + 1),
        lambda m: m.update(documents=m["documents"] - 1),
        lambda m: m.update(text_bytes=m["text_bytes"] + 1),
        lambda m: m["shards"][0].update(tokens=m["shards"][0]["tokens"] - 8),
        lambda m: m["shards"][0].update(size=-1),
        lambda m: m["shards"][1].update(documents=m["shards"][1]["documents"] + 1),
        lambda m: m["shards"][1].update(file="../other/00001.tokens"),
        lambda m: m["shards"].pop(),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"][0].pop("text_bytes"),
        lambda m: m["documents_file"].update(file="00000.tokens"),
        lambda m: m.pop("source"),
        lambda m: m.pop("tokenizer_hash"),
    ],
)
def test_manifest_that_contradicts_its_files_is_refused(change, store_folder):
    open_store(store_folder)
    change_manifest(store_folder, change)
    with pytest.raises(DataError, match=f"delete the folder {store_folder}"):
        open_store(store_folder)


def test_document_starts_must_agree_with_the_shards(store_folder):
    starts = np.load(store_folder / "documents.npy")
    starts[3:] += 1
    np.save(store_folder / "documents.npy", starts)
    found = shards_module.describe_file(store_folder / "documents.npy")
    change_manifest(store_folder, lambda m: m["documents_file"].update(found))
    with pytest.raises(DataError, match=r"documents\.npy .*delete the folder"):
        open_store(store_folder)


def test_tokenizer_of_another_store_is_refused(ten_documents, tmp_path):
    folder = prepare_quietly(ten_documents, tmp_path).folder
    other = prepare_quietly(ten_documents, tmp_path, "chars")
    other.tokenizer.save(folder / "tokenizer")
    with pytest.raises(DataError, match="not the one that the tokens were made with"):
        open_store(folder)


@pytest.mark.parametrize("name", ["00001.json", "00001.lengths"])
def test_damaged_note_of_a_finished_shard_has_it_made_again(
    name, ten_documents, tmp_path, small_shards
):
    tokenizer = read_tokenizer("bytes")
    good = shards_module.write_shards(tmp_path, read_documents(ten_documents), tokenizer, 1, False)
    content = (tmp_path / name).read_bytes()
    for bit in np.random.default_rng(0).permutation(8 * len(content))[:100].tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(damaged)
        assert not shards_module.is_complete(tmp_path, 1)
    assert (
        shards_module.write_shards(tmp_path, read_documents(ten_documents), tokenizer, 1, False)
        == good
    )
    assert (tmp_path / name).read_bytes() == content
