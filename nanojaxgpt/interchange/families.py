"""The model families of Hugging Face: a table each of tensors and of the keys of config.json.

A key maps to a field of our section `model`, both ways. What a table can't say, small functions
do: windows.py for windows, rope.py for rotary positions. Every key must be known: those that change
no logits are listed, any other is an error.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nanojaxgpt.config.rotary import write_rotary
from nanojaxgpt.config.sections import Model
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.rope import SLIDING, RopeKeys, read_rope
from nanojaxgpt.interchange.tensors import Tensor
from nanojaxgpt.interchange.values import KINDS, OF_FIELDS, Kind, check_value
from nanojaxgpt.interchange.windows import WINDOW_KEYS, read_kinds, read_window

MOST_LAYERS = 10_000  # a list is made of them before anything is checked against the weights
NEEDED = object()  # a key without which a file is not a config


class Key(NamedTuple):
    """A field of our section `model` that a key of config.json holds.

    `default` is what transformers takes where the key is missing. Where `null` is allowed, it is
    our 0: the value follows from others, or is off.
    """

    field: str
    default: Any = NEEDED
    null: bool = False
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[Any], Any] = lambda value: value

    @property
    def kind(self) -> Kind:
        """What the key may hold."""
        found = OF_FIELDS[type(Model.rules()[self.field].default)]
        return found.or_null() if self.null else found


class Family(NamedTuple):
    """A model type of transformers."""

    model_type: str
    architecture: str
    tensors: tuple[Tensor, ...]
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]  # fields of ours that all its models share
    only: Mapping[str, Any]  # keys of which we have only this value, also their default
    rope: RopeKeys | None = RopeKeys()
    windows: str = ""  # which layers have sliding_window: "", all, pattern, upper, nope
    period: int = 0  # windows=pattern: the layers from one full one to the next
    window: int = 0  # the default of sliding_window
    bias: tuple[str, ...] = ()  # keys that give the attention, and the MLP, biases
    nope: bool = False  # no_rope_layers
    root_embedding: bool = False  # embeddings times sqrt(embed_dim)
    prefix: str = "model."  # of the names, which a file of the bare model leaves out


def weights(form: str, *parts: str, biased: bool = False, **how: Any) -> tuple[Tensor, ...]:
    """Return the tensor of a projection, and with `biased` that of its biases."""
    found = [Tensor(f"{form}.weight", parts, **how)]
    if biased:
        bias = tuple(f"{part.split('_')[0]}_bias" for part in parts)
        found.append(Tensor(f"{form}.bias", bias, per_head=how.get("per_head", False)))
    return tuple(found)


def norm(form: str, name: str, biased: bool = False) -> tuple[Tensor, ...]:
    """Return the tensors of a norm."""
    scale = Tensor(f"{form}.weight", (f"{name}_scale",))
    return (scale, Tensor(f"{form}.bias", (f"{name}_bias",))) if biased else (scale,)


LAYER = "model.layers.{}."
OUTSIDE = (
    *weights("model.embed_tokens", "embed_VD"), *norm("model.norm", "final_norm"),
    *weights("lm_head", "head_VD"),
)  # fmt: skip
PRE_NORMS = (
    *norm(f"{LAYER}input_layernorm", "attention_norm"),
    *norm(f"{LAYER}post_attention_layernorm", "mlp_norm"),
)
OUTPUT_NORMS = (
    *norm(f"{LAYER}post_attention_layernorm", "attention_output_norm"),
    *norm(f"{LAYER}post_feedforward_layernorm", "mlp_output_norm"),
)
SANDWICH_NORMS = (
    *norm(f"{LAYER}input_layernorm", "attention_norm"),
    *norm(f"{LAYER}pre_feedforward_layernorm", "mlp_norm"), *OUTPUT_NORMS,
)  # fmt: skip
ATTENTION = (
    *weights(f"{LAYER}self_attn.q_proj", "q_DNH", biased=True),
    *weights(f"{LAYER}self_attn.k_proj", "k_DKH", biased=True),
    *weights(f"{LAYER}self_attn.v_proj", "v_DKH", biased=True),
    *weights(f"{LAYER}self_attn.o_proj", "o_NHD", biased=True),
    *norm(f"{LAYER}self_attn.q_norm", "q_norm"), *norm(f"{LAYER}self_attn.k_norm", "k_norm"),
)  # fmt: skip
MLP = (
    *weights(f"{LAYER}mlp.gate_proj", "gate_DF", biased=True),
    *weights(f"{LAYER}mlp.up_proj", "up_DF", biased=True),
    *weights(f"{LAYER}mlp.down_proj", "down_DF", biased=True),
)
LLAMA = OUTSIDE + PRE_NORMS + ATTENTION + MLP
OLMO = OUTSIDE + OUTPUT_NORMS + ATTENTION + MLP
GEMMA = OUTSIDE + SANDWICH_NORMS + ATTENTION + MLP
PHI3 = (
    *OUTSIDE, *PRE_NORMS,
    *weights(f"{LAYER}self_attn.qkv_proj", "q_DNH", "k_DKH", "v_DKH"),
    *weights(f"{LAYER}self_attn.o_proj", "o_NHD"),
    *weights(f"{LAYER}mlp.gate_up_proj", "gate_DF", "up_DF"),
    *weights(f"{LAYER}mlp.down_proj", "down_DF"),
)  # fmt: skip
BLOCK = "transformer.h.{}."
GPT2 = (
    *weights("transformer.wte", "embed_VD"), *weights("transformer.wpe", "position_TD"),
    *norm("transformer.ln_f", "final_norm", biased=True), *weights("lm_head", "head_VD"),
    *norm(f"{BLOCK}ln_1", "attention_norm", biased=True),
    *norm(f"{BLOCK}ln_2", "mlp_norm", biased=True),
    *weights(f"{BLOCK}attn.c_attn", "q_DNH", "k_DKH", "v_DKH", biased=True, transposed=True),
    *weights(f"{BLOCK}attn.c_proj", "o_NHD", biased=True, transposed=True),
    *weights(f"{BLOCK}mlp.c_fc", "up_DF", biased=True, transposed=True),
    *weights(f"{BLOCK}mlp.c_proj", "down_DF", biased=True, transposed=True),
)  # fmt: skip
NEOX_LAYER = "gpt_neox.layers.{}."
NEOX = (
    *weights("gpt_neox.embed_in", "embed_VD"), *weights("embed_out", "head_VD"),
    *norm("gpt_neox.final_layer_norm", "final_norm", biased=True),
    *norm(f"{NEOX_LAYER}input_layernorm", "attention_norm", biased=True),
    *norm(f"{NEOX_LAYER}post_attention_layernorm", "mlp_norm", biased=True),
    *weights(f"{NEOX_LAYER}attention.query_key_value", "q_DNH", "k_DKH", "v_DKH", biased=True,
             per_head=True),
    *weights(f"{NEOX_LAYER}attention.dense", "o_NHD", biased=True),
    *weights(f"{NEOX_LAYER}mlp.dense_h_to_4h", "up_DF", biased=True),
    *weights(f"{NEOX_LAYER}mlp.dense_4h_to_h", "down_DF", biased=True),
)  # fmt: skip

GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
ALIKE = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


def activation(default: str, known: Mapping[str, str]) -> Key:
    """Return the key of the MLP's activation."""
    names = {ours: theirs for theirs, ours in known.items()}
    every = {**known} | {name: known[other] for name, other in ALIKE.items() if other in known}
    if known is PLAIN:
        every |= {"gelu_pytorch_tanh": "gelu_tanh"}

    def read(value: Any) -> str:
        if value not in every:
            raise ConfigError(f"this activation is not supported, only {', '.join(every)}")
        return every[value]

    return Key("mlp", default, False, read, lambda ours: names.get(ours, ours))


