"""In: a name that does not exist here. Out: the names it may stand for, other projects' included.

`OTHER_NAMES` is the one table of what users of nanoGPT, MaxText and transformers type. No jax here.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NANOGPT, MAXTEXT, TRANSFORMERS = "nanoGPT", "MaxText", "transformers"

SECONDARY = (
    "lora.",
    "eval.",
    "checkpoint.",
    "init.",
    "sample.",
)  # sections that are suggested last


class OtherName(NamedTuple):
    """What a name of other projects is called here.

    `names` are config fields, or command-line options where they begin with "--". `note` says what
    differs, such as a unit.
    """

    names: tuple[str, ...]
    projects: tuple[str, ...]
    note: str = ""


def _table(*rows: tuple[str, str, tuple[str, ...], str]) -> dict[str, OtherName]:
    """Return the rows (their names, our names, projects, note) as a dict by their name."""
    return {
        theirs: OtherName(tuple(ours.split()), projects, note)
        for names, ours, projects, note in rows
        for theirs in names.split()
    }


_N, _M, _T = (NANOGPT,), (MAXTEXT,), (TRANSFORMERS,)
_NM, _NT, _MT = _N + _M, _N + _T, _M + _T

OTHER_NAMES: dict[str, OtherName] = _table(
    # The model.
    ("n_layer", "model.num_layers", _NT, ""),
    ("num_hidden_layers", "model.num_layers", _T, ""),
    ("base_num_decoder_layers", "model.num_layers", _M, ""),
    ("n_embd", "model.embed_dim", _NT, ""),
    ("hidden_size d_model", "model.embed_dim", _T, ""),
    ("base_emb_dim", "model.embed_dim", _M, ""),
    ("n_head", "model.num_heads", _NT, ""),
    ("num_attention_heads", "model.num_heads", _T, ""),
    ("base_num_query_heads", "model.num_heads", _M, ""),
    ("num_key_value_heads", "model.num_kv_heads", _T, ""),
    ("base_num_kv_heads", "model.num_kv_heads", _M, ""),
    ("n_inner intermediate_size", "model.mlp_dim", _T, ""),
    ("base_mlp_dim", "model.mlp_dim", _M, ""),
    ("block_size", "model.seq_len", _N, ""),
    ("n_positions n_ctx max_position_embeddings", "model.seq_len", _T, ""),
    ("max_target_length", "model.seq_len", _M, ""),
    ("hidden_act activation_function", "model.mlp", _T, ""),
    ("mlp_activations", "model.mlp", _M, ""),
    ("rope_theta", "model.rotary_base", _T, ""),
    ("rope_max_timescale", "model.rotary_base", _M, ""),
    ("rms_norm_eps layer_norm_eps layer_norm_epsilon", "model.norm_eps", _T, ""),
    ("normalization_layer_epsilon", "model.norm_eps", _M, ""),
    ("attention_bias mlp_bias", "model.bias", _T, "it applies to all projections"),
    ("bias", "model.bias model.norm_bias", _N, "nanoGPT's bias sets both"),
    ("tie_word_embeddings", "model.tied_head", _T, ""),
    ("logits_via_embedding", "model.tied_head", _M, ""),
    ("use_qk_norm", "model.qk_norm", _MT, ""),
    ("sliding_window", "model.windows", _T, "a tuple, repeated over the layers"),
    ("sliding_window_size", "model.windows", _M, "a tuple, repeated over the layers"),
    ("final_logit_softcapping", "model.logit_softcap", _T, ""),
    ("final_logits_soft_cap", "model.logit_softcap", _M, ""),
    ("query_pre_attn_scalar", "model.attention_scale", _T, "ours is its inverse square root"),
    (
        "attn_pdrop resid_pdrop embd_pdrop attention_dropout hidden_dropout_prob "
        "attention_probs_dropout_prob",
        "model.dropout", _T, "one rate for all of them",
    ),
    ("dropout_rate", "model.dropout", _M, ""),
    ("attn_implementation", "model.attention", _T, ""),
    ("remat_policy", "model.remat", _M, "ours names what is kept: save=... offload=..."),
    (
        "sa_block_q sa_block_kv sa_block_kv_compute sa_block_q_dkv sa_block_kv_dkv "
        "sa_use_fused_bwd_kernel",
        "model.attention_blocks", _M, "one field: q=1024 kv=1024 fused=true",
    ),
    ("gradient_checkpointing", "model.remat", _T, "True is full"),
    ("scan_layers", "model.unroll", _M, "layers are always scanned; 1 unrolls none"),
    ("torch_dtype", "model.param_dtype", _T, ""),
    ("weight_dtype", "model.param_dtype", _M, ""),
    ("dtype", "model.compute_dtype model.param_dtype", _NM + _T, ""),
    ("bf16", "model.compute_dtype", _T, "set it to bfloat16"),
    ("fp16", "model.compute_dtype", _T, "float16 is not supported, bfloat16 is"),
    # The data.
    ("dataset", "data.source", _N, "KIND:LOCATION, as in text:input.txt"),
    ("dataset_name dataset_path hf_path", "data.source", _M, "as in hf:NAME or tfds:NAME"),
    ("tokenizer_path", "data.tokenizer", _M, ""),
    ("tokenizer_name_or_path", "data.tokenizer", _T, ""),
    ("dataloader_num_workers", "data.num_workers", _T, ""),
    # The optimizer and its schedule.
    ("lr", "optim.learning_rate", _T, ""),
    ("opt_type", "optim.optimizer", _M, ""),
    ("lr_scheduler_type", "optim.schedule", _T, ""),
    ("decay_lr", "optim.schedule", _N, "constant is the same as False"),
    ("min_lr", "optim.final_fraction", _N, "a fraction of optim.learning_rate"),
    ("cosine_learning_rate_final_fraction", "optim.final_fraction", _M, ""),
    ("warmup_iters", "optim.warmup_steps", _N, ""),
    ("warmup_ratio", "optim.warmup_steps", _T, "in steps, not as a fraction"),
    ("warmup_steps_fraction", "optim.warmup_steps", _M, "in steps, not as a fraction"),
    ("adam_beta1", "optim.beta1", _T, ""),
    ("adam_beta2", "optim.beta2", _T, ""),
    ("adam_b1", "optim.beta1", _M, ""),
    ("adam_b2", "optim.beta2", _M, ""),
    ("betas", "optim.beta1 optim.beta2", _T, ""),
    ("adam_epsilon", "optim.eps", _T, ""),
    ("adam_eps", "optim.eps", _M, ""),
    ("adam_weight_decay", "optim.weight_decay", _M, ""),
    ("grad_clip", "optim.clip_norm", _N, ""),
    ("max_grad_norm", "optim.clip_norm", _T, ""),
    ("gradient_clipping_threshold", "optim.clip_norm", _M, ""),
    # Steps and batches.
    ("max_iters", "train.num_steps", _N, ""),
    ("lr_decay_iters", "train.num_steps", _N, "the schedule ends with the run"),
    ("max_steps", "train.num_steps", _T, ""),
    ("num_train_epochs", "train.num_steps", _T, "in steps, not epochs"),
    ("steps learning_rate_schedule_steps", "train.num_steps", _M, ""),
    (
        "gradient_accumulation_steps", "train.accumulation_steps", _NM + _T,
        "it splits train.batch_size and does not multiply it",
    ),
    (
        "per_device_train_batch_size", "train.batch_size", _T,
        "the global batch: theirs x devices x accumulation steps",
    ),
    (
        "per_device_batch_size", "train.batch_size", _M,
        "the global batch: theirs x devices x accumulation steps",
    ),
    ("per_device_eval_batch_size", "eval.batch_size", _T, "the global batch"),
    ("data_seed", "train.seed", _T, ""),
    ("init_weights_seed data_shuffle_seed", "train.seed", _M, ""),
    ("z_loss_multiplier", "train.z_loss", _M, ""),
    ("num_vocab_tiling", "train.loss_chunks", _M, "it cuts the sequence, not the vocabulary"),
    # Logs, evaluation, checkpoints.
    ("log_interval", "train.log_every_steps", _N, ""),
    ("log_period", "train.log_every_steps", _M, ""),
    ("logging_steps", "train.log_every_steps", _T, ""),
    ("wandb_log", "train.trackers", _N, "add wandb to it"),
    ("wandb_project wandb_run_name", "train.trackers", _N, "add wandb to it"),
    ("report_to", "train.trackers", _T, ""),
    ("enable_tensorboard", "train.trackers", _M, ""),
    ("eval_interval", "eval.every_steps", _NM, ""),
    ("eval_iters", "eval.num_batches", _N, ""),
    ("eval_steps", "eval.every_steps eval.num_batches", _MT,
     "transformers' is the first, MaxText's the second"),
    ("save_steps", "checkpoint.every_steps", _T, ""),
    ("checkpoint_period", "checkpoint.every_steps", _M, ""),
    ("save_total_limit", "checkpoint.keep_last", _T, ""),
    ("load_best_model_at_end", "checkpoint.keep_best", _T, ""),
    ("init_from", "init.from_run", _N, ""),
    ("load_parameters_path", "init.from_run", _M, ""),
    ("out_dir", "--run", _N, ""),
    ("output_dir", "--run", _T, ""),
    ("base_output_directory run_name", "--run", _M, ""),
    ("resume_from_checkpoint", "--run", _T, "the same --run resumes"),
    # Devices.
    ("ici_data_parallelism", "mesh.data", _M, ""),
    ("ici_fsdp_parallelism", "mesh.fsdp", _M, ""),
    ("ici_sequence_parallelism ici_context_parallelism", "mesh.sequence", _M, ""),
    ("ici_tensor_parallelism", "mesh.tensor", _M, ""),
    ("dcn_data_parallelism", "mesh.slice", _M, ""),
    # Sampling.
    ("start", "sample.prompt", _N, ""),
    ("max_new_tokens", "sample.max_tokens", _NT, ""),
    ("num_return_sequences", "sample.num_samples", _T, ""),
    ("do_sample", "sample.temperature", _T, "0 is greedy"),
    ("decode_sampling_temperature", "sample.temperature", _M, ""),
    ("decode_sampling_nucleus_p", "sample.top_p", _M, ""),
    ("decode_sampling_top_k", "sample.top_k", _M, ""),
)  # fmt: skip


def leaf(name: str) -> str:
    """Return the last part of a dotted name or an option, as config fields spell it."""
    return name.split(".")[-1].lstrip("-").replace("-", "_").lower()


def certain_names(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names that end like `name`, or that other projects call so."""
    found = [k for k in known if leaf(k) == leaf(name)]
    if other := OTHER_NAMES.get(leaf(name)):
        found += [k for k in other.names if k in known or k.startswith("--")]
    found.sort(key=lambda k: k.startswith(SECONDARY))
    return list(dict.fromkeys(found))


