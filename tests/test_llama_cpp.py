"""GGUF files against llama.cpp, by the package xllamacpp: the same tokens and likelihoods."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_tokens
from test_families import their_model
from test_gguf import BPE, TEMPLATE, TEXTS, import_file, random_params, sentencepiece_keys, write
from test_gguf_oracle import (
    GGUF_CASES,
    byte_level_keys,
    find_smollm2,
    llama_cpp_metadata,
    llama_cpp_tensors,
    small_file,
)
from test_huggingface import our_logits

from nanojaxgpt.data.subwords import train_sentencepiece
from nanojaxgpt.data.tokenizers import SentencePieceTokenizer
from nanojaxgpt.interchange.gguf_file import open_file
from nanojaxgpt.interchange.gguf_tokenizer import SPLITTINGS
from nanojaxgpt.interchange.gguf_write import write_file

xllamacpp = pytest.importorskip("xllamacpp", reason="the oracle is llama.cpp, in xllamacpp")
pytestmark = pytest.mark.slow

ROWS = 31  # of the table of a case
# YaRN's beta_fast and beta_slow are in the file, but it takes 32 and 1.
CASES = [name for name in GGUF_CASES if name != "llama_yarn"]


def serve(path: Path) -> Any:
    """Return llama.cpp with a file, all in float32."""
    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.n_gpu_layers, how.n_parallel = str(path), 512, 0, 1
    how.warmup, how.verbosity = False, 0
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(how)


def tokenize(server: Any, text: str) -> list[int]:
    """Return the ids of a text."""
    content = dict(content=text, add_special=False, parse_special=False)
    address = f"{server.listening_address}/tokenize"
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def difference(server: Any, logits_V: np.ndarray, ids: list[int]) -> float:
    """Return by how much its log-probabilities of the next token differ from ours, at most."""
    answer = server.handle_completions(
        dict(prompt=ids, n_predict=1, temperature=0, n_probs=ROWS, cache_prompt=False)
    )
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ours_V = logits_V - np.logaddexp.reduce(logits_V.astype(np.float64))
    return max(abs(one["logprob"] - ours_V[one["id"]]) for one in top if one["logprob"] > -50)


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_gives_the_same_likelihoods(tmp_path, name):
    case = GGUF_CASES[name]
    model, architecture = their_model(case), case.kind.removesuffix("_text")
    tokens = BPE["tokenizer.ggml.tokens"]
    unused = [f"[PAD{number}]" for number in range(len(tokens), ROWS)]
    keys = BPE | {"tokenizer.ggml.tokens": tokens + unused, "tokenizer.ggml.token_type":
                  BPE["tokenizer.ggml.token_type"] + [5] * len(unused)}  # fmt: skip
    path = write(tmp_path / "model.gguf", architecture,
                 llama_cpp_metadata(model.config, architecture) | keys,
                 llama_cpp_tensors(model, architecture))  # fmt: skip
    source, params = import_file(path)
    ids = random_tokens(1, case.length)
    logits_V = our_logits(source, params, ids)[0, -1]
    # Its GELU is a table of float16.
    bound = 1e-2 if architecture in ("gpt2", "gemma2", "gemma3") else 1e-4
    assert difference(serve(path), logits_V, ids[0].tolist()) < bound


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_texts_have_the_same_tokens(tmp_path, pre):
    path = small_file(tmp_path, byte_level_keys(pre))
    ours, server = open_file(path).tokenizer, serve(path)
    for text in [*TEXTS, "the 1234 the\n\n  it's 12 THE'S über"]:
        assert ours.encode(text).tolist() == tokenize(server, text)


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_has_the_same_tokens(tmp_path, prefix):
    model = train_sentencepiece(["ab abc abcd 1234 the the then Größe " * 20], 300, "bpe")
    keys = sentencepiece_keys(SentencePieceTokenizer(model, ""))
    path = small_file(tmp_path, keys | {"tokenizer.ggml.add_space_prefix": prefix})
    ours, server = open_file(path).tokenizer, serve(path)
    for text in TEXTS:
        assert ours.encode(text).tolist() == tokenize(server, text)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0"])
def test_it_runs_our_file(tmp_path, kind):
    known, _ = import_file(small_file(tmp_path, byte_level_keys("gpt-2")))
    params, path = random_params(known.config), tmp_path / "ours.gguf"
    write_file(path, known.config, params, known.tokenizer, TEMPLATE, "Ours", kind)
    server, ids = serve(path), random_tokens(1, 40)
    logits_V = our_logits(known, params, ids)[0, -1]
    assert difference(server, logits_V, ids[0].tolist()) < (1e-4 if kind == "F32" else 1)
    for text in TEXTS:
        assert known.tokenizer.encode(text).tolist() == tokenize(server, text)


def test_smollm2(tmp_path):
    source, params = import_file(find_smollm2())
    path, ids = tmp_path / "ours.gguf", source.tokenizer.encode(TEXTS[0] * 2)
    write_file(path, source.config, params, source.tokenizer, source.chat_template, "", "F32")
    server = serve(path)
    assert difference(server, our_logits(source, params, ids[None])[0, -1], ids.tolist()) < 1e-3
    for text in TEXTS:
        assert source.tokenizer.encode(text).tolist() == tokenize(server, text)
    question = dict(role="user", content="What is the capital of France?")
    answer = server.handle_chat_completions(dict(messages=[question], max_tokens=8, temperature=0))
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
