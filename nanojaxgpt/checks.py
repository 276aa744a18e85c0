"""In: the fields of a config. Out: in words, what is wrong with one by itself or with its partners.

No jax here, and no default: config.py has the fields.
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict

CHOICES: dict[str, tuple[str, ...]] = {
    "model.mlp": ("gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu", "none"),
    "model.positions": ("learned", "sinusoidal", "rotary", "alibi", "none"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_placement": ("pre", "post"),
    "model.init": ("gpt2", "fan_in", "torch"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "model.remat": ("none", "full", "dots", "dots_no_batch"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "data.packing": ("wrap", "pack"),
    "data.bad_text": ("error", "skip"),
    "optim.optimizer": ("adamw", "adafactor", "lion", "sgd", "muon", "schedule_free"),
    "optim.schedule": ("cosine", "linear", "constant", "inverse_sqrt", "wsd"),
    "init.state": ("params", "all"),
}

_COUNT, _SIZE = (0, 2**31 - 1), (1, 2**31 - 1)  # off or a number; at least one
_FRACTION, _BELOW_ONE, _ANY = (0.0, 1.0), (0.0, math.nextafter(1.0, 0.0)), (0.0, 1e30)
_ABOVE_ZERO, _AXIS = (1e-30, 1e30), (-1, 2**31 - 1)

RANGES: dict[str, tuple[float, float]] = {
    "model.num_layers": _SIZE,
    "model.embed_dim": _SIZE,
    "model.num_heads": _SIZE,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": _COUNT,
    "model.mlp_dim": _COUNT,
    "model.seq_len": _SIZE,
    "model.vocab_size": _COUNT,
    "model.rotary_base": _ABOVE_ZERO,
    "model.norm_eps": _ABOVE_ZERO,
    "model.windows": _COUNT,
    "model.attention_scale": _ANY,
    "model.logit_softcap": _ANY,
    "model.dropout": _BELOW_ONE,
    "model.mup_base_dim": _COUNT,
    "model.embed_multiplier": _ANY,
    "model.attention_multiplier": _ANY,
    "model.logit_multiplier": _ANY,
    "model.unroll": _COUNT,
    "data.tokenizer_vocab_size": _SIZE,
    "data.validation_fraction": _BELOW_ONE,
    "data.validation_documents": _COUNT,
    "data.num_workers": _COUNT,
    "data.prefetch_batches": _SIZE,
    "optim.learning_rate": _ANY,
    "optim.warmup_steps": _COUNT,
    "optim.final_fraction": _FRACTION,
    "optim.decay_fraction": _FRACTION,
    "optim.beta1": _BELOW_ONE,
    "optim.beta2": _BELOW_ONE,
    "optim.eps": _ABOVE_ZERO,
    "optim.weight_decay": _ANY,
    "optim.clip_norm": _ANY,
    "optim.ema_decay": _BELOW_ONE,
    "optim.spike_factor": _ANY,
    "optim.max_skipped_steps": _COUNT,
    "mesh.slice": _AXIS,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.sequence": _AXIS,
    "mesh.tensor": _AXIS,
    "train.num_steps": _SIZE,
    "train.batch_size": _SIZE,
    "train.ramp_batch_size": _COUNT,
    "train.ramp_steps": _COUNT,
    "train.accumulation_steps": _SIZE,
    "train.seed": _COUNT,
    "train.z_loss": _ANY,
    "train.loss_chunks": _SIZE,
    "train.log_every_steps": _SIZE,
    "train.hang_timeout_seconds": _ANY,
    "eval.every_steps": _COUNT,
    "eval.batch_size": _COUNT,
    "eval.num_batches": _COUNT,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep_last": _SIZE,
    "checkpoint.keep_every_steps": _COUNT,
    "checkpoint.keep_best": _COUNT,
    "init.step": _COUNT,
    "init.scale": _ANY,
    "sample.max_tokens": _SIZE,
    "sample.num_samples": _SIZE,
    "sample.temperature": _ANY,
    "sample.top_k": _COUNT,
    "sample.top_p": _FRACTION,
    "sample.min_p": _FRACTION,
    "sample.seed": _COUNT,
    "sample.end_ids": _COUNT,
}

TRACKERS = ("jsonl", "tensorboard", "wandb", "trackio")

# What the tuples hold.
TUPLES: dict[str, type] = {
    "model.windows": int,
    "data.mixture": str,
    "train.trackers": str,
    "optim.rate_multipliers": str,
    "sample.stop": str,
    "sample.end_ids": int,
}


DIGEST = re.compile(r"\s*[0-9a-fA-F]{64}\s*")


def field_problems(name: str, value: Any, default: Any) -> list[str]:
    """Return what is wrong with one field by itself."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        return [f"{name}={value!r} is a {type(value).__name__}, not a {type(default).__name__}"]
    if name in CHOICES and value not in CHOICES[name]:
        return [f"{name}={value!r} is none of {', '.join(CHOICES[name])}"]
    if isinstance(value, tuple) and any(type(item) is not TUPLES[name] for item in value):
        return [f"{name}={value!r} holds something else than {TUPLES[name].__name__}"]
    if name in RANGES:
        low, high = RANGES[name]
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:  # NaN fails this too
                bounds = f"at least {low:g}" if high > 1e9 else f"from {low:g} to {high:g}"
                return [f"{name}={value!r} must be {bounds}"]
    return []


