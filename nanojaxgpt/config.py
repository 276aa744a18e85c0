"""Every field of an experiment with its default; load, override, check and compare configs.

In: an experiment file, overrides from the command line, or a run's `config.json`. Out: a locked
`ConfigDict` whose fields all have the right type and range. No jax here: a typo fails before any
backend starts.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt.checks import (
    field_problems,
    kind_of,
    partner_problems,
    read_float,
    read_int,
    show,
)
from nanojaxgpt.errors import ConfigError, Stopped, UserError
from nanojaxgpt.names import unknown_name


def base_config() -> ConfigDict:
    """Return every field with its default, locked; 0 or "" means off, whole words, unit last."""
    cfg = ConfigDict()
    cfg.model = ConfigDict(
        dict(
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=0,  # 0: num_heads; 1: multi-query; in between: grouped-query
            head_dim=0,  # 0: embed_dim / num_heads
            mlp="gelu_tanh",  # gelu_tanh, gelu, relu, relu2, swiglu, geglu, none (attention only)
            mlp_dim=0,  # 0: 4 x embed_dim
            mlp_dims=(0,),  # of each layer, repeated over the layers; 0: mlp_dim
            seq_len=256,  # context length in tokens
            vocab_size=0,  # 0: the tokenizer's size; a larger number pads the embedding table
            positions="learned",  # learned, sinusoidal, rotary, alibi, none
            rotary_base=10000.0,
            rotary=("",),  # per layer, repeated: none, or as "base=1e6 fraction=0.25"
            norm="layernorm",  # layernorm, rmsnorm
            norm_placement="pre",  # pre, post, sandwich (pre and output), output (before adding)
            norm_bias=True,  # layernorm only
            norm_eps=1e-5,
            norm_scale=True,  # norms multiply by a learned scale
            final_norm=True,
            parallel_block=False,  # attention and MLP read the same input
            parallel_norms=False,  # in a parallel block the MLP's input has a norm of its own
            bias=True,  # in the projections of bias_in
            bias_in="all",  # all, qkv, attention (qkv and its output)
            head_bias=False,
            qk_norm=False,  # normalize queries and keys, without a bias
            qk_norm_over="head",  # head (one scale for all heads), width (all heads together)
            windows=(0,),  # attention window per layer in tokens, cycled over the layers; 0: none
            smeared_keys=False,  # mix k_t with k_(t-1) by a learned gate per head
            attention_scale=0.0,  # 0: 1 / sqrt(head_dim)
            attention_softcap=0.0,  # c: scores become c * tanh(scores / c)
            logit_softcap=0.0,  # c: logits become c * tanh(logits / c)
            tied_head=True,
            dropout=0.0,
            mup_base_dim=0,  # embed_dim at which muP equals the standard parametrization; 0: no muP
            embed_multiplier=1.0,  # scales the input of the first layer
            attention_multiplier=1.0,  # scales the attention logits, on top of attention_scale
            residual_multiplier=1.0,  # scales what each sublayer adds to the residual stream
            logit_multiplier=1.0,  # scales the output logits
            init="gpt2",  # gpt2, fan_in (truncated normal), torch (PyTorch's layer defaults)
            attention="auto",  # auto (by backend), plain, xla, cudnn, splash: the kernel
            unroll=0,  # layers per scan iteration; 0: all on CPU, one elsewhere
            remat="none",  # none, full, dots, dots_no_batch: what the backward pass recomputes
            param_dtype="float32",  # float32, bfloat16
            compute_dtype="float32",  # float32, bfloat16
        )
    )
    cfg.data = ConfigDict(
        dict(
            source="stdlib",  # KIND[:LOCATION]: stdlib, text:PATH, jsonl:URL, ...; see docs/data.md
            sha256="",  # of the download, in hex; separate several by commas; "": not checked
            mixture=(),  # replaces source, weights first: ("3 text:a.txt", "1 text:b.txt")
            tokenizer="",  # bytes, chars, sentencepiece, ...; "": as in init.from_run, else bytes
            tokenizer_vocab_size=1024,  # size of a sentencepiece tokenizer trained on the corpus
            lossy_tokenizer=False,  # accept a tokenizer that alters texts, and report the loss
            packing="wrap",  # wrap: cut one stream every seq_len; pack: whole, separate documents
            validation_fraction=0.1,  # tail of each source that is held out
            validation_documents=0,  # hold out the last N documents of each source instead; 0: off
            validation_source="",  # validate on this separate source instead; "": off
            bad_text="error",  # error, skip: what to do with a document that can't be read
            tfds_dir="",  # folder of prepared TensorFlow Datasets; "": ~/tensorflow_datasets
            manual_dir="",  # folder of your own files, for TFDS builders that need them
            num_workers=0,  # tokenizing processes; 0: one per core
            prefetch_batches=2,  # batches prepared in advance
            cache_dir="",  # stores, downloads; "": $XDG_CACHE_HOME/nanojaxgpt, ~/.cache/nanojaxgpt
        )
    )
    cfg.optim = ConfigDict(
        dict(
            optimizer="adamw",  # adamw, adafactor, lion, sgd, muon, schedule_free
            learning_rate=1e-3,
            schedule="cosine",  # cosine, linear, constant, inverse_sqrt, wsd
            warmup_steps=100,
            final_fraction=0.1,  # cosine, linear and wsd end at this fraction of learning_rate
            decay_fraction=0.2,  # length of wsd's decay, as a fraction of num_steps
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            independent_decay=False,  # scale the decay by the schedule alone, not by learning_rate
            decay_pattern=r"_[A-Z]{2,}$",  # paths that decay; default: all matrices and tables
            trainable=(),  # paths that train, first match wins: ("!embed", "."); (): all
            rate_multipliers=(),  # learning rate factors by path: ("embed_VD=0.1",); 0 freezes
            clip_norm=1.0,  # maximum global norm of the gradient; 0: off
            ema_decay=0.0,  # evaluate and save an exponential average of the parameters; 0: off
            spike_factor=0.0,  # skip a gradient this many times the recent norm; 0: off
            max_skipped_steps=0,  # consecutive skipped updates (spikes, non-finite) tolerated
        )
    )
    cfg.mesh = ConfigDict(  # devices per axis; -1: all that remain
        dict(
            slice=1,  # TPU slices on the data-center network; the other axes are within a slice
            data=-1,  # replicas of the model, each with its own rows
            fsdp=1,  # splits the rows and the weights, which are gathered when used
            sequence=1,  # splits the tokens of each row
            tensor=1,  # splits attention heads and the MLP
        )
    )
    cfg.train = ConfigDict(
        dict(
            num_steps=1000,
            batch_size=32,  # global batch, in sequences
            ramp_batch_size=0,  # batch size of the first step, doubled up to batch_size; 0: off
            ramp_steps=0,  # steps until batch_size is reached
            accumulation_steps=1,  # micro-batches that each batch is split into
            seed=0,
            z_loss=0.0,  # weight of log(Z)^2 in the loss
            loss_chunks=1,  # parts of the sequence; only one part's logits exist at a time
            log_every_steps=10,
            trackers=("jsonl",),  # jsonl, tensorboard, wandb, trackio; see docs/trackers.md
            hang_timeout_seconds=300.0,  # exit 70 if a step exceeds it and 10 median steps; 0: off
        )
    )
    cfg.eval = ConfigDict(
        dict(
            every_steps=100,  # 0: only at the end
            batch_size=0,  # 0: train.batch_size
            num_batches=0,  # 0: the whole validation split
        )
    )
    cfg.checkpoint = ConfigDict(
        dict(
            every_steps=100,  # 0: only at the end
            keep_last=2,  # newest checkpoints to keep
            keep_every_steps=0,  # also keep multiples of this step; 0: off
            keep_best=1,  # best checkpoints to keep, by validation loss
        )
    )
    cfg.init = ConfigDict(
        dict(
            from_run="",  # start from the parameters of this run
            state="params",  # params; all: also its optimizer state, step and place in the data
            step=0,  # checkpoint of from_run; 0: the newest
            scale=1.0,  # scales the random initial values of all matrices; unused with from_run
        )
    )
    cfg.sample = ConfigDict(
        dict(
            prompt="\n",  # "": a new document, from the tokenizer's end token
            max_tokens=256,
            num_samples=1,
            temperature=0.8,  # below 1e-5: greedy
            top_k=0,  # 0: off
            top_p=1.0,
            min_p=0.0,
            seed=0,
            stop=(),  # the text ends before the first of these strings
            end_ids=(),  # token ids that end a sample, besides the tokenizer's end token
        )
    )
    return cfg.lock()


# May change when a run is resumed: none of it changes the function that is being trained.
FREE_ON_RESUME = re.compile(
    r"(mesh|eval|checkpoint|sample)\..*|train\.(log_every_steps|hang_timeout_seconds|trackers)"
    r"|data\.(sha256|lossy_tokenizer|cache_dir|tfds_dir|manual_dir|num_workers|prefetch_batches)"
    r"|model\.(attention|unroll|remat)"
)


def fields(cfg: ConfigDict) -> Iterator[tuple[str, Any]]:
    """Yield every dotted field name with its value."""
    for section, values in cfg.items():
        for name, value in values.items():
            yield f"{section}.{name}", value


def load_config(experiment: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """Return the checked config of `experiment`, "FILE.py" or "FILE.py:VARIANT", plus overrides.

    `overrides` maps dotted fields to text from the command line. Raises ConfigError.
    """
    cfg = load_experiment(experiment)
    return override_config(cfg, overrides or {})


def load_experiment(experiment: str) -> ConfigDict:
    """Return what `get_config(variant)` of an experiment file gives. Raises ConfigError."""
    path, _, variant = experiment.partition(":")
    module = load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(variant='') -> ConfigDict")
    with running(path, "get_config()"):
        if variant and not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"it has no variants; leave out ':{variant}'")
        cfg = module.get_config(variant) if variant else module.get_config()
    if not isinstance(cfg, ConfigDict):
        raise ConfigError(f"{path}: get_config returns {kind_of(cfg)}, not a ConfigDict")
    with running(path, "the config of get_config()"):
        return conform(cfg.to_dict())


@contextmanager
def running(path: str, what: str) -> Iterator[None]:
    """Turn whatever the code of an experiment file raises, sys.exit too, into a ConfigError.

    It names the last line of the file that was running. Signals pass through.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:
        absolute = os.path.abspath(path)
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == absolute]
        place = f"{path}:{lines[-1]}" if lines else path
        said = f"{what} calls sys.exit" if isinstance(error, SystemExit) else explain(error)
        raise ConfigError(f"{place}: {said}") from error


