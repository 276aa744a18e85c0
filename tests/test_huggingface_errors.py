"""Folders of models that are incomplete, damaged or of another kind: refused, and told why."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import small_model
from safetensors.numpy import load_file, save_file
from test_golden_models import copy_golden, import_folder

from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.data.tokenizers import ByteTokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError
from nanojaxgpt.interchange.families import FAMILIES, model_fields
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.huggingface import open_folder, write_folder

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path) -> Path:
    """Return a small model that can be opened."""
    return copy_golden("llama", tmp_path)


def change_config(folder: Path, **changes) -> Path:
    """Change keys of config.json; those set to ... are removed."""
    path = folder / "config.json"
    keys = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in keys.items() if value is not ...}))
    return folder


def change_weights(folder: Path, **changes) -> Path:
    """Change tensors; those set to ... are removed."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: array for name, array in tensors.items() if array is not ...}, path)
    return folder


def split_weights(folder: Path, **places: str) -> Path:
    """Divide the weights between two files with an index, in which `places` differ."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors"
             for number, name in enumerate(names)}  # fmt: skip
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    index = dict(metadata={}, weight_map=files | places)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(folder: Path, kind: type[Exception], *words: str) -> None:
    """Check that a folder is refused with these words."""
    with pytest.raises(kind) as caught:
        open_folder(folder)
    for word in words:
        assert word in str(caught.value)


def test_shards_are_read_as_one_file_is(llama, tmp_path):
    whole = import_folder(llama)[1]
    parts = import_folder(split_weights(llama))[1]
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.array_equal(one, other)


def test_a_folder_without_a_model(tmp_path):
    refused(tmp_path, CheckpointError, "has no config.json")


def test_pickles_are_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, CheckpointError, "pytorch_model.bin", "pickle", "save_pretrained")


def test_missing_tensors(llama):
    refused(change_weights(llama, **{Q: ...}), CheckpointError, "lack", Q)


def test_unexpected_tensors(llama):
    more = {"model.layers.0.self_attn.sinks": np.zeros(2, np.float32)}
    refused(change_weights(llama, **more), CheckpointError, "no place for", "sinks")


def test_constants_of_older_versions_are_ignored(llama):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert name not in open_folder(change_weights(llama, **{name: np.ones(4, np.float32)})).slots


def test_another_shape_names_both(llama):
    refused(change_weights(llama, **{Q: np.zeros((8, 16), np.float32)}), CheckpointError,
            Q, "[8, 16]", "[16, 16]", "model.safetensors")  # fmt: skip


def test_a_config_of_another_model(llama):
    refused(change_config(llama, hidden_size=32), CheckpointError, "shape", "config.json")
    refused(change_config(llama, hidden_size=16, num_hidden_layers=3), CheckpointError,
            "model.layers.2.")  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_quantized_weights(llama, dtype):
    kind = {np.int8: "I8", np.float64: "F64"}[dtype]
    refused(change_weights(llama, **{Q: np.zeros((16, 16), dtype)}), CheckpointError, Q, kind)
    refused(change_config(llama, quantization_config={}), ConfigError, "quantization_config")


def test_a_truncated_file(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(llama, CheckpointError, "model.safetensors", "cut off")
    path.write_bytes(b"\xff" * 64)
    refused(llama, CheckpointError, "model.safetensors", "damaged")


def test_a_truncated_shard(llama):
    path = split_weights(llama) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(llama, CheckpointError, path.name)
    path.unlink()
    refused(llama, CheckpointError, path.name, "missing")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors"]
)
def test_an_index_that_names_other_files(llama, place):
    refused(split_weights(llama, **{Q: place}), CheckpointError, repr(place), "index.json")


def test_an_index_that_names_other_tensors(llama):
    split_weights(llama, other="model-00001-of-00002.safetensors")
    refused(llama, CheckpointError, "other", "model-00001-of-00002.safetensors")


def test_an_index_that_is_no_index(llama):
    (llama / "model.safetensors").unlink()
    index = llama / "model.safetensors.index.json"
    for text, kind in (("{}", CheckpointError), ("[", ConfigError), ("[]", ConfigError)):
        index.write_text(text)
        refused(llama, kind, index.name)


def test_a_tied_head_must_be_the_table(tmp_path):
    folder = copy_golden("smollm3", tmp_path)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    source = open_folder(change_weights(folder, **{"lm_head.weight": table}))
    assert "lm_head.weight" not in source.slots
    change_weights(folder, **{"lm_head.weight": table + 1})
    refused(folder, CheckpointError, "lm_head.weight", "tie_word_embeddings")


def test_numbers_that_are_not_finite(llama):
    array = load_file(llama / "model.safetensors")[Q]
    array[3, 3] = np.nan
    change_weights(llama, **{Q: array})
    with pytest.raises(CheckpointError, match=r"q_proj.weight has numbers that are not finite"):
        import_folder(llama)


def test_a_bare_model_lacks_the_prefix(tmp_path):
    """As the published GPT-2, with constants of old versions beside its weights."""
    folder = copy_golden("gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(bare, folder / "model.safetensors")
    source = open_folder(folder)
    name = "transformer.h.0.attn.c_attn.weight"
    assert np.array_equal(source.read(name), tensors[name])


def test_the_text_part_of_a_model_that_sees_images(tmp_path):
    folder = copy_golden("gemma3_text", tmp_path)
    whole = import_folder(folder)
    text = json.loads((folder / "config.json").read_text())
    keys = dict(model_type="gemma3", text_config=text, vision_config={}, eos_token_id=[1, 106])
    (folder / "config.json").write_text(json.dumps(keys))
    tensors = load_file(folder / "model.safetensors")
    for start in ("language_model.model.", "model.language_model."):
        more = {name.replace("model.", start, 1): array for name, array in tensors.items()}
        more["vision_tower.embeddings.weight"] = np.zeros(3, np.float32)
        save_file(more, folder / "model.safetensors")
        source, params = import_folder(folder)
        assert source.config == whole[0].config
        assert np.array_equal(params["embed_VD"], whole[1]["embed_VD"])


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", dict(model_type="mixtral"), ["mixtral", "mixture of experts", "llama, mistral"]),
        ("llama", dict(model_type="qwen3_5_text"), ["Gated DeltaNet"]),
        ("llama", dict(model_type="gemma4"), ["gemma4"]),
        ("llama", dict(model_type="deepseek_v3"), ["latent attention"]),
        ("llama", dict(model_type="gpt_oss"), ["attention sinks"]),
        ("llama", dict(model_type="bert"), ["bert", "supported are gpt2"]),
        ("llama", dict(model_type=...), ["no model_type"]),
        ("llama", dict(hidden_size=...), ["no hidden_size"]),
        ("llama", dict(hidden_size="16"), ["hidden_size='16'", "an integer"]),
        ("llama", dict(attention_sinks=4), ["attention_sinks", "not known"]),
        ("llama", dict(hidden_act="gelu"), ["'gelu'", "silu"]),
        ("llama", dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2)),
         ["'dynamic'", "yarn"]),
        ("llama", dict(rope_theta=5e5), ["given twice"]),
        ("llama", dict(rope_scaling=dict(type="linear", factor=2)), ["contradict"]),
        ("llama", dict(mlp_bias=True, attention_bias=False), ["mlp_bias"]),
        ("llama", dict(num_attention_heads=3, head_dim=None), ["not divisible"]),
        ("llama", dict(rms_norm_eps=None), ["norm_eps"]),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", dict(reorder_and_upcast_attn=True), ["reorder_and_upcast_attn"]),
        ("gpt_neox", dict(attention_bias=False), ["attention_bias"]),
        ("qwen2", dict(layer_types=["full_attention"]), ["layer_types", "2 layers"]),
        ("qwen2", dict(use_sliding_window=False), ["no sliding_window"]),
        ("gemma3_text", dict(use_bidirectional_attention=True), ["use_bidirectional_attention"]),
        ("smollm3", dict(no_rope_layers=[1]), ["no_rope_layers"]),
        ("olmo3", dict(rope_parameters=dict(rope_theta=5e5)), ["each kind of layer"]),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_expressed(name, changes, words, tmp_path):
    refused(change_config(copy_golden(name, tmp_path), **changes), ConfigError, "config.json",
            *words)  # fmt: skip


def test_a_tokenizer_of_another_model(llama):
    (llama / "tokenizer.json").write_bytes(export_characters("".join(map(chr, range(65, 97)))))
    refused(llama, DataError, "tokenizer.json", "32 tokens", "31 rows")
    (llama / "tokenizer.json").write_bytes(export_characters("abc"))
    refused(change_config(llama, eos_token_id=7), DataError, "eos_token_id=7")
    (llama / "tokenizer.json").write_text("{}")
    refused(llama, DataError, "tokenizer.json")
    (llama / "tokenizer.json").rename(llama / "tekken.json")
    refused(llama, DataError, "tekken.json", "tokenizer.json")
    (llama / "tekken.json").unlink()
    refused(llama, DataError, "no tokenizer")


def test_models_that_no_family_can_express():
    with pytest.raises(ConfigError, match=r"nearest is gpt2, which can't: model.smeared_keys=True"):
        choose_family(small_model(smeared_keys=True))
    with pytest.raises(ConfigError, match=r"llama can't .*model.norm='layernorm'"):
        choose_family(small_model(positions="rotary", mlp="swiglu", bias=False), "llama")
    with pytest.raises(ConfigError, match="'bert' must be one of gpt2"):
        choose_family(small_model(), "bert")
    assert choose_family(small_model())[0].model_type == "gpt2"


def test_nothing_half_written_stays(tmp_path):
    cfg = small_model()
    with pytest.raises(KeyError):
        write_folder(tmp_path / "out", cfg, {}, ByteTokenizer(), "", {}, "float32", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_folder(tmp_path / "full", cfg, {}, ByteTokenizer(), "", {}, "float32", "")
    with pytest.raises(ConfigError, match="dtype='int8'"):
        write_folder(tmp_path / "out", cfg, {}, ByteTokenizer(), "", {}, "int8", "")


def test_numbers_beyond_float16(tmp_path, llama):
    source, params = import_folder(llama)
    params["final_norm_scale"] = params["final_norm_scale"] * 1e6
    with pytest.raises(CheckpointError, match=r"model.norm.weight .* float16"):
        write_folder(tmp_path / "out", source.config, params, source.tokenizer, "", {},
                     "float16", "")  # fmt: skip


def test_defaults_are_those_of_transformers():
    """Of keys that files of older versions leave out."""
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
                 vocab_size=31)  # fmt: skip
    fields = {name: model_fields(sizes | dict(model_type=name))[1]
              for name in FAMILIES if name != "gpt2"}  # fmt: skip
    assert fields["mistral"]["windows"] == (4096,)
    assert fields["gemma2"]["windows"] == (4096, 0)
    assert fields["gemma2"]["logit_softcap"] == 30
    assert fields["smollm3"]["rotary"] == ("", "", "", "none")
    assert fields["olmo3"]["windows"] == (4096, 4096, 4096, 0)
    assert fields["qwen3"]["head_dim"] == 128
    assert fields["gpt_neox"]["rotary"] == ("fraction=0.25",)
    assert fields["granite"]["attention_scale"] == 1
