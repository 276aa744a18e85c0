"""Random models of transformers' families: the same weights give the same logits here."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from conftest import random_tokens, small_model

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Parameter, layer_rows, model_rows
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import read

torch = pytest.importorskip("torch", reason="the oracle is transformers, in torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
pytestmark = pytest.mark.slow

BOUND = 1e-5  # of the largest logit
LENGTH = 40  # of the prompt: more than WINDOW, and than ORIGINAL unless the case has its own
WINDOW, ORIGINAL = 7, 32

State = dict[str, np.ndarray]


def split(state: State, name: str, parts: dict[str, int]) -> State:
    """Return the tensors with the rows of `name` divided into `parts`, whose names replace it."""
    found, bounds = {}, np.cumsum(list(parts.values()))[:-1]
    for path, tensor in state.items():
        pieces = np.split(tensor, bounds) if f".{name}." in path else [tensor]
        for part, piece in zip(parts, pieces, strict=False):
            found[path.replace(f".{name}.", f".{part}.")] = piece
    return found


def of_gpt2(state: State) -> State:
    """Its matrices are [in, out]."""
    turned = {n: w.T if ".c_" in n and w.ndim == 2 else w for n, w in state.items()}
    return split(turned, "c_attn", dict(q_proj=64, k_proj=64, v_proj=64))


def of_gemma(state: State) -> State:
    """Its norms multiply by 1 + weight."""
    return {name: w + 1 if "norm" in name else w for name, w in state.items()}


def of_phi3(state: State) -> State:
    """Query, key and value are one matrix, gate and up another."""
    state = split(state, "qkv_proj", dict(q_proj=64, k_proj=32, v_proj=32))
    return split(state, "gate_up_proj", dict(gate_proj=48, up_proj=48))


def of_neox(state: State) -> State:
    """Query, key and value lie together for each head."""

    def sort(name: str, w: np.ndarray) -> np.ndarray:
        if "query_key_value" not in name:
            return w
        return w.reshape(4, 3, 16, -1).swapaxes(0, 1).reshape(192, -1)

    ordered = {name: sort(name, w) for name, w in state.items()}
    return split(ordered, "query_key_value", dict(q_proj=64, k_proj=64, v_proj=64))


NAMES = {
    "embed_VD": "model.embed_tokens.weight", "final_norm_scale": "model.norm.weight",
    "head_VD": "lm_head.weight", "head_bias": "lm_head.bias",
    "attention_norm_scale": "input_layernorm.weight",
    "mlp_norm_scale": "post_attention_layernorm.weight",
    "q_DNH": "self_attn.q_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k_DKH": "self_attn.k_proj.weight", "k_bias": "self_attn.k_proj.bias",
    "v_DKH": "self_attn.v_proj.weight", "v_bias": "self_attn.v_proj.bias",
    "o_NHD": "self_attn.o_proj.weight", "o_bias": "self_attn.o_proj.bias",
    "q_norm_scale": "self_attn.q_norm.weight", "k_norm_scale": "self_attn.k_norm.weight",
    "gate_DF": "mlp.gate_proj.weight", "up_DF": "mlp.up_proj.weight",
    "down_DF": "mlp.down_proj.weight",
}  # fmt: skip
OUTPUT = {
    "attention_output_norm_scale": "post_attention_layernorm.weight",
    "mlp_output_norm_scale": "post_feedforward_layernorm.weight",
}
SANDWICH = OUTPUT | {"mlp_norm_scale": "pre_feedforward_layernorm.weight"}
GPT2 = {
    "embed_VD": "transformer.wte.weight", "position_TD": "transformer.wpe.weight",
    "final_norm_scale": "transformer.ln_f.weight", "final_norm_bias": "transformer.ln_f.bias",
    "attention_norm_scale": "ln_1.weight", "attention_norm_bias": "ln_1.bias",
    "mlp_norm_scale": "ln_2.weight", "mlp_norm_bias": "ln_2.bias",
    "q_DNH": "attn.q_proj.weight", "q_bias": "attn.q_proj.bias",
    "k_DKH": "attn.k_proj.weight", "k_bias": "attn.k_proj.bias",
    "v_DKH": "attn.v_proj.weight", "v_bias": "attn.v_proj.bias",
    "o_NHD": "attn.c_proj.weight", "o_bias": "attn.c_proj.bias",
    "up_DF": "mlp.c_fc.weight", "up_bias": "mlp.c_fc.bias",
    "down_DF": "mlp.c_proj.weight", "down_bias": "mlp.c_proj.bias",
}  # fmt: skip
NEOX = {
    "embed_VD": "gpt_neox.embed_in.weight",
    "final_norm_scale": "gpt_neox.final_layer_norm.weight",
    "final_norm_bias": "gpt_neox.final_layer_norm.bias",
    "attention_norm_bias": "input_layernorm.bias", "mlp_norm_bias": "post_attention_layernorm.bias",
    "q_DNH": "attention.q_proj.weight", "q_bias": "attention.q_proj.bias",
    "k_DKH": "attention.k_proj.weight", "k_bias": "attention.k_proj.bias",
    "v_DKH": "attention.v_proj.weight", "v_bias": "attention.v_proj.bias",
    "o_NHD": "attention.dense.weight", "o_bias": "attention.dense.bias",
    "up_DF": "mlp.dense_h_to_4h.weight", "up_bias": "mlp.dense_h_to_4h.bias",
    "down_DF": "mlp.dense_4h_to_h.weight", "down_bias": "mlp.dense_4h_to_h.bias",
}  # fmt: skip
PHI = {
    "final_norm_scale": "model.final_layernorm.weight",
    "final_norm_bias": "model.final_layernorm.bias", "attention_norm_bias": "input_layernorm.bias",
    "o_NHD": "self_attn.dense.weight", "o_bias": "self_attn.dense.bias",
    "up_DF": "mlp.fc1.weight", "up_bias": "mlp.fc1.bias",
    "down_DF": "mlp.fc2.weight", "down_bias": "mlp.fc2.bias",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """A config of transformers, the fields of ours that say the same, and the weights' names."""

    kind: str  # model_type
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from THEIRS
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from OURS
    names: dict[str, str] = dataclasses.field(default_factory=dict)  # what differs from NAMES
    unify: Callable[[State], State] = lambda state: state  # to one matrix [out, in] a name
    layers: str = "model.layers"
    length: int = LENGTH


