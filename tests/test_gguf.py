"""GGUF files: what transformers makes of the same file, our own round trip, damaged files."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import random_tokens, small_model

import nanojaxgpt
from nanojaxgpt.data.tokenizers import JsonTokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError
from nanojaxgpt.interchange.gguf_file import ARCHITECTURES, open_file
from nanojaxgpt.interchange.gguf_writer import write_file
from nanojaxgpt.interchange.loading import read_params
from nanojaxgpt.interchange.tensors import slots
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.sharding import make_mesh

gguf = pytest.importorskip("gguf", reason="it reads and writes the files")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanojaxgpt" / "models"
SHAPE = dict(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp="swiglu", mlp_dim=96,
             norm="rmsnorm", bias=False, positions="rotary", seq_len=64, vocab_size=300,
             norm_eps=1e-6)  # fmt: skip
GEMMA = SHAPE | dict(mlp="geglu", norm_placement="sandwich", norm_offset=1.0, embed_multiplier=8.0,
                     head_dim=32, attention_scale=32**-0.5, windows=(7, 0))  # fmt: skip
MODELS = {
    "llama": SHAPE | dict(tied_head=False),
    "qwen2": SHAPE | dict(bias=True, bias_in="qkv"),
    "qwen3": SHAPE | dict(head_dim=128, qk_norm=True),
    "gemma2": GEMMA | dict(attention_softcap=50.0, logit_softcap=30.0),
    "gpt2": SHAPE | dict(mlp="gelu_tanh", norm="layernorm", bias=True, positions="learned",
                         num_kv_heads=4, mlp_dim=256, seq_len=1024),
}  # fmt: skip


def byte_tokens() -> list[str]:
    """Return a vocabulary of bytes and a few merges, as a byte-level BPE has it."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [*alphabet, "Ġt", "he", "Ġthe", "<|end|>", *(f"<|{n}|>" for n in range(40))]


def random_params(cfg):
    """Return parameters of which none is trivial."""
    fresh = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [leaf + 0.2 * jax.random.normal(key, leaf.shape)
           for leaf, key in zip(leaves, keys, strict=True)]  # fmt: skip
    return jax.tree.unflatten(tree, new)


def write_model(path, name, cfg, params, change=lambda writer: None, **settings):
    """Write a file as llama.cpp's converter does: its names for shapes, our table for tensors."""
    how = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(path, settings.get("architecture", name))
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.seq_len)
    writer.add_embedding_length(cfg.embed_dim)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.num_heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(cfg.norm_eps)
    else:
        writer.add_head_count_kv(cfg.num_kv_heads)
        writer.add_layer_norm_rms_eps(cfg.norm_eps)
        writer.add_rope_freq_base(1e4)
        writer.add_key_length(cfg.head_dim)
        writer.add_value_length(cfg.head_dim)
    if name.startswith("gemma"):
        writer.add_sliding_window(7)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    tokens = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    change(writer)
    from nanojaxgpt.interchange.loading import write_tensors

    for tensor, array in write_tensors(slots(cfg, how.tensors), params):
        if tensor not in settings.get("without", ()):
            writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def our_logits(path, ids_BT):
    source = open_file(path)
    params = read_params(source, source.config, make_mesh({}, jax.devices()[:1]))
    return source, np.asarray(Transformer(source.config).apply({"params": params}, ids_BT)[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_was_written(name, tmp_path):
    cfg = small_model(**MODELS[name])
    params, ids_BT = random_params(cfg), random_tokens(1, 40, vocab_size=300)
    wanted = np.asarray(Transformer(cfg).apply({"params": params}, ids_BT)[0])
    source, found = our_logits(write_model(tmp_path / "m.gguf", name, cfg, params), ids_BT)
    assert source.family == ARCHITECTURES[name].model_type
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert source.tokenizer.encode("the the").tolist()[-1] == byte_tokens().index("Ġthe")
    assert source.tokenizer.end_id == byte_tokens().index("<|end|>")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle is transformers, in torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to read a GGUF file")
    cfg = small_model(**MODELS[name])
    write_model(tmp_path / "m.gguf", name, cfg, random_params(cfg))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if name == "gemma2":  # which the metadata does not say; llama.cpp takes the size of a head
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 32**-0.5
    ids_BT = random_tokens(1, 40, vocab_size=300)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids_BT, dtype=torch.long)).logits.numpy()
    _, found = our_logits(tmp_path / "m.gguf", ids_BT)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0), ("bfloat16", 0.02), ("q8_0", 0.06)])
