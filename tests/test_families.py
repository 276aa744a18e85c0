"""Random models of transformers' families: the same weights give the same logits here."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_model

from nanojaxgpt.config.rotary import parse_rotary
from nanojaxgpt.interchange.families import (
    ATTENTION,
    FAMILIES,
    LAYER,
    MLP,
    OUTSIDE,
    PRE_NORMS,
    model_fields,
    norm,
    weights,
)  # fmt: skip
from nanojaxgpt.interchange.tensors import Tensor, slots, to_parts
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.rotary import frequencies
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import read

torch = pytest.importorskip("torch", reason="the oracle is transformers, in torch")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
pytestmark = pytest.mark.slow

BOUND = 1e-5  # of the largest logit
LENGTH = 40  # of the prompt: more than WINDOW, and than ORIGINAL unless the case has its own
WINDOW, ORIGINAL = 7, 32
SIZES = dict(
    vocab_size=31, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
THEIRS = SIZES | dict(num_key_value_heads=2, rms_norm_eps=1e-3)
GPT2 = dict(vocab_size=31, n_embd=64, n_inner=48, n_layer=2, n_head=4, n_positions=64,
            layer_norm_epsilon=1e-3, bos_token_id=0, eos_token_id=0)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A config of transformers, and how long a prompt is."""

    kind: str  # model_type
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from `base`
    length: int = LENGTH
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)  # what differs from the import
    base: dict[str, Any] = dataclasses.field(default_factory=lambda: THEIRS)

    def config(self, **more: Any) -> Any:
        """Return the config of transformers."""
        return transformers.AutoConfig.for_model(self.kind, **(self.base | self.theirs | more))


def rope(kind: str = "default", base: float = 1e4, **more: Any) -> dict[str, Any]:
    """Return transformers' parameters of rotary positions."""
    return {"rope_type": kind, "rope_theta": base, **more}


def scaled(kind: str, base: float = 1e4, **more: Any) -> dict[str, Any]:
    """Return those of a context that became four times as long."""
    return rope(kind, base, factor=4.0, original_max_position_embeddings=ORIGINAL, **more)


SHORT, LONG = [1.0, 1.1, 1.2, 1.5, 2.0, 2.5], [1.0, 1.5, 2.5, 4.0, 6.0, 9.0]
PHI3 = dict(
    original_max_position_embeddings=ORIGINAL, sliding_window=WINDOW,
    rope_parameters=rope("longrope", short_factor=SHORT, long_factor=LONG,
                         partial_rotary_factor=0.75, original_max_position_embeddings=ORIGINAL),
)  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = {
    "gpt2": Case("gpt2", base=GPT2),
    "llama": Case("llama", dict(head_dim=24, tie_word_embeddings=True)),
    "llama3": Case("llama", dict(attention_bias=True, rope_parameters=scaled(
                       "llama3", low_freq_factor=1.0, high_freq_factor=4.0))),
    "llama_biases": Case("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=rope(
                             "linear", factor=3.0))),
    "llama_yarn": Case("llama", dict(rope_parameters=scaled(
                           "yarn", beta_fast=4.0, beta_slow=0.25, truncate=False,
                           attention_factor=1.3))),
    "llama_mscale": Case("llama", dict(rope_parameters=scaled(
                             "yarn", mscale=0.707, mscale_all_dim=1.5))),
    "mistral": Case("mistral", dict(sliding_window=WINDOW, head_dim=24)),
    "qwen2": Case("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW,
                                max_window_layers=1)),
    "qwen3": Case("qwen3", dict(head_dim=24, attention_bias=True, tie_word_embeddings=True)),
    "gemma2": Case("gemma2", dict(num_hidden_layers=3, head_dim=24, query_pre_attn_scalar=10,
                                  sliding_window=WINDOW, attn_logit_softcapping=2.0,
                                  final_logit_softcapping=3.0, attention_bias=True)),
    "gemma3": Case("gemma3_text", dict(
                       num_hidden_layers=4, head_dim=24, query_pre_attn_scalar=10,
                       sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL, SLIDING],
                       final_logit_softcapping=3.0,
                       rope_parameters={SLIDING: rope(),
                                        FULL: rope("linear", 1e6, factor=8.0)})),
    "smollm3": Case("smollm3", dict(num_hidden_layers=4, attention_bias=True,
                                    use_sliding_window=True, sliding_window=WINDOW)),
    "olmo": Case("olmo", base=SIZES | dict(num_key_value_heads=2)),
    "olmo2": Case("olmo2", dict(attention_bias=True)),
    "olmo3": Case("olmo3", dict(num_hidden_layers=5, sliding_window=WINDOW, rope_parameters={
                      SLIDING: rope(base=5e5),
                      FULL: scaled("yarn", 5e5, beta_fast=32.0, beta_slow=0.25)})),
    "phi": Case("phi", dict(layer_norm_eps=1e-3, rope_parameters=rope(partial_rotary_factor=0.5)),
                base=SIZES),
    "phi3_short": Case("phi3", PHI3, 20, dict(seq_len=ORIGINAL)),
    "phi3_long": Case("phi3", PHI3),
    "gpt_neox": Case("gpt_neox", dict(layer_norm_eps=1e-3, rope_parameters=rope(
                         partial_rotary_factor=0.25)), base=SIZES),
    "neox_serial": Case("gpt_neox", dict(use_parallel_residual=False, tie_word_embeddings=True),
                        base=SIZES),
    "granite": Case("granite", dict(embedding_multiplier=3.0, attention_multiplier=0.3,
                                    residual_multiplier=0.5, logits_scaling=2.0,
                                    attention_bias=True, mlp_bias=True)),
}  # fmt: skip
# Two families that have no table in the package, for what no other one has.
OURS = dict(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=48, seq_len=64,
            vocab_size=31, positions="rotary", norm="layernorm", tied_head=False)  # fmt: skip