THEIRS = dict(
    vocab_size=31, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3, bos_token_id=0,
    eos_token_id=0, pad_token_id=0,
)  # fmt: skip
OURS = dict(
    num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=48, seq_len=64, vocab_size=31,
    positions="rotary", norm="rmsnorm", norm_eps=1e-3, bias=False, mlp="swiglu", tied_head=False,
    unroll=1,
)  # fmt: skip
# LayerNorms with biases around a plain MLP.
CLASSIC = dict(norm="layernorm", num_kv_heads=4, bias=True, mlp="gelu_tanh")
GEMMA = dict(
    head_dim=24, attention_scale=10**-0.5, embed_multiplier=8.0, mlp="geglu", tied_head=True,
    norm_placement="sandwich",
)  # fmt: skip
SHORT, LONG = [1.0, 1.1, 1.2, 1.5, 2.0, 2.5], [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]
LONGROPE = "fraction=0.75 scaling=longrope factor=2 original=32 short={} long={}".format(
    *(",".join(map(str, factors)) for factors in (SHORT, LONG))
)


def rope(kind: str = "default", base: float = 1e4, **more: Any) -> dict[str, Any]:
    """Return transformers' parameters of rotary positions."""
    return {"rope_type": kind, "rope_theta": base, **more}


def scaled(kind: str, base: float = 1e4, **more: Any) -> dict[str, Any]:
    """Return those of a context that became four times as long."""
    return rope(kind, base, factor=4.0, original_max_position_embeddings=ORIGINAL, **more)


