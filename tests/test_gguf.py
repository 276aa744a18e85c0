"""GGUF files, without torch: ours come back, damaged and unknown ones are refused."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt import extras
from nanojaxgpt.data.subwords import train_sentencepiece
from nanojaxgpt.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError, UserError
from nanojaxgpt.interchange.gguf_file import ARCHITECTURES, open_file, tensors
from nanojaxgpt.interchange.gguf_tokenizer import SPLITTINGS, write_vocabulary
from nanojaxgpt.interchange.gguf_write import write_file, write_metadata
from nanojaxgpt.interchange.hf_config import essence
from nanojaxgpt.interchange.loading import read_params, write_tensors
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.tensors import slots
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sharding import make_mesh

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

VARIABLE, NAME = "NANOJAXGPT_SMOLLM2", "smollm2-135m-instruct"
ROWS = 40
TEXTS = (
    "def f(x):\n    return x**2  # 3.14159\n\tprint('it''s', f(1234567))\n",
    "Größe, Füße und Äpfel: über 1.000 Bäume stünden naß im Moor.",
    "🙂👩‍👩‍👧 和平 12三 ½ Ünïcödé ﬁ",
    "  two\t\ttabs \n\n\n   three   \r\n x ",
)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LLAMA = dict(
    num_layers=3, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, mlp="swiglu", mlp_dim=96,
    seq_len=64, vocab_size=ROWS, positions="rotary", norm="rmsnorm", bias=False, tied_head=True,
)  # fmt: skip
# Fields of a model of each architecture, and the metadata that stand for them.
SIZES = {"block_count": 3, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
         "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
         "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}  # fmt: skip
GEMMA = dict(mlp="geglu", norm_placement="sandwich", norm_offset=1.0, embed_multiplier=8.0)
GPT2 = dict(LLAMA, num_kv_heads=4, head_dim=16, mlp="gelu_tanh", positions="learned",
            norm="layernorm", bias=True)  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, SIZES),
    "qwen2": (LLAMA | dict(bias=True, bias_in="qkv"), SIZES),
    "qwen3": (LLAMA | dict(qk_norm=True), SIZES),
    "gemma2": (LLAMA | GEMMA | dict(windows=(7, 0), attention_softcap=5.0, logit_softcap=3.0),
               SIZES | {"attention.sliding_window": 7, "attn_logit_softcapping": 5.0,
                        "final_logit_softcapping": 3.0}),
    "gemma3": (LLAMA | GEMMA | dict(qk_norm=True, windows=(7, 7, 0), rotary_base=1e4, rotary=(
                   "", "", "base=1000000 scaling=linear factor=8")),
               SIZES | {"attention.sliding_window": 7, "attention.sliding_window_pattern": 3,
                        "rope.freq_base": 1e6, "rope.scaling.type": "linear",
                        "rope.scaling.factor": 8.0}),
    "gpt2": (GPT2, {name: value for name, value in SIZES.items()
                    if name not in ("attention.head_count_kv", "attention.key_length",
                                    "attention.layer_norm_rms_epsilon", "rope.freq_base")}
             | {"attention.layer_norm_epsilon": 1e-5}),
}  # fmt: skip
assert set(MODELS) == set(ARCHITECTURES)
BPE = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<end>", "<say>", *"abcdefgh", "Ġ", "ab", "Ġab", "<|im_start|>"],
    "tokenizer.ggml.token_type": [3, 4, *[1] * 11, 3], "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.merges": ["a b", "Ġ ab"],
}  # fmt: skip


def find_smollm2() -> Path:
    """Return the file of SmolLM2-135M-Instruct; skip the test where there is none."""
    if path := os.environ.get(VARIABLE):
        return Path(path)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nanojaxgpt" / "models" / NAME
    found = sorted(folder.glob("*.gguf"))
    if not found:
        pytest.skip(f"no GGUF file in {folder}; scripts/chat.sh fetches it, or {VARIABLE} names it")
    return found[0]


def write(path: Path, architecture: str, metadata: dict[str, Any], arrays: dict) -> Path:
    """Write a file; an array may come with its type."""
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, metadata)
    for name, array in arrays.items():
        numbers, kind = array if isinstance(array, tuple) else (array, None)
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_params(cfg: ModelConfig, seed: int = 0) -> Any:
    """Return parameters in which no norm and no bias is trivial, each a bfloat16 number."""
    tokens = np.zeros((1, 2), np.int32)
    shapes = jax.eval_shape(lambda: Transformer(cfg).init(jax.random.key(0), tokens))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(jax.numpy.bfloat16).astype(np.float32),
        shapes,
    )


def import_file(path: Path) -> tuple[Pretrained, Any]:
    """Return an opened file and its parameters, on one device."""
    source = open_file(path)
    return source, read_params(source, source.config, make_mesh({}, jax.devices()[:1]))


def assert_same(one: Any, other: Any, bound: float = 0.0) -> None:
    """Compare parameters; `bound` is relative to the largest of each."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(a).max()),
        one, other,
    )  # fmt: skip