def explain(error: BaseException) -> str:
    """Return what an exception says; of ml_collections' messages the first and the last line."""
    try:
        text = str(error if isinstance(error, UserError | SyntaxError) else error.args[0])
    except Exception:  # no arguments, or their own __str__ fails
        text = ""
    if isinstance(error, UserError):
        return text
    if isinstance(error, AttributeError):
        present = r" Other fields present: .*?\}\"?(\\n|\n|$)"
        text = re.sub(present, " ", text, flags=re.DOTALL).strip("' ")
    name = "" if isinstance(error, AttributeError) else f"{type(error).__name__}: "
    text = " ".join(f"{name}{text}".split()).removesuffix(":")
    return text if len(text) <= 500 else f"{text[:500]}..."


def load_module(path: str) -> ModuleType:
    """Import the Python file at `path`. Raises ConfigError where it is missing or broken."""
    found = Path(path)
    try:
        missing = not found.is_file()
        near = sorted(str(p) for p in found.parent.glob("*.py") if p.name[0] != "_")
    except OSError as error:  # a name that is too long, a folder without permission
        raise ConfigError(f"can't read {show(path)}: {error.strerror}") from error
    if missing:
        guess = difflib.get_close_matches(path, near, 1) or near[:5]
        hint = f"; did you mean {' or '.join(guess)}?" if guess else ""
        raise ConfigError(f"no experiment file {show(path).strip(chr(39))}{hint}")
    if found.suffix != ".py":
        raise ConfigError(f"{path} is not an experiment: its name must end in .py")
    with running(path, "the file"):
        spec = importlib.util.spec_from_file_location(found.stem, path)
        if spec is None or spec.loader is None:
            raise ImportError("it can't be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def conform(given: dict[str, Any]) -> ConfigDict:
    """Return the base config with these values of every section. Raises ConfigError.

    All sections and fields must be there, and no others; `check_config` looks at the values.
    """
    cfg, problems = base_config(), []
    known = [name for name, _ in fields(cfg)]
    for section, values in given.items():
        if not isinstance(values, dict):
            problems.append(f"the section {show(section)} is {kind_of(values)}, not a ConfigDict")
            known = [name for name in known if name.split(".")[0] != section]
            continue
        for name, value in values.items():
            if f"{section}.{name}" in known:
                set_field(cfg, f"{section}.{name}", value)
            else:
                problems.append(unknown_name("config field", f"{section}.{name}", known))
    pairs = [name.split(".") for name in known]
    if missing := [f"{first}.{last}" for first, last in pairs if last not in given.get(first, ())]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"missing: {', '.join(missing[:3])}{more}; start from base_config()")
    if problems:
        raise ConfigError("\n".join(problems))
    return cfg.lock()