def inverse(value: Any) -> float:
    """Return what a divisor multiplies by."""
    return 1 / float(value)


def inverse_root(value: Any) -> float:
    """Return the scale of the scores of heads of `value` dimensions."""
    return float(value) ** -0.5


def inverse_square(scale: float) -> float | int:
    """Return the argument of `inverse_root`, an integer where it is one but for rounding."""
    value = scale**-2
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def sizes(**defaults: Any) -> dict[str, Key]:
    """Return the keys that most families share; `defaults` are those of transformers."""
    given: dict[str, Any] = dict(
        num_key_value_heads=0, head_dim=0, max_position_embeddings=2048, rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    ) | defaults  # fmt: skip
    names = dict(
        vocab_size="vocab_size", hidden_size="embed_dim", intermediate_size="mlp_dim",
        num_hidden_layers="num_layers", num_attention_heads="num_heads",
        num_key_value_heads="num_kv_heads", head_dim="head_dim",
        max_position_embeddings="seq_len", rms_norm_eps="norm_eps",
        tie_word_embeddings="tied_head",
    )  # fmt: skip
    nulls = ("num_key_value_heads", "" if given["head_dim"] else "head_dim")
    keys = {name: Key(field, given.get(name, NEEDED), name in nulls)
            for name, field in names.items()}  # fmt: skip
    return keys | {"hidden_act": activation("silu", GATED)}