PHI3 = dict(
    original_max_position_embeddings=ORIGINAL, sliding_window=WINDOW,
    rope_parameters=rope("longrope", short_factor=SHORT, long_factor=LONG,
                         partial_rotary_factor=0.75, original_max_position_embeddings=ORIGINAL),
)  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
FAMILIES = {
    "gpt2": Family("gpt2", dict(n_embd=64, n_inner=48, n_layer=2, n_head=4, n_positions=64,
                                layer_norm_epsilon=1e-3),
                   CLASSIC | dict(positions="learned", tied_head=True), GPT2, of_gpt2,
                   "transformer.h"),
    "llama": Family("llama", dict(head_dim=24, tie_word_embeddings=True),
                    dict(head_dim=24, tied_head=True)),
    "llama3": Family("llama", dict(attention_bias=True, rope_parameters=scaled(
                         "llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
                     dict(bias=True, bias_in="attention", rotary=(
                         "scaling=llama3 factor=4 low=1 high=4 original=32",))),
    "llama_yarn": Family("llama", dict(rope_parameters=scaled(
                             "yarn", beta_fast=4.0, beta_slow=0.25, truncate=False,
                             attention_factor=1.3)),
                         dict(rotary=("scaling=yarn factor=4 original=32 fast=4 slow=0.25 "
                                      "truncate=0 attention=1.3",))),
    "mistral": Family("mistral", dict(sliding_window=WINDOW), dict(windows=(WINDOW,))),
    "qwen2": Family("qwen2", {}, dict(bias=True, bias_in="qkv")),
    "qwen3": Family("qwen3", dict(head_dim=24), dict(head_dim=24, qk_norm=True)),
    "gemma2": Family("gemma2", dict(num_hidden_layers=3, head_dim=24, query_pre_attn_scalar=10,
                                    sliding_window=WINDOW, attn_logit_softcapping=2.0,
                                    final_logit_softcapping=3.0),
                     GEMMA | dict(num_layers=3, windows=(WINDOW, 0), attention_softcap=2.0,
                                  logit_softcap=3.0),
                     SANDWICH, of_gemma),
    "gemma3": Family("gemma3_text", dict(
                         num_hidden_layers=4, head_dim=24, query_pre_attn_scalar=10,
                         sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL, SLIDING],
                         rope_parameters={SLIDING: rope(),
                                          FULL: rope("linear", 1e6, factor=8.0)}),
                     GEMMA | dict(num_layers=4, windows=(WINDOW, WINDOW, 0), qk_norm=True,
                                  rotary=("", "", "base=1e6 scaling=linear factor=8")),
                     SANDWICH, of_gemma),
    "smollm3": Family("smollm3", dict(num_hidden_layers=4),
                      dict(num_layers=4, tied_head=True, rotary_base=2e6,
                           rotary=("", "", "", "none"))),
    "olmo": Family("olmo", {}, dict(norm="layernorm", norm_scale=False, norm_bias=False,
                                    norm_eps=1e-5)),
    "olmo2": Family("olmo2", {}, dict(norm_placement="output", qk_norm=True, qk_norm_over="width"),
                    OUTPUT),
    "olmo3": Family("olmo3", dict(num_hidden_layers=5, sliding_window=WINDOW, rope_parameters={
                        SLIDING: rope(base=5e5),
                        FULL: scaled("yarn", 5e5, beta_fast=32.0, beta_slow=0.25)}),
                    dict(num_layers=5, norm_placement="output", qk_norm=True, qk_norm_over="width",
                         windows=(WINDOW, WINDOW, WINDOW, 0), rotary=(
                             *["base=5e5"] * 3,
                             "base=5e5 scaling=yarn factor=4 original=32 slow=0.25")),
                    OUTPUT),
    "phi": Family("phi", dict(num_key_value_heads=4, layer_norm_eps=1e-3,
                              rope_parameters=rope(partial_rotary_factor=0.5)),
                  CLASSIC | dict(parallel_block=True, head_bias=True, rotary=("fraction=0.5",)),
                  PHI),
    "phi3_short": Family("phi3", PHI3, dict(windows=(WINDOW,), seq_len=ORIGINAL,
                                            rotary=(LONGROPE,)), {}, of_phi3, length=20),
    "phi3_long": Family("phi3", PHI3, dict(windows=(WINDOW,), rotary=(LONGROPE,)), {}, of_phi3),
    "gpt_neox": Family("gpt_neox", dict(layer_norm_eps=1e-3,
                                        rope_parameters=rope(partial_rotary_factor=0.25)),
                       CLASSIC | dict(mlp="gelu", parallel_block=True, parallel_norms=True,
                                      rotary=("fraction=0.25",)), NEOX, of_neox,
                       "gpt_neox.layers"),
    "granite": Family("granite", dict(embedding_multiplier=3.0, attention_multiplier=0.3,
                                      residual_multiplier=0.5, logits_scaling=2.0),
                      dict(embed_multiplier=3.0, attention_scale=0.3, residual_multiplier=0.5,
                           logit_multiplier=0.5)),
}  # fmt: skip


def their_model(family: Family) -> Any:
    """Return a random model of transformers, in which no norm and no bias is trivial."""
    torch.manual_seed(0)
    cfg = transformers.AutoConfig.for_model(family.kind, **(THEIRS | family.theirs))
    model = transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            else:
                tensor.normal_(0, 0.2)
    return model.eval()


def our_params(cfg: ModelConfig, family: Family, model: Any) -> dict[str, Any]:
    """Return our parameters with the weights of theirs, of which none is left over."""
    given = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if cfg.tied_head:
        del given["lm_head.weight"]
    state, names = family.unify(given), NAMES | family.names

    def take(row: Parameter, prefix: str = "") -> np.ndarray:
        tensor = state.pop(prefix + names[row.name])
        if row.kind == "kernel" and row.summed != (1,):
            tensor = tensor.T
        return tensor.reshape(row.shape)

    params: dict[str, Any] = {name: take(row) for name, row in model_rows(cfg).items()}
    for stack, indices in cfg.stacks.items():
        rows = layer_rows(cfg, cfg.layer(indices[0]))
        params[stack] = {
            name: np.stack([take(row, f"{family.layers}.{index}.") for index in indices])
            for name, row in rows.items()
        }
    assert not state, f"these weights have no place: {sorted(state)}"
    return params


@functools.cache
def build(name: str) -> tuple[Transformer, dict[str, Any], np.ndarray, np.ndarray]:
    """Return our model and parameters, a prompt, and their logits of it."""
    family = FAMILIES[name]
    cfg = small_model(**(OURS | family.ours))
    theirs, tokens_BT = their_model(family), random_tokens(2, family.length)
    with torch.no_grad():
        logits_BTV = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    return Transformer(cfg), our_params(cfg, family, theirs), tokens_BT, logits_BTV


def assert_close(ours_BTV: Any, theirs_BTV: np.ndarray) -> None:
    """Compare logits, relative to their scale."""
    assert np.isfinite(theirs_BTV).all()
    error = np.abs(np.asarray(ours_BTV) - theirs_BTV).max() / np.abs(theirs_BTV).max()
    assert error < BOUND, f"the logits are off by {error:.1e} of their scale"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    model, params, tokens_BT, theirs_BTV = build(name)
    ours_BTV = jax.jit(lambda params: model.apply({"params": params}, tokens_BT)[0])(params)
    assert_close(ours_BTV, theirs_BTV)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "smollm3", "gpt_neox"])
def test_cached_decoding_has_their_logits(name):
    """A prompt longer than the window, then single tokens."""
    model, params, tokens_BT, theirs_BTV = build(name)
    start = LENGTH - 4

    @jax.jit
    def prefill(params: Any, ids_BT: np.ndarray) -> tuple:
        (x_BTD, head), cache = read(model, params, ids_BT, LENGTH)
        return head(x_BTD), cache

    @jax.jit
    def step(params: Any, ids_B1: np.ndarray, positions_B1: np.ndarray, cache: Any) -> tuple:
        return model.apply({"params": params}, ids_B1, positions_B1, cache=cache)

    first_BTV, cache = prefill(params, tokens_BT[:, :start])
    found = [first_BTV]
    for position in range(start, LENGTH):
        ids_B1 = tokens_BT[:, position : position + 1]
        logits_B1V, cache = step(params, ids_B1, np.full_like(ids_B1, position), cache)
        found.append(logits_B1V)
    assert_close(np.concatenate(found, 1), theirs_BTV)