PHI = (
    *weights("model.embed_tokens", "embed_VD"), *weights("lm_head", "head_VD", biased=True),
    *norm("model.final_layernorm", "final_norm", biased=True), *ATTENTION,
    *norm(f"{LAYER}input_layernorm", "attention_norm", biased=True),
    *weights(f"{LAYER}self_attn.dense", "o_NHD", biased=True),
    *weights(f"{LAYER}mlp.fc1", "up_DF", biased=True),
    *weights(f"{LAYER}mlp.fc2", "down_DF", biased=True),
)  # fmt: skip
PHI = tuple(tensor for tensor in PHI if "o_proj" not in tensor.name)
OTHERS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...]]] = {
    "olmo": (OURS | dict(norm_scale=False, norm_bias=False, norm_eps=1e-5, bias=False,
                         mlp="swiglu"), OUTSIDE + PRE_NORMS + ATTENTION + MLP),
    "phi": (OURS | dict(num_kv_heads=4, bias=True, mlp="gelu_tanh", parallel_block=True,
                        norm_eps=1e-3, head_bias=True, rotary=("fraction=0.5",)), PHI),
}  # fmt: skip


def imported(name: str) -> tuple[ModelConfig, tuple[Tensor, ...]]:
    """Return our config of a case, and the tensors of its family."""
    case = CASES[name]
    if name in OTHERS:
        fields, tensors = OTHERS[name]
    else:
        family, fields = model_fields(json.loads(case.config().to_json_string()))
        tensors = family.tensors
    return small_model(**fields | dict(unroll=1) | case.ours), tensors


