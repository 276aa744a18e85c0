"""GGUF files against transformers: the same file gives the same tokens, logits and texts.

The tiny models are written as llama.cpp's convert_hf_to_gguf.py does: names by the package's own
map; for llama the rows of q and k in pairs, and Llama 3's divisors as a tensor; Gemma's norms as
1 + weight; GPT-2's matrices transposed to [out, in]; vectors and all else as they are.
"""

import copy
import math
import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
from conftest import random_tokens
from test_families import CASES, FULL, SLIDING, Case, rope, their_model, torch, transformers
from test_gguf import (
    BPE,
    TEMPLATE,
    TEXTS,
    assert_same,
    find_smollm2,
    gguf,
    import_file,
    random_params,
    sentencepiece_keys,
    write,
)
from test_huggingface import our_logits, their_logits

from nanojaxgpt.config.rotary import Rotary
from nanojaxgpt.data.subwords import train_sentencepiece
from nanojaxgpt.data.tokenizer_json import BYTE_OF
from nanojaxgpt.data.tokenizers import SentencePieceTokenizer
from nanojaxgpt.interchange.gguf_file import open_file
from nanojaxgpt.interchange.gguf_write import write_file
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import Sampling, generate

pytestmark = pytest.mark.slow

LENGTH, NEW, BOUND = 300, 60, 1e-4


class Loaded(NamedTuple):
    """The same file, opened here and by transformers."""

    path: Path
    theirs: Any
    their_tokenizer: Any
    source: Pretrained
    params: Any