def partner_problems(cfg: ConfigDict) -> list[str]:
    """Return the fields that don't fit together."""
    model, train, problems = cfg.model, cfg.train, optim_problems(cfg.optim)
    if not model.head_dim and model.embed_dim % model.num_heads:
        problems.append(
            f"model.embed_dim={model.embed_dim} does not divide by "
            f"model.num_heads={model.num_heads}; change one, or set model.head_dim"
        )
    if model.num_heads % (model.num_kv_heads or model.num_heads):
        problems.append(
            f"model.num_heads={model.num_heads} does not divide by "
            f"model.num_kv_heads={model.num_kv_heads}"
        )
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    if model.positions == "rotary" and head_dim % 2:
        problems.append(f"rotary positions need an even head_dim, not {head_dim}")
    if model.positions == "sinusoidal" and model.embed_dim % 2:
        problems.append(f"sinusoidal positions need an even embed_dim, not {model.embed_dim}")
    if not model.windows:
        problems.append("model.windows is empty; (0,) means no window")
    doublings = math.log2(train.batch_size / (train.ramp_batch_size or train.batch_size))
    ramps = doublings >= 1 and doublings.is_integer() and train.ramp_steps > 0
    if (train.ramp_batch_size or train.ramp_steps) and not ramps:
        problems.append(
            f"train.ramp_batch_size={train.ramp_batch_size} must become "
            f"train.batch_size={train.batch_size} by doubling, and within a number of steps, "
            f"train.ramp_steps={train.ramp_steps}"
        )
    if train.batch_size % train.accumulation_steps:
        problems.append(
            f"train.batch_size={train.batch_size} does not divide by "
            f"train.accumulation_steps={train.accumulation_steps}"
        )
    if model.seq_len % train.loss_chunks:
        problems.append(
            f"model.seq_len={model.seq_len} does not divide by "
            f"train.loss_chunks={train.loss_chunks}"
        )
    for name in train.trackers:
        if name not in TRACKERS:
            problems.append(f"train.trackers={name!r} must be one of {', '.join(TRACKERS)}")
    if "" in cfg.sample.stop:
        problems.append("sample.stop holds an empty string, which is everywhere; leave it out")
    if cfg.data.sha256 and not all(map(DIGEST.fullmatch, cfg.data.sha256.split(","))):
        problems.append(
            f"data.sha256={cfg.data.sha256!r} is not a SHA-256 in 64 hex digits, or several with "
            "commas between"
        )
    if list(cfg.mesh.values()).count(-1) > 1:
        problems.append(f"only one mesh axis can be -1 (the rest): {dict(cfg.mesh)}")
    if cfg.init.state == "all" and not cfg.init.from_run:
        problems.append("init.state=all needs the run that it branches from: set init.from_run")
    if 0 in cfg.mesh.values():
        problems.append(f"a mesh axis has no devices: {dict(cfg.mesh)}; 1 leaves it unused")
    return problems


def optim_problems(optim: ConfigDict) -> list[str]:
    """Return the fields of `optim` that don't fit together."""
    problems = []
    if optim.independent_decay and not optim.learning_rate:
        problems.append("optim.independent_decay needs an optim.learning_rate above 0")
    if optim.optimizer == "schedule_free" and optim.schedule != "constant":
        problems.append(
            f"schedule_free averages in place of optim.schedule={optim.schedule}: "
            "set optim.schedule=constant"
        )
    if optim.optimizer == "schedule_free" and optim.ema_decay:
        problems.append("schedule_free averages by itself: leave optim.ema_decay at 0")
    if optim.spike_factor and not (optim.spike_factor > 1 and optim.max_skipped_steps):
        problems.append(
            f"optim.spike_factor={optim.spike_factor} must be above 1, and needs a budget, "
            "optim.max_skipped_steps"
        )
    try:
        re.compile(optim.decay_pattern)
    except re.error as error:
        problems.append(f"optim.decay_pattern is no regular expression: {error}")
    return problems