@functools.cache
def arrays_of(architecture: str) -> dict[str, np.ndarray]:
    """Return the tensors of a small model."""
    cfg = small_model(**MODELS[architecture][0])
    return dict(write_tensors(slots(cfg, tensors(architecture)), random_params(cfg)))


def make(tmp_path: Path, architecture: str = "llama", drop: tuple[str, ...] = (), **more) -> Path:
    """Write a small model; `drop` are keys and tensors to leave out, `more` keys and arrays."""
    sizes, arrays = MODELS[architecture][1], arrays_of(architecture)
    metadata = {f"{architecture}.{name}": value for name, value in sizes.items()} | BPE
    metadata |= {name: value for name, value in more.items() if not name.endswith("weight")}
    arrays = arrays | {name: value for name, value in more.items() if name.endswith("weight")}
    kept = [
        {name: v for name, v in all_.items() if name not in drop} for all_ in (metadata, arrays)
    ]
    return write(tmp_path / "model.gguf", architecture, *kept)


@pytest.mark.parametrize("architecture", MODELS)
def test_an_architecture_is_read(tmp_path, architecture):
    source, params = import_file(make(tmp_path, architecture))
    wanted = small_model(**MODELS[architecture][0])
    for name in ("num_layers", "layers", "head_dim", "num_kv_heads", "mlp", "bias", "qk_norm",
                 "norm_eps", "norm_offset", "attention_scale", "attention_softcap",
                 "logit_softcap", "embed_multiplier", "tied_head", "vocab_size"):  # fmt: skip
        assert getattr(source.config, name) == getattr(wanted, name), name
    # Norms are stored as 1 + weight by Gemma, which rounds.
    assert_same(random_params(wanted), params, 1e-6 if "gemma" in architecture else 0)
    assert source.config.param_dtype == "float32"
    assert source.family == ARCHITECTURES[architecture]


def test_rows_of_q_and_k_lie_in_pairs(tmp_path):
    cfg = small_model(**LLAMA)
    arrays = dict(write_tensors(slots(cfg, tensors("llama")), random_params(cfg)))
    rows = np.stack([np.arange(32)] * 64, 1).astype(np.float32)
    _, params = import_file(make(tmp_path, **{"blk.0.attn_q.weight": rows}))
    assert params["layers"]["q_DNH"][0, 0, 1].tolist() == [8, 10, 12, 14, 9, 11, 13, 15]
    assert arrays["blk.0.attn_v.weight"].shape == (16, 64)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_our_file_comes_back(tmp_path, kind, tied):
    cfg = small_model(**(LLAMA | dict(tied_head=tied)))
    params, bpe = random_params(cfg), open_file(make(tmp_path)).tokenizer
    path = tmp_path / "new" / "ours.gguf"
    write_file(path, cfg, params, bpe, TEMPLATE, "Ours", kind)
    source, back = import_file(path)
    assert_same(params, back, {"F16": 1e-3, "Q8_0": 0.01}.get(kind, 0.0))
    assert essence(source.config) == essence(cfg)
    assert source.chat_template == TEMPLATE
    assert source.tokenizer.end_id == bpe.end_id == 0
    assert source.tokenizer.vocab_size == bpe.vocab_size == 14
    for text in ("ab ab<say>h", " abab 1"):
        assert source.tokenizer.encode(text).tolist() == bpe.encode(text).tolist()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(ConfigError, match="exists"):
        write_file(path, cfg, params, bpe, TEMPLATE, "Ours", kind)