# As the published models have them: head_dim, the entry of model.rotary, their parameters.
SCALINGS = {
    "llama3.2": (64, "base=5e5 scaling=llama3 factor=32 original=8192",
                 dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192, rope_theta=5e5)),
    "gemma3": (256, "base=1e6 scaling=linear factor=8", rope("linear", 1e6, factor=8.0)),
    "qwen2.5": (128, "base=1e6 scaling=yarn factor=4 original=32768",
                rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32768)),
    "olmo3": (128, "base=5e5 scaling=yarn factor=8 original=8192 attention=1.2079441541679836",
              rope("yarn", 5e5, factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0,
                   beta_slow=1.0, attention_factor=1.2079441541679836)),
    "gpt_oss": (64, "base=150000 scaling=yarn factor=32 original=4096 truncate=0",
                rope("yarn", 150000.0, factor=32.0, original_max_position_embeddings=4096,
                     truncate=False)),
    "clamped": (8, "base=10 scaling=yarn factor=8 original=4096 fast=600 slow=1",
                rope("yarn", 10.0, factor=8.0, original_max_position_embeddings=4096,
                     beta_fast=600.0, beta_slow=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_are_those_of_transformers(name):
    head_dim, entry, theirs = SCALINGS[name]
    shape = dict(head_dim=head_dim, max_position_embeddings=2**17, rope_parameters=theirs)
    cfg = transformers.AutoConfig.for_model("llama", **(THEIRS | shape))
    scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[theirs["rope_type"]]
    their_angle, their_factor = scale(cfg, "cpu")
    rotary = parse_rotary(entry, 1e4)
    assert rotary is not None
    angle, factor = frequencies(rotary, head_dim, 2**17)
    np.testing.assert_allclose(angle, their_angle.numpy(), rtol=1e-5)
    assert factor == pytest.approx(their_factor)


def their_model(case: Case, **more: Any) -> Any:
    """Return a random model of transformers, in which no norm and no bias is trivial."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        case.config(**more), attn_implementation="eager"
    )
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            else:
                tensor.normal_(0, 0.2)
    return model.eval()


def our_params(cfg: ModelConfig, tensors: tuple[Tensor, ...], model: Any) -> dict[str, Any]:
    """Return our parameters with the weights of theirs, of which none is left over."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if cfg.tied_head:
        del state["lm_head.weight"]
    elif "embed_out.weight" in [tensor.name for tensor in tensors]:  # its name on disk
        state["embed_out.weight"] = state.pop("lm_head.weight")
    params: dict[str, Any] = {}
    for name, slot in slots(cfg, tensors).items():
        for place, part in zip(slot.places, to_parts(slot, state.pop(name)), strict=True):
            if not place.row.stack:
                params[place.row.name] = part
                continue
            stack = params.setdefault(place.row.stack, {}).setdefault(place.row.name, [])
            assert len(stack) == place.index
            stack.append(part)
    assert not state, f"these weights have no place: {sorted(state)}"
    return {
        name: part if isinstance(part, np.ndarray) else {k: np.stack(v) for k, v in part.items()}
        for name, part in params.items()
    }


@functools.cache
def build(name: str) -> tuple[Transformer, dict[str, Any], np.ndarray, np.ndarray]:
    """Return our model and parameters, a prompt, and their logits of it."""
    cfg, tensors = imported(name)
    theirs, tokens_BT = their_model(CASES[name]), random_tokens(2, CASES[name].length)
    with torch.no_grad():
        logits_BTV = theirs(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    return Transformer(cfg), our_params(cfg, tensors, theirs), tokens_BT, logits_BTV


def assert_close(ours_BTV: Any, theirs_BTV: np.ndarray) -> None:
    """Compare logits, relative to their scale."""
    assert np.isfinite(theirs_BTV).all()
    error = np.abs(np.asarray(ours_BTV) - theirs_BTV).max() / np.abs(theirs_BTV).max()
    assert error < BOUND, f"the logits are off by {error:.1e} of their scale"


@pytest.mark.parametrize("name", CASES)
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
    def prefill(params: Any, ids_BT: jax.Array) -> tuple:
        (x_BTD, head), cache = read(model, params, ids_BT, LENGTH)
        return head(x_BTD), cache

    @jax.jit
    def step(params: Any, ids_B1: np.ndarray, positions_B1: np.ndarray, cache: Any) -> tuple:
        return model.apply({"params": params}, ids_B1, positions_B1, cache=cache)

    first_BTV, cache = prefill(params, jnp.array(tokens_BT[:, :start]))
    found = [first_BTV]
    for position in range(start, LENGTH):
        ids_B1 = tokens_BT[:, position : position + 1]
        logits_B1V, cache = step(params, ids_B1, np.full_like(ids_B1, position), cache)
        found.append(logits_B1V)
    assert_close(np.concatenate(found, 1), theirs_BTV)


def test_every_family_has_a_case():
    assert {case.kind for case in CASES.values()} == {*FAMILIES, *OTHERS}