def load_theirs(path: Path, **options: Any) -> Any:
    """Return what transformers makes of a file, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager",
        **options,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    path = find_smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Loaded(path, load_theirs(path), tokenizer, *import_file(path))


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_has_the_same_tokens(smollm2, text):
    text = text.replace("½", "")
    ours = smollm2.source.tokenizer.encode(text)
    assert ours.tolist() == smollm2.their_tokenizer(text, add_special_tokens=False).input_ids
    assert smollm2.source.tokenizer.decode(ours) == text


def test_smollm2_splits_digits_as_its_own_tokenizer_does(smollm2):
    # transformers reads "smollm" as GPT-2's split. The published tokenizer.json has this one, as
    # has llama.cpp, where the fraction too is a digit.
    theirs = copy.deepcopy(smollm2.their_tokenizer.backend_tokenizer)
    steps = tokenizers.pre_tokenizers
    digits, by_bytes = steps.Digits(True), steps.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = steps.Sequence([digits, by_bytes])
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert smollm2.source.tokenizer.encode(text).tolist() == ids


def test_smollm2_has_the_same_template_and_end(smollm2):
    assert smollm2.source.chat_template == smollm2.their_tokenizer.chat_template
    assert smollm2.source.tokenizer.end_id == smollm2.their_tokenizer.eos_token_id
    assert smollm2.source.tokenizer.start_id == -1  # add_bos_token is false


def code_tokens(smollm2: Loaded, length: int) -> np.ndarray:
    """Return the first tokens of a text, [1, T]."""
    text = Path(os.__file__).read_text()
    return smollm2.source.tokenizer.encode(text)[None, :length]


def test_smollm2_has_the_same_logits_and_perplexity(smollm2):
    tokens_1T = code_tokens(smollm2, LENGTH)
    theirs_1TV = their_logits(smollm2.theirs, tokens_1T)
    ours_1TV = our_logits(smollm2.source, smollm2.params, tokens_1T)
    assert np.abs(ours_1TV - theirs_1TV).max() < 1e-3

    def perplexity(logits_1TV: np.ndarray) -> float:
        logits_TV = logits_1TV[0, :-1].astype(np.float64)
        norm_T = np.log(np.exp(logits_TV).sum(-1))
        chosen_T = np.take_along_axis(logits_TV, tokens_1T[0, 1:, None], -1)[:, 0]
        return math.exp(np.mean(norm_T - chosen_T))

    ours, theirs = perplexity(ours_1TV), perplexity(theirs_1TV)
    assert abs(ours / theirs - 1) < 1e-4
    assert ours < 20


def test_smollm2_says_the_same(smollm2):
    messages = [dict(role="user", content="What is the capital of France? Tell me about it.")]
    text = smollm2.their_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = smollm2.their_tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        theirs = smollm2.theirs.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1,
            pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
    how = Sampling(0.0, vocab_size=smollm2.source.tokenizer.vocab_size)
    ours = generate(
        Transformer(smollm2.source.config), smollm2.params, np.array([ids]),
        np.array([len(ids)]), jax.random.key(0), max_tokens=NEW, how=how,
    )[0].tolist()  # fmt: skip
    assert ours == theirs
    assert "Paris" in smollm2.source.tokenizer.decode(ours)


LLAMA3 = rope("llama3", 5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)  # fmt: skip
GGUF_CASES = {
    "gpt2": Case("gpt2", dict(n_positions=1024), base=CASES["gpt2"].base),
    "llama": CASES["llama"],
    "llama3": Case("llama", dict(head_dim=64, max_position_embeddings=2**17,
                                 rope_parameters=LLAMA3)),
    "llama_biases": CASES["llama_biases"],
    "llama_yarn": Case("llama", dict(rope_parameters=rope(
                           "yarn", factor=4.0, original_max_position_embeddings=16,
                           beta_fast=4.0, beta_slow=0.25))),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3", dict(head_dim=24, tie_word_embeddings=True)),
    "gemma2": Case("gemma2", dict(num_hidden_layers=3, head_dim=24, query_pre_attn_scalar=24,
                                  sliding_window=7)),
    "gemma3": Case("gemma3_text", dict(
                       num_hidden_layers=7, head_dim=24, query_pre_attn_scalar=24,
                       sliding_window=7, rope_parameters={
                           SLIDING: rope(), FULL: rope("linear", 1e6, factor=8.0)})),
}  # fmt: skip


def llama_cpp_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """Return the keys of the architecture, as the converter of llama.cpp writes them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(FULL, parameters)
    hidden = getattr(config, "intermediate_size", None) or config.n_inner
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "context_length": config.max_position_embeddings, "feed_forward_length": hidden,
        "attention.head_count": config.num_attention_heads, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if architecture == "gpt2":
        keys["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        keys |= {"attention.head_count_kv": config.num_key_value_heads,
                 "attention.key_length": head_dim, "attention.value_length": head_dim,
                 "rope.dimension_count": head_dim, "rope.freq_base": parameters["rope_theta"],
                 "attention.layer_norm_rms_epsilon": config.rms_norm_eps}  # fmt: skip
    if parameters.get("rope_type") in ("linear", "yarn"):
        keys |= {"rope.scaling.type": parameters["rope_type"],
                 "rope.scaling.factor": parameters["factor"]}  # fmt: skip
    if parameters.get("rope_type") == "yarn":
        original = parameters["original_max_position_embeddings"]
        keys |= {"rope.scaling.original_context_length": original,
                 "rope.scaling.yarn_beta_fast": parameters["beta_fast"],
                 "rope.scaling.yarn_beta_slow": parameters["beta_slow"]}  # fmt: skip
    if architecture.startswith("gemma"):
        keys["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        keys |= {"attn_logit_softcapping": config.attn_logit_softcapping,
                 "final_logit_softcapping": config.final_logit_softcapping}  # fmt: skip
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def llama_cpp_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """Return the tensors of a model, as the converter of llama.cpp writes them."""
    config, found = model.config, dict[str, np.ndarray]()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array, (base, suffix) = tensor.numpy(), name.rsplit(".", 1)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            key = "num_attention_heads" if base.endswith("q_proj") else "num_key_value_heads"
            heads, shape = getattr(config, key), array.shape
            array = array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
            array = array.swapaxes(1, 2).reshape(shape)
        if architecture.startswith("gemma") and base.endswith("norm"):
            array = array + 1
        if architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        found[f"{names.get_name(base)}.{suffix}"] = np.ascontiguousarray(array)
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama_cpp_divisors(parameters, config.head_dim)
    return found