@pytest.mark.parametrize(
    "entry",
    ["scaling=linear factor=4", "base=500000 scaling=llama3 factor=32 original=8192",
     "base=1000 scaling=yarn factor=4 original=32"],
)  # fmt: skip
def test_rotary_scalings_come_back(tmp_path, entry):
    fields = dict(rotary=(entry,), head_dim=64, seq_len=128)
    cfg = small_model(**(LLAMA | fields))
    path, bpe = tmp_path / "ours.gguf", open_file(make(tmp_path)).tokenizer
    write_file(path, cfg, random_params(cfg), bpe, "", "Ours", "F32")
    assert open_file(path).config.layers == cfg.layers


def test_what_can_not_be_written(tmp_path):
    cfg = small_model(**LLAMA)
    bpe, path = open_file(make(tmp_path)).tokenizer, tmp_path / "ours.gguf"
    params = random_params(cfg)

    def attempt(kind: str = "F16", tokenizer: Any = bpe, params: Any = params, **fields) -> None:
        changed = dataclasses.replace(cfg, **fields)
        write_file(path, changed, params, tokenizer, "", "", kind)

    with pytest.raises(ConfigError, match="Q4_K"):
        attempt("Q4_K")
    with pytest.raises(ConfigError, match="llama can't express"):
        attempt(qk_norm=True)
    with pytest.raises(ConfigError, match="YaRN"):
        attempt(rotary=("scaling=yarn factor=4 original=32 truncate=0",))
    with pytest.raises(ConfigError, match="kind bytes"):
        attempt(tokenizer=ByteTokenizer())
    large = params | {"embed_VD": params["embed_VD"] + 1e6}
    with pytest.raises(CheckpointError, match=r"token_embd.weight .* F16"):
        attempt(params=large)
    assert not path.exists()


