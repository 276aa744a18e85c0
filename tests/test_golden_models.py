"""Tiny models of transformers, kept as files: their logits here, and their bits in and out.

scripts/golden_models.py writes the files; test_huggingface.py compares with transformers itself.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange import weights
from nanojaxgpt.interchange.families import FAMILIES, model_fields
from nanojaxgpt.interchange.hf_config import write_config
from nanojaxgpt.interchange.huggingface import open_folder, write_folder
from nanojaxgpt.interchange.loading import read_params
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sharding import make_mesh

GOLDEN = ROOT / "tests" / "golden"
PROMPT = np.arange(40)[None] * 7 % 31
# Older keys beside the newer ones, and the ones that transformers 5 writes.
OLD_KEYS = {"rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_pct", "rotary_emb_base",
            "torch_dtype", "sliding_window_pattern", "partial_rotary_factor"}  # fmt: skip
NEW_KEYS = {"rope_parameters", "dtype"}


def copy_golden(name: str, folder: Path) -> Path:
    """Return a copy of a golden model, with a tokenizer."""
    copied = shutil.copytree(GOLDEN / name, folder / name)
    (copied / "tokenizer.json").write_bytes(export_characters("abcdefghijklmnopqrstuvwxyz"))
    return copied


def import_folder(folder: Path) -> tuple[Pretrained, Any]:
    """Return an opened folder and its parameters, on one device."""
    source = open_folder(folder)
    return source, read_params(source, source.config, make_mesh({}, jax.devices()[:1]))


def golden_error(folder: Path, source: Pretrained, params: Any) -> float:
    """Return by how much the last logits are off, relative to the largest."""
    model = Transformer(dataclasses.replace(source.config, unroll=1))  # compiles faster
    ours_BTV = jax.jit(lambda p: model.apply({"params": p}, PROMPT)[0])(params)
    wanted_TV = np.load(folder / "logits.npy")
    return float(np.abs(np.asarray(ours_BTV)[0, -4:] - wanted_TV).max() / np.abs(wanted_TV).max())


def test_every_family_has_a_golden_model():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_logits_and_the_same_bits_out(name, tmp_path):
    folder = copy_golden(name, tmp_path)
    source, params = import_folder(folder)
    assert golden_error(folder, source, params) < 1e-5
    write_folder(tmp_path / "out", source.config, params, source.tokenizer, "{{ x }}", {},
                 "float32", "card", model_type=name)  # fmt: skip
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in (name, "out"))
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}
    again = open_folder(tmp_path / "out")
    assert again.config == source.config
    assert again.chat_template == "{{ x }}"
    assert again.tokenizer.encode("abc").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", FAMILIES)
def test_older_keys_say_the_same(name, tmp_path):
    cfg = open_folder(copy_golden(name, tmp_path)).config
    written = write_config(FAMILIES[name], cfg)
    fields = [
        model_fields({key: value for key, value in written.items() if key not in left_out})[1]
        for left_out in (set(), OLD_KEYS, NEW_KEYS)
    ]
    assert fields[0] == fields[1] == fields[2]


def test_a_transposed_matrix_is_seen_in_the_logits(tmp_path):
    """Nothing else can tell: a square one has the same shape."""
    folder = copy_golden("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, folder / "model.safetensors")
    assert golden_error(folder, *import_folder(folder)) > 1e-2


def test_bfloat16_stays_bfloat16(tmp_path):
    source, params = import_folder(copy_golden("llama", tmp_path))
    write_folder(tmp_path / "half", source.config, params, source.tokenizer, "",
                 dict(temperature=0.5, top_k=7, end_ids=(3, 4)), "bfloat16", "card")  # fmt: skip
    again, held = import_folder(tmp_path / "half")
    assert again.config.param_dtype == "bfloat16"
    assert again.sample == dict(temperature=0.5, top_k=7, end_ids=(3, 4))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(held)} == {"bfloat16"}
    table = load_file(tmp_path / "half" / "model.safetensors")["model.embed_tokens.weight"]
    assert again.read("model.embed_tokens.weight").tobytes() == table.tobytes()
    keys = json.loads((tmp_path / "half" / "config.json").read_text())
    assert keys["dtype"] == keys["torch_dtype"] == "bfloat16"


def test_shards_and_a_shorter_table(tmp_path, monkeypatch):
    """Rows that pad the table stay here."""
    source, params = import_folder(copy_golden("llama", tmp_path))
    monkeypatch.setattr(weights, "SHARD_BYTES", 6000)
    write_folder(tmp_path / "out", source.config, params, source.tokenizer, "", {}, "float32",
                 "card", vocab_size=27)  # fmt: skip
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    again, held = import_folder(tmp_path / "out")
    assert again.config == dataclasses.replace(source.config, vocab_size=27)
    for name in ("embed_VD", "head_VD"):
        assert np.array_equal(held[name], params[name][:27])
    assert np.array_equal(held["layers"]["q_DNH"], params["layers"]["q_DNH"])


@pytest.mark.parametrize("layers", [10_001, 2**31 - 1])
def test_a_number_of_layers_that_can_not_be_is_refused(layers):
    keys = json.loads((GOLDEN / "llama" / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"{layers} layers can't be"):
        model_fields(keys | {"num_hidden_layers": layers})