MODERN = dict(positions="rotary", norm="rmsnorm", bias=False)
CLASSIC = dict(norm="layernorm", bias=True)
SCALED = {  # Granite's
    "embedding_multiplier": Key("embed_multiplier", 1.0),
    "attention_multiplier": Key("attention_scale", 1.0),
    "residual_multiplier": Key("residual_multiplier", 1.0),
    "logits_scaling": Key("logit_multiplier", 1.0, False, inverse, inverse),
}


def gemma(final: float, scores: float, positions: int, vocab_size: Any) -> dict[str, Key]:
    """Return the keys of a Gemma with the defaults of its soft caps, its context, vocabulary."""
    shared = sizes(num_attention_heads=8, num_key_value_heads=4, head_dim=256,
                   vocab_size=vocab_size, max_position_embeddings=positions,
                   tie_word_embeddings=True)  # fmt: skip
    del shared["hidden_act"]
    return shared | {
        "hidden_activation": activation("gelu_pytorch_tanh", GATED),
        "query_pre_attn_scalar": Key("attention_scale", 256, False, inverse_root, inverse_square),
        "final_logit_softcapping": Key("logit_softcap", final, True),
        "attn_logit_softcapping": Key("attention_softcap", scores, True),
    }


ATTENTION_BIAS, BOTH_BIASES = ("attention_bias",), ("attention_bias", "mlp_bias")
GEMMA_FIXED = MODERN | dict(norm_placement="sandwich", norm_offset=1.0)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "GPT2LMHeadModel", GPT2, {
            "vocab_size": Key("vocab_size"), "n_embd": Key("embed_dim"),
            "n_layer": Key("num_layers"), "n_head": Key("num_heads"),
            "n_positions": Key("seq_len", 1024), "n_inner": Key("mlp_dim", 0, True),
            "activation_function": activation("gelu_new", PLAIN),
            "layer_norm_epsilon": Key("norm_eps", 1e-5),
            "tie_word_embeddings": Key("tied_head", True),
        }, CLASSIC | dict(positions="learned"), {
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False, "add_cross_attention": False,
        }, None, prefix="transformer."),
        Family("llama", "LlamaForCausalLM", LLAMA, sizes(), MODERN, {"rope_interleaved": False},
               bias=BOTH_BIASES),
        Family("mistral", "MistralForCausalLM", LLAMA,
               sizes(num_key_value_heads=8, max_position_embeddings=131072), MODERN, {},
               windows="all", window=4096),
        Family("qwen2", "Qwen2ForCausalLM", LLAMA,
               sizes(num_key_value_heads=32, max_position_embeddings=32768),
               MODERN | dict(bias=True, bias_in="qkv"), {"use_mrope": False},
               windows="upper", window=4096),
        Family("qwen3", "Qwen3ForCausalLM", LLAMA,
               sizes(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
               MODERN | dict(qk_norm=True), {}, windows="upper", window=4096, bias=ATTENTION_BIAS),
        Family("gemma2", "Gemma2ForCausalLM", GEMMA, gemma(30.0, 50.0, 8192, 256000), GEMMA_FIXED,
               {"use_bidirectional_attention": False}, windows="pattern", period=2, window=4096,
               bias=ATTENTION_BIAS, root_embedding=True),
        Family("gemma3_text", "Gemma3ForCausalLM", GEMMA, gemma(0.0, 0.0, 131072, 262208),
               GEMMA_FIXED | dict(qk_norm=True), {"use_bidirectional_attention": False},
               RopeKeys(1e6, kinds=True, local_theta="rope_local_base_freq", local_base=1e4),
               windows="pattern", period=6, window=4096, bias=ATTENTION_BIAS, root_embedding=True),
        Family("smollm3", "SmolLM3ForCausalLM", LLAMA,
               sizes(num_key_value_heads=4, max_position_embeddings=32768,
                     tie_word_embeddings=True),
               MODERN, {}, RopeKeys(2e6), windows="nope", bias=BOTH_BIASES, nope=True),
        Family("olmo2", "Olmo2ForCausalLM", OLMO, sizes(rms_norm_eps=1e-5),
               MODERN | dict(norm_placement="output", qk_norm=True, qk_norm_over="width"), {},
               bias=ATTENTION_BIAS),
        Family("olmo3", "Olmo3ForCausalLM", OLMO, sizes(rms_norm_eps=1e-5),
               MODERN | dict(norm_placement="output", qk_norm=True, qk_norm_over="width"), {},
               RopeKeys(5e5, kinds=True), windows="pattern", period=4, window=4096,
               bias=ATTENTION_BIAS),
        Family("phi3", "Phi3ForCausalLM", PHI3,
               sizes(max_position_embeddings=4096, rms_norm_eps=1e-5), MODERN,
               {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False,
                "full_attn_mod": 1, "interpolate_factor": 1},
               RopeKeys(partial=True, aliases={"su": "longrope", "yarn": "longrope"}),
               windows="all"),
        Family("gpt_neox", "GPTNeoXForCausalLM", NEOX, {
            **{name: key for name, key in sizes().items() if "_act" not in name
               and name not in ("num_key_value_heads", "head_dim", "rms_norm_eps")},
            "layer_norm_eps": Key("norm_eps", 1e-5), "hidden_act": activation("gelu", PLAIN),
            "use_parallel_residual": Key("parallel_block", True),
        }, CLASSIC | dict(positions="rotary", parallel_norms=True), {"attention_bias": True},
               RopeKeys(fraction=0.25, partial=True, theta="rotary_emb_base", share="rotary_pct"),
               prefix="gpt_neox."),
        Family("granite", "GraniteForCausalLM", LLAMA, sizes() | SCALED, MODERN, {},
               bias=BOTH_BIASES),
    )
}  # fmt: skip