def llama_cpp_divisors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return what llama.cpp divides the frequencies of Llama 3 by."""
    factors = []
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    for index in range(0, head_dim, 2):
        wave = 2 * math.pi * parameters["rope_theta"] ** (index / head_dim)
        smooth = (original / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / parameters["factor"] + smooth)
        short, long = wave < original / high, wave > original / low
        factors.append(1.0 if short else parameters["factor"] if long else middle)
    return np.array(factors, np.float32)


@pytest.mark.parametrize("name", GGUF_CASES)
def test_an_architecture_gives_the_same_logits(tmp_path, name):
    case = GGUF_CASES[name]
    model, architecture = their_model(case), case.kind.removesuffix("_text")
    metadata = llama_cpp_metadata(model.config, architecture) | BPE
    path = write(tmp_path / "model.gguf", architecture, metadata,
                 llama_cpp_tensors(model, architecture))  # fmt: skip
    source, params = import_file(path)
    tokens_BT = random_tokens(2, case.length)
    ours_BTV = our_logits(source, params, tokens_BT)
    bound = BOUND * np.abs(ours_BTV).max()
    assert np.abs(ours_BTV - their_logits(model, tokens_BT)).max() < bound
    # What it reads of the metadata itself lacks head_dim, windows or scalings of some families.
    read = load_theirs(path, config=model.config)
    assert np.abs(ours_BTV - their_logits(read, tokens_BT)).max() < bound
    if name == "llama3":
        assert source.config.layer(0).rotary == Rotary(5e5, 1.0, "llama3", 32.0, 8192.0)


MERGES = ["t h", "Ġ t", "Ġt h", "Ġth e", "1 2", "3 4", "12 34", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ã ¼", "' s"]


def byte_level_keys(pre: str) -> dict[str, Any]:
    """Return the metadata of a small byte-level vocabulary."""
    alphabet = sorted(BYTE_OF)
    tokens = ["<|endoftext|>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [3] + [1] * (len(tokens) - 1)
    return BPE | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": MERGES,
                  "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.pre": pre}  # fmt: skip


def small_file(tmp_path: Path, keys: dict[str, Any]) -> Path:
    """Write a small model with a tokenizer."""
    rows = len(keys["tokenizer.ggml.tokens"])
    model = their_model(Case("llama"), vocab_size=rows)
    metadata = llama_cpp_metadata(model.config, "llama") | keys
    return write(tmp_path / "model.gguf", "llama", metadata, llama_cpp_tensors(model, "llama"))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_texts_are_split_as_by_transformers(tmp_path, pre):
    path = small_file(tmp_path, byte_level_keys(pre))
    ours = open_file(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # As Llama 3's own tokenizer.json says it, and llama.cpp does it.
    theirs.backend_tokenizer.model.ignore_merges = pre == "llama-bpe"
    for text in [*TEXTS, "the 1234 the\n\n  it's 12 THE'S über"]:
        composed = unicodedata.normalize("NFC", text)
        ids = ours.encode(text).tolist()
        assert ids == theirs(composed, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == composed


def test_qwen2_composes_characters_as_its_own_tokenizer_does(tmp_path):
    keys = byte_level_keys("qwen2")
    ours = open_file(small_file(tmp_path, keys)).tokenizer
    ids = {token: number for number, token in enumerate(keys["tokenizer.ggml.tokens"])}
    pairs = [tuple(merge.split()) for merge in MERGES]
    theirs = transformers.Qwen2Tokenizer(vocab=ids, merges=pairs)
    text = "Gru\u0308n the 1234"
    assert ours.encode(text).tolist() == theirs(text).input_ids
    assert ours.encode(text).tolist() != ours.encode("Gru\u0308n").tolist()


def test_sentencepiece_as_by_transformers(tmp_path):
    model = train_sentencepiece(["ab abc abcd 1234 the the then Größe " * 20], 300, "bpe")
    keys = sentencepiece_keys(SentencePieceTokenizer(model, ""))
    path = small_file(tmp_path, keys | {"tokenizer.ggml.add_space_prefix": True})
    ours = open_file(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        text = text.lstrip()  # before which it puts no space
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
def test_transformers_reads_our_file(tmp_path, kind):
    known, params = import_file(small_file(tmp_path, byte_level_keys("gpt-2")))
    params = random_params(known.config)
    path = tmp_path / "ours.gguf"
    write_file(path, known.config, params, known.tokenizer, TEMPLATE, "Ours", kind)
    source, back = import_file(path)
    assert_same(params, back, {"F16": 1e-3, "Q8_0": 0.01}.get(kind, 0.0))
    tokens_BT = random_tokens(2, 40)
    theirs_BTV = their_logits(load_theirs(path), tokens_BT)
    largest = np.abs(theirs_BTV).max()
    assert np.abs(our_logits(source, back, tokens_BT) - theirs_BTV).max() < BOUND * largest
    rounding = {"F16": 1e-2, "Q8_0": 0.1}.get(kind, BOUND)
    assert np.abs(our_logits(known, params, tokens_BT) - theirs_BTV).max() < rounding * largest
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs.chat_template == TEMPLATE
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert source.tokenizer.encode(text).tolist() == ids