def test_what_is_exported_comes_back(dtype, bound, tmp_path):
    cfg = small_model(**MODELS["llama"], rotary=("scaling=llama3 factor=8 original=8192",))
    params, ids_BT = random_params(cfg), random_tokens(1, 40, vocab_size=300)
    source, _ = our_logits(
        write_model(tmp_path / "m.gguf", "llama", cfg, random_params(cfg)), ids_BT
    )
    wanted = np.asarray(Transformer(cfg).apply({"params": params}, ids_BT)[0])
    write_file(tmp_path / "out.gguf", cfg, params, source.tokenizer, "{{ 1 }}", "test", dtype)
    back, found = our_logits(tmp_path / "out.gguf", ids_BT)
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()
    assert back.config.layers == cfg.layers
    assert back.chat_template == "{{ 1 }}"
    text = "the end, thé <|end|> 你好"
    assert isinstance(back.tokenizer, JsonTokenizer)
    assert back.tokenizer.encode(text).tolist() == source.tokenizer.encode(text).tolist()
    assert not list(tmp_path.glob(".*"))


def test_what_llama_can_not_say_is_refused(tmp_path):
    cfg = small_model(**MODELS["qwen3"])
    with pytest.raises(ConfigError, match=r"llama can't express this model: .*qk_norm"):
        write_file(tmp_path / "o.gguf", cfg, random_params(cfg), None, "", "x", "float32")
    assert not list(tmp_path.iterdir())


WRONG = {
    "architecture": (dict(architecture="mamba"), ConfigError, "'mamba' is not supported; supp"),
    "missing": (dict(without=("blk.1.ffn_up.weight",)), CheckpointError, "lacks blk.1.ffn_up"),
    "pre": (dict(pre="tekken"), DataError, "pre='tekken' is not supported"),
    "unknown": (dict(change=lambda w: w.add_tensor("blk.0.more", np.ones(4, np.float32))),
                CheckpointError, "no place for blk.0.more"),
    "experts": (dict(change=lambda w: w.add_expert_count(8)), ConfigError, "expert_count"),
    "factors": (dict(change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))),
                ConfigError, "not those of Llama"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_can_not_be_expressed_is_refused(case, tmp_path):
    settings, kind, said = WRONG[case]
    cfg = small_model(**MODELS["llama"])
    path = write_model(tmp_path / "m.gguf", "llama", cfg, random_params(cfg), **settings)
    with pytest.raises(kind, match=said) as error:
        open_file(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    cfg = small_model(**MODELS["llama"])
    path = write_model(tmp_path / "m.gguf", "llama", cfg, random_params(cfg))
    content = path.read_bytes()
    for size in (0, 3, 100, len(content) // 2, len(content) - 4):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf is damaged or cut off"):
            open_file(path)


def real_file() -> Path:
    """Return SmolLM2-135M-Instruct, as scripts/chat.sh fetches it; skip without it."""
    given = os.environ.get("NANOJAXGPT_SMOLLM2")
    found = [Path(given)] if given else sorted(CACHE.glob("smollm2-135m-instruct/*.gguf"))
    if not found:
        pytest.skip("SmolLM2 is not there: run scripts/chat.sh, or set NANOJAXGPT_SMOLLM2")
    return found[0]


# No number that is not a digit, such as a half: the model's own tokenizer cuts before it, as ours
# and llama.cpp's do, but not the one that transformers makes of the file.
TEXTS = (
    "def area(radius):\n    return 3.14159 * radius ** 2  # m²\n",
    "Größenwahn kostet 1234567 Äpfel; naïve Übung über Straßen.",
    "你好 世界 🙂 — half of 10,000?",
    "  two  spaces\t\ttabs\n\n\n   and an end   ",
)


@pytest.mark.slow
def test_smollm2_is_the_one_of_transformers():
    path = real_file()
    torch = pytest.importorskip("torch", reason="the oracle is transformers, in torch")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to read a GGUF file")
    model = nanojaxgpt.load(path)
    read = dict(gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **read)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **read, dtype=torch.float32
    ).eval()
    for text in TEXTS:
        assert model.tokenizer.encode(text).tolist() == tokenizer(text)["input_ids"]
        assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    ids_BT = model.tokenizer.encode(" ".join(TEXTS) * 4)[None, :300]
    assert ids_BT.shape == (1, 300)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids_BT, dtype=torch.long)).logits.numpy()
    found = model.logits(ids_BT)
    assert np.abs(found - wanted).max() < 1e-3

    def perplexity(logits_BTV) -> float:
        losses = torch.nn.functional.cross_entropy(
            torch.tensor(logits_BTV[0, :-1]), torch.tensor(ids_BT[0, 1:], dtype=torch.long)
        )
        return float(torch.exp(losses))

    assert perplexity(found) == pytest.approx(perplexity(wanted), rel=1e-4)
    talk = [{"role": "user", "content": "Name three colours of autumn, and say why."}]
    ids = model.template.encode(talk)
    assert ids == tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    drawn = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=60,
        do_sample=False, eos_token_id=[],
    )  # fmt: skip
    expected = model.tokenizer.decode(drawn[0, len(ids) :].numpy())
    from nanojaxgpt.sample import Sampling
    from nanojaxgpt.session import Session

    new = [i for part in Session(model).draw(ids, 60, Sampling(temperature=0.0)) for i in part]
    assert model.tokenizer.decode(new) == expected