EXPERTS = "it needs a mixture of experts"
DELTA = "it needs Gated DeltaNet layers"
# Beginnings of model types that people will try, and what is missing for them.
MISSING = {
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "olmoe": EXPERTS,
    "granitemoe": EXPERTS, "phimoe": EXPERTS, "llama4": EXPERTS,
    "gpt_oss": "it needs a mixture of experts and attention sinks",
    "qwen3_5": DELTA, "qwen3_next": DELTA, "qwen3_6": DELTA,
    "gemma4": "it needs layers that share keys and values, and embeddings per layer",
    "gemma3n": "it needs embeddings per layer", "deepseek": "it needs multi-head latent attention",
    "kimi": "it needs multi-head latent attention",
    "ministral3": "it needs a scale of the queries that grows with the position",
}  # fmt: skip
# Keys that change no logits, where no table reads them: tokens, training, how transformers runs
# and saves the model, and what only older versions read.
HARMLESS = {
    "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_implementation",
    "attn_pdrop", "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "hidden_act", "hidden_dropout", "hidden_dropout_prob", "id2label",
    "initializer_range", "is_llama_config", "label2id", "max_sequence_length", "model_type",
    "n_ctx", "name_or_path", "num_labels", "output_attentions", "output_hidden_states",
    "output_past", "pad_token_id", "pretraining_tp", "problem_type", "pruned_heads",
    "resid_pdrop", "return_dict", "sliding_window_size", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip
NEVER = {"is_encoder_decoder": False, "is_decoder": False}


def find_family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Return the family of a config.json, and the part of it that describes the language model.

    Raises ConfigError for a model type that is not in the table.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError("it has no model_type, so it isn't the config of a model")
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "it has a quantization_config, and quantized weights can't be read: take the model in "
            "bfloat16 or float32"
        )
    if kind == "gemma3" and isinstance(config.get("text_config"), Mapping):
        tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
        return FAMILIES["gemma3_text"], {**config["text_config"], **tied}
    if kind not in FAMILIES:
        reasons = [reason for start, reason in MISSING.items() if kind.startswith(start)]
        reason = f": {reasons[0]}" if reasons else ""
        raise ConfigError(
            f"model_type={kind!r} is not supported{reason}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind], config


def check_keys(family: Family, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that may change the logits but is not read; null is off."""
    read = set(family.keys) | WINDOW_KEYS[family.windows] | set(family.bias)
    read |= family.rope.keys if family.rope else set()
    read |= {"no_rope_layers", "no_rope_layer_interval"} if family.nope else set()
    only = {**NEVER, **family.only}
    for name, value in config.items():
        if name in read and name in KINDS:
            check_value(name, value, KINDS[name])
        if value is None or name in read or name in HARMLESS or name.startswith("_"):
            continue
        if name not in only:
            raise ConfigError(
                f"the key {name} ({value!r}) is not known for model_type={family.model_type}, and "
                "may change what the model computes"
            )
        if type(value) is not type(only[name]) or value != only[name]:
            raise ConfigError(
                f"{name}={value!r} is not supported for model_type={family.model_type}, only "
                f"{only[name]!r}"
            )


def model_fields(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Return the family of a config.json, and the fields of our section `model` that it sets.

    Raises ConfigError, naming the key, for what can't be expressed or isn't known.
    """
    family, config = find_family(config)
    check_keys(family, config)
    given = {name: key.default for name, key in family.keys.items() if key.default is not NEEDED}
    given |= config
    fields: dict[str, Any] = dict(family.fixed)
    for name, key in family.keys.items():
        if name not in given:
            raise ConfigError(f"it has no {name}")
        if name in config:
            check_value(name, config[name], key.kind)
        fields[key.field] = read_key(name, key, given[name])
    if fields["num_layers"] > MOST_LAYERS:
        raise ConfigError(f"{fields['num_layers']} layers can't be: 1 to {MOST_LAYERS} can")
    if family.bias:
        attention, *mlp = (bool(config.get(name)) for name in family.bias)
        if not attention and any(mlp):
            raise ConfigError("mlp_bias without attention_bias is not supported")
        fields |= dict(bias=attention, bias_in="all" if any(mlp) else "attention")
    if family.root_embedding:
        fields["embed_multiplier"] = math.sqrt(fields["embed_dim"])
    return family, fields | layer_fields(family, given, fields["num_layers"])


def read_key(name: str, key: Key, value: Any) -> Any:
    """Return the value of our field. Raises ConfigError for one that can't be expressed."""
    wanted = type(Model.rules()[key.field].default)
    try:
        return wanted() if value is None else wanted(key.read(value))
    except (ArithmeticError, ConfigError) as error:
        raise ConfigError(f"{name}={value!r}: {error}") from None


def layer_fields(family: Family, given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the fields `windows`, `rotary` and `rotary_base`, as short as they repeat."""
    turned = [True] * layers
    if family.nope:
        stated, every = given.get("no_rope_layers"), given.get("no_rope_layer_interval") or 4
        turned = [bool((index + 1) % every) for index in range(layers)]
        if stated is not None:
            turned = [bool(turns) for turns in stated]
        if len(turned) != layers:
            raise ConfigError(f"no_rope_layers must have a number for each of {layers} layers")
    window = read_window(given, family.windows, family.window)
    kinds = read_kinds(given, family.windows, family.period, turned, bool(window))
    if family.windows != "all" and SLIDING in kinds and not window:
        raise ConfigError(f"layer_types has {SLIDING}, but there is no sliding_window")
    windows = [window if kind == SLIDING else 0 for kind in kinds]
    fields: dict[str, Any] = {"windows": shortest(windows)}
    if family.rope:
        rotary = read_rope(given, family.rope)
        base = rotary[kinds[0]].base
        entries = [
            write_rotary(rotary[kind] if turns else None, base)
            for kind, turns in zip(kinds, turned, strict=True)
        ]
        fields |= dict(rotary=shortest(entries), rotary_base=base)
    return fields


def shortest(items: list[Any]) -> tuple[Any, ...]:
    """Return the shortest beginning that repeats over all items."""
    sizes = range(1, len(items) + 1)
    fits = (size for size in sizes if items == (items[:size] * len(items))[: len(items)])
    return tuple(items[: next(fits, 1)])