def override_config(cfg: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
    """Return a copy of `cfg` with dotted fields set from text, then checked."""
    cfg = cfg.copy_and_resolve_references()
    known = dict(fields(cfg))
    for name, text in overrides.items():
        if name not in known:
            raise ConfigError(unknown_name("config field", name, list(known)))
        section, field = name.split(".")
        cfg[section][field] = parse_value(name, text, known[name])
    check_config(cfg)
    return cfg.lock()


def set_field(cfg: ConfigDict, name: str, value: Any) -> None:
    """Set a dotted field to a value of any type; `check_config` names a wrong one."""
    section, field = name.split(".")
    with cfg.unlocked(), cfg.ignore_type():
        try:
            cfg[section][field] = value
        except (OverflowError, TypeError, ValueError) as error:  # 10**400 where a float belongs
            raise ConfigError(f"{name}={show(value)}: {error}") from None


def parse_value(name: str, text: str, default: Any) -> Any:
    """Return `text` as the type of `default` (bool, int, float, str or tuple of int)."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, int):
            return read_int(text)
        if isinstance(default, float):
            return read_float(text)
        if isinstance(default, tuple):
            value = ast.literal_eval(text)
            return tuple(value) if isinstance(value, tuple | list) else (value,)
        return text
    except (KeyError, TypeError, ValueError, SyntaxError, RecursionError, MemoryError):
        shown = show(default)
        raise ConfigError(
            f"{name}={show(text)} is not {kind_of(default)}, such as {shown}"
        ) from None


def check_config(cfg: ConfigDict) -> None:
    """Raise ConfigError with every field that has a wrong type, range, choice or partner."""
    problems = []
    defaults = dict(fields(base_config()))
    for name, value in fields(cfg):
        problems += field_problems(name, value, defaults[name])
    problems = problems or partner_problems(cfg)
    if problems:
        raise ConfigError("\n".join(problems))


def to_json(cfg: ConfigDict) -> str:
    """Return the config as JSON text that `from_json` reads back."""
    return json.dumps(cfg.to_dict(), indent=2) + "\n"


def from_json(text: str, origin: str = "config.json") -> ConfigDict:
    """Return the checked config in `text`. Raises ConfigError, naming `origin`."""
    cfg = base_config()
    known = [name for name, _ in fields(cfg)]
    try:
        for section, values in json.loads(text).items():
            for name, value in values.items():
                if f"{section}.{name}" not in known:
                    field = unknown_name("config field", f"{section}.{name}", known)
                    raise ConfigError(f"{field}; the file was written by another version")
                value = tuple(value) if isinstance(value, list) else value
                set_field(cfg, f"{section}.{name}", value)
        check_config(cfg)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{origin} is not a config: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return cfg.lock()


def config_hash(cfg: ConfigDict) -> str:
    """Return 16 hex digits that name what a resolved config changes of the defaults.

    So a sweep's trials keep their names when a later version has more fields.
    """
    defaults = dict(fields(base_config()))
    changed = {name: value for name, value in fields(cfg) if value != defaults[name]}
    text = json.dumps(changed, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Return (field, old value, new value) wherever two configs differ."""
    after = dict(fields(new))
    return [(name, value, after[name]) for name, value in fields(old) if value != after[name]]


def cache_dir(cfg: ConfigDict) -> Path:
    """Return the folder that holds token stores and downloads."""
    return cache_path(cfg.data.cache_dir)


def cache_path(cache_dir: str) -> Path:
    """Return the folder that data.cache_dir stands for."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_dir or Path(base) / "nanojaxgpt").expanduser()