def near_names(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names that are spelled nearly like `name`, the nearest first."""
    near = difflib.get_close_matches(name, known, 3, 0.6)
    for end in difflib.get_close_matches(leaf(name), dict.fromkeys(map(leaf, known)), 2, 0.75):
        near += [k for k in known if leaf(k) == end]
    return list(dict.fromkeys(near))


def note(name: str) -> str:
    """Return the difference from another project's field of this name, in parentheses, or ""."""
    other = OTHER_NAMES.get(leaf(name))
    return f" ({other.note})" if other and other.note else ""


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """Return the sentence for a name that does not exist, with what it may stand for."""
    if certain := certain_names(name, known):
        return f"no {kind} {name}; did you mean {' or '.join(certain)}?{note(name)}"
    near = near_names(name, known)
    return f"no {kind} {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def unknown_option(argument: str, flags: Sequence[str], config_fields: Sequence[str]) -> str:
    """Return the sentence for `--NAME[=VALUE]`, which may be an option or a field of the config."""
    name, equals, value = argument.partition("=")

    def as_option(field: str) -> str:
        flag = f"--{field.removeprefix('sample.')}"
        return field if field in flags else flag if flag in flags else f"--config.{field}"

    if typo := difflib.get_close_matches(name, flags, 1, 0.8):
        return f"no option {name}; did you mean {typo[0]}?"
    if certain := certain_names(name, config_fields):
        value = f"={value}" if equals else "=VALUE"
        choice = " or ".join(as_option(field) + value for field in certain)
        return f"no option {name}; did you mean {choice}?{note(name)}"
    near = difflib.get_close_matches(name, flags, 3, 0.6)
    near = near or [as_option(field) for field in near_names(leaf(name), config_fields)]
    return f"no option {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean X?` for the choice spelled nearly like `name`, or ""."""
    lowered = {choice.lower(): choice for choice in choices if choice}
    near = difflib.get_close_matches(name.lower(), lowered, 1, 0.6)
    return f"; did you mean {lowered[near[0]]}?" if near else ""