PROBLEMS = {
    "mamba": (ConfigError, "general.architecture", "'mamba' is not supported, only llama, qwen2"),
    "experts": (ConfigError, {"llama.expert_count": 8}, "llama.expert_count=8"),
    "unknown key": (ConfigError, {"llama.logit_scale": 2.0}, "logit_scale .2.0. is not known"),
    "per layer": (ConfigError, {"llama.feed_forward_length": [96, 96, 64]}, "differs from layer"),
    "partial": (ConfigError, {"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
    "scaling": (ConfigError, {"llama.rope.scaling.type": "longrope"}, "'longrope' is not"),
    "adapter": (ConfigError, {"general.type": "adapter"}, "'adapter'"),
    "split": (ConfigError, {"split.count": 3}, "one of 3 parts"),
    "text": (ConfigError, {"llama.block_count": "3"}, "block_count='3' is not a number"),
    "frequencies": (ConfigError, {"rope_freqs.weight": np.full(4, 3, np.float32)}, "Llama 3"),
    "extra": (CheckpointError, {"blk.3.attn_q.weight": np.zeros((32, 64), np.float32)},
              "no place for blk.3.attn_q.weight"),
    "shape": (CheckpointError, {"blk.1.ffn_up.weight": np.zeros((96, 32), np.float32)},
              r"blk.1.ffn_up.weight has the shape \[96, 32\], .* \[96, 64\]"),
    "integers": (CheckpointError, {"blk.1.ffn_up.weight": np.zeros((96, 64), np.int32)},
                 "blk.1.ffn_up.weight: numbers of the type I32 can't be read"),
    "pre": (DataError, {"tokenizer.ggml.pre": "tekken"}, "pre='tekken' is not supported, only gpt"),
    "model": (DataError, {"tokenizer.ggml.model": "t5"}, "'t5' is not supported, only gpt2, llama"),
    "twice": (DataError, {"tokenizer.ggml.tokens": ["a", "a", *"bcdefghijklm"]}, "are both 'a'"),
    "eos": (DataError, {"tokenizer.ggml.eos_token_id": 99}, "eos_token_id=99"),
    "types": (DataError, {"tokenizer.ggml.token_type": [1, 1]}, r"14 tokens, types \[1, 1\]"),
    "template": (DataError, {"tokenizer.chat_template": "x" * 70000}, "70,000 bytes"),
    "merge": (DataError, {"tokenizer.ggml.merges": ["a z"]}, "can't be read as a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_refused(tmp_path, name):
    error, change, text = PROBLEMS[name]
    if isinstance(change, str):
        path = write(tmp_path / "model.gguf", "mamba", {}, {"x": np.zeros(3, np.float32)})
    else:
        path = make(tmp_path, **change)
    with pytest.raises(error, match=text) as caught:
        open_file(path)
    assert str(path) in str(caught.value)


def test_what_is_missing(tmp_path, monkeypatch):
    for name in ("llama.context_length", "blk.2.ffn_down.weight", "token_embd.weight",
                 "tokenizer.ggml.pre"):  # fmt: skip
        with pytest.raises(UserError, match=name):
            open_file(make(tmp_path, drop=(name,)))
    path = make(tmp_path)
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nanojaxgpt\[gguf\]'"):
        open_file(path)


def test_llama_cpp_takes_the_defaults_that_a_file_leaves_out(tmp_path):
    drop = tuple(f"llama.{name}" for name in ("attention.key_length", "attention.head_count_kv",
                                              "rope.freq_base"))  # fmt: skip
    cfg = small_model(**(LLAMA | dict(num_kv_heads=4, head_dim=16)))
    arrays = dict(write_tensors(slots(cfg, tensors("llama")), random_params(cfg)))
    source = open_file(make(tmp_path, drop=drop, **arrays))
    assert (source.config.head_dim, source.config.num_kv_heads) == (16, 4)
    assert source.config.rotary_base == 1e4


def test_sizes_of_gemma_whose_scores_have_another_scale(tmp_path):
    fields, sizes = MODELS["gemma2"]
    cfg = small_model(**(fields | dict(num_layers=46)))
    arrays = dict(write_tensors(slots(cfg, tensors("gemma2")), random_params(cfg)))
    source = open_file(make(tmp_path, "gemma2", **arrays, **{"gemma2.block_count": 46}))
    assert source.config.attention_scale == 16**-0.5  # and not of heads of 8


def test_a_file_that_was_cut_off_is_damaged(tmp_path):
    path = make(tmp_path)
    content = path.read_bytes()
    for size in [*range(0, 3000, 97), len(content) // 2, len(content) - 64]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"damaged or cut off|not a GGUF|can't read"):
            open_file(path)


def test_changed_bytes_never_crash(tmp_path):
    path, rng = make(tmp_path), np.random.default_rng(0)
    content = path.read_bytes()
    header = content.index(b"blk.2.ffn_down.weight") + 64
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(header)] = rng.integers(256)
        path.write_bytes(changed)
        try:
            open_file(path)
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_wrong_values_never_crash(tmp_path, model):
    more = {"tokenizer.ggml.scores": [0.0] * 14, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.model": model,
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
            "llama.rope.scaling.original_context_length": 32, "split.count": 1,
            "tokenizer.chat_template": TEMPLATE, "llama.rope.dimension_count": 8}  # fmt: skip
    values: list[Any] = ["", "x", 0, 1, 2**31, -1.5, 1e30, float("nan"), True, [1, 2], ["x"], [0.5]]
    for name in [*more, *(f"llama.{name}" for name in SIZES), *BPE]:
        for value in values if model == "gpt2" or "token" in name else []:
            try:
                open_file(make(tmp_path, **more | {name: value}))
            except UserError as error:
                named = str(tmp_path) in str(error)
                assert named, (name, value)


def test_numbers_that_are_not_finite_are_named(tmp_path):
    array = np.full((96, 64), np.nan, np.float32)
    source = open_file(make(tmp_path, **{"blk.1.ffn_up.weight": array}))
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        read_params(source, source.config, make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantized_tensors_are_read(tmp_path, kind):
    array = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    found = gguf.GGMLQuantizationType[kind]
    packed = gguf.quantize(array, found)
    path = make(tmp_path, **{"blk.1.ffn_up.weight": (packed, found)})
    _, params = import_file(path)
    wanted = gguf.dequantize(packed, found)
    assert np.array_equal(params["layers"]["up_DF"][1], wanted.T)
    assert np.abs(wanted - array).max() < 0.5


def test_bpe(tmp_path):
    more = {"tokenizer.ggml.bos_token_id": 13, "tokenizer.ggml.eot_token_id": 13,
            "tokenizer.ggml.add_bos_token": True, "general.sampling.temp": 0.5}  # fmt: skip
    source = open_file(make(tmp_path, **more))
    tokenizer = source.tokenizer
    assert (tokenizer.end_id, tokenizer.start_id, tokenizer.vocab_size) == (0, 13, 14)
    assert source.sample == dict(end_ids=(13,), temperature=0.5)
    assert tokenizer.encode("ab<say> ab").tolist() == [11, 1, 12]
    assert tokenizer.decode([11, 1, 12, 0]) == "ab<say> ab"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("ab<say> ab").tolist() == [11, 1, 12]
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.first_id == 13  # those who read the tokenizer.json find it too


def test_tokens_without_a_use_are_left_out(tmp_path):
    tokens = [*BPE["tokenizer.ggml.tokens"], "[PAD14]", "[PAD15]"]
    kinds = [*BPE["tokenizer.ggml.token_type"], 5, 5]
    more = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    assert open_file(make(tmp_path, **more)).tokenizer.vocab_size == 14


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_the_name_of_a_split_is_written_again(tmp_path, pre):
    tokenizer = open_file(make(tmp_path, **{"tokenizer.ggml.pre": pre})).tokenizer
    keys = write_vocabulary(tokenizer, ROWS)
    assert keys["pre"] == pre
    assert keys["tokens"][:14] == BPE["tokenizer.ggml.tokens"]
    assert keys["token_type"] == [*BPE["tokenizer.ggml.token_type"], *[5] * (ROWS - 14)]
    assert keys["merges"] == BPE["tokenizer.ggml.merges"]
    content = json.loads(tokenizer.files["huggingface.json"])
    content["pre_tokenizer"] = dict(type="Whitespace")
    other = JsonTokenizer("hf", {"huggingface.json": json.dumps(content).encode()}, "")
    with pytest.raises(ConfigError, match="has no name"):
        write_vocabulary(other, ROWS)


def sentencepiece_keys(known: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the metadata of a SentencePiece model."""
    pieces, kinds = known.pieces(), [1] * known.vocab_size
    unknown, *control = known.special()
    for number in control:
        kinds[number] = 3
    kinds[unknown] = 2
    for number, (piece, _) in enumerate(pieces):
        if piece.startswith("<0x"):
            kinds[number] = 6
    found = dict(model="llama", tokens=[piece for piece, _ in pieces], token_type=kinds,
                 scores=[score for _, score in pieces], eos_token_id=known.end_id,
                 bos_token_id=known.first_id, add_space_prefix=False)  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in found.items() if value != -1}


def test_sentencepiece(tmp_path):
    model = train_sentencepiece(["ab abc abcd 1234 the the then Größe " * 20], 300, "bpe")
    known = SentencePieceTokenizer(model, "")
    more = sentencepiece_keys(known)
    rows = np.zeros((known.vocab_size, 64), np.float32)
    drop = ("tokenizer.ggml.pre", "tokenizer.ggml.merges")
    source = open_file(make(tmp_path, drop=drop, **more, **{"token_embd.weight": rows}))
    found = source.tokenizer
    assert (found.end_id, found.start_id) == (known.end_id, known.first_id)
    for text in TEXTS:
        assert found.encode(text).tolist() == known.encode(text).tolist()
        assert found.decode(found.encode(text)) == text
    assert isinstance(found, SentencePieceTokenizer)
    assert found.pieces() == known.pieces()
    more["tokenizer.ggml.add_space_prefix"] = True
    source = open_file(make(tmp_path, drop=drop, **more, **{"token_embd.weight": rows}))
    assert source.tokenizer.encode("the").tolist() == known.encode(" the").tolist()
