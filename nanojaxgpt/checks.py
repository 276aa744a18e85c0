"""In: the fields of a config. Out: messages about one that is wrong, or that contradicts another.

No jax here, and no fields: config/sections.py has them, with their ranges and choices.
"""

import functools
import math
import re
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanojaxgpt.names import nearest

if TYPE_CHECKING:  # the sections' package imports this module
    from nanojaxgpt.config.sections import Config, Optim, Rule

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string",
         tuple: "a tuple", list: "a list", type(None): "None"}  # fmt: skip
DIGEST = re.compile(r"\s*[0-9a-fA-F]{64}\s*")
# The objectives, losses of preferences among them, that read a field of the section.
PREFERENCES = ("dpo", "ipo", "orpo", "simpo")
READ_BY = {
    "loss": PREFERENCES, "beta": PREFERENCES, "label_smoothing": ("dpo", "simpo"),
    "margin": ("simpo", "reward"), "nll_weight": ("dpo", "ipo", "simpo"), "centering": ("reward",),
    "teacher": ("distill",), "temperature": ("distill",), "jsd_beta": ("distill",),
} | dict.fromkeys(
    ("group_size", "max_tokens", "sample_temperature", "aggregation", "ratio", "clip_low",
     "clip_high", "kl", "updates", "reward", "reward_seconds"), ("policy",),
)  # fmt: skip
LARGEST_FACTOR = 1e30  # of a learning rate: as large as the rate itself may be
SHOWN = 100  # characters of a value in a message

_INTEGER = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?((\d+(_\d+)*\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf)", re.ASCII | re.I)


def read_float(text: str) -> float:
    """Return the number in ASCII digits, NaN and infinity included. Raises ValueError."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{show(text)} is not a number")
    return float(text)


def read_int(text: str) -> int:
    """Return the integer in ASCII digits, `2000` or `2e3`. Raises ValueError."""
    if _INTEGER.fullmatch(text):
        return int(text)
    number = read_float(text)
    vanished = not number and re.search("[1-9]", text.lower().partition("e")[0])  # 1e-400
    if vanished or not math.isfinite(number) or number != int(number):
        raise ValueError(f"{show(text)} is not an integer")
    return int(number)


def show(value: Any) -> str:
    """Return `repr(value)`, cut where it is long; of a value whose repr fails, its type."""
    try:
        text = repr(value)
    except Exception:  # integers over 4,300 digits, deep nesting, other people's __repr__
        return f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def kind_of(value: Any) -> str:
    """Return the type of a value in words."""
    return KINDS.get(type(value)) or f"a {type(value).__name__}"


def range_problem(number: float, low: float, high: float) -> str:
    """Return `must be ...` where a number is outside [low, high] or NaN, else ""."""
    if low <= number <= high:
        return ""
    limit = "below 1, as a float32 too" if 1 - 2**-20 < high < 1 else f"at most {high:,.10g}"
    if number > high:
        return f"must be {limit}"
    if number < low:
        return f"must be at least {low:g}"
    return f"must be at least {low:g} and {limit}"


def text_problem(name: str, text: str) -> str:
    """Return what is wrong with a string that becomes a path, a pattern or a prompt, or ""."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{name}={show(text)} is not valid Unicode: it contains an unpaired surrogate"
    if "\0" in text and name != "sample.prompt":
        return f"{name}={show(text)} contains a NUL character"
    return ""


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the compiled pattern, without Python's warnings of what it may mean one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.compile(pattern)


def pattern_problem(pattern: str) -> str:
    """Return what is wrong with a regular expression, or ""."""
    try:
        compile_pattern(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        return f"{show(pattern)} is not a regular expression: {reason}"
    return ""


def parse_multiplier(entry: str) -> tuple[str, float]:
    """Return (pattern, factor) of an entry of optim.rate_multipliers. Raises ValueError."""
    pattern, _, factor = entry.rpartition("=")
    try:
        number = read_float(factor)
    except ValueError:
        number = math.nan
    if not pattern or not 0 <= number <= LARGEST_FACTOR:
        raise ValueError(
            f"{show(entry)} is not PATTERN=FACTOR with a factor of at least 0, as in embed_VD=0.1"
        )
    if problem := pattern_problem(pattern):
        raise ValueError(problem)
    return pattern, number


def field_problems(name: str, value: Any, rule: "Rule") -> list[str]:
    """Return what is wrong with one field by itself."""
    default = rule.default
    if isinstance(default, float) and type(value) is int:
        huge = math.inf if value > 0 else -math.inf
        value = float(value) if abs(value) < 2**1000 else huge
    if type(value) is not type(default):
        return [f"{name}={show(value)} is {kind_of(value)}, not {kind_of(default)}"]
    items = value if isinstance(value, tuple) else (value,)
    if any(type(item) is not rule.item for item in items):
        wanted = "integers" if rule.item is int else "strings"
        return [f"{name}={show(value)} must contain only {wanted}"]
    for item in items:
        if rule.choices and item not in rule.choices:
            hint = nearest(item, rule.choices)
            return [f"{name}={show(item)} must be one of {', '.join(rule.choices)}{hint}"]
        if isinstance(item, str) and (problem := text_problem(name, item)):
            return [problem]
        if not isinstance(item, str) and (problem := range_problem(item, rule.low, rule.high)):
            return [f"{name}={show(value)} {problem}"]
    return []


def partner_problems(cfg: "Config") -> list[str]:
    """Return the contradictions between fields."""
    model, train, problems = cfg.model, cfg.train, optim_problems(cfg.optim)
    problems += objective_problems(cfg)
    if not model.head_dim and model.embed_dim % model.num_heads:
        problems.append(
            f"model.embed_dim={model.embed_dim} is not divisible by "
            f"model.num_heads={model.num_heads}; change one, or set model.head_dim"
        )
    if model.num_heads % (model.num_kv_heads or model.num_heads):
        problems.append(
            f"model.num_heads={model.num_heads} is not divisible by "
            f"model.num_kv_heads={model.num_kv_heads}"
        )
    if model.positions == "sinusoidal" and model.embed_dim % 2:
        problems.append(f"sinusoidal positions need an even embed_dim, not {model.embed_dim}")
    for name in ("windows", "mlp_dims"):
        if not getattr(model, name):
            problems.append(f"model.{name} is empty; (0,) means none of its own")
    doublings = math.log2(train.batch_size / (train.ramp_batch_size or train.batch_size))
    ramps = doublings >= 1 and doublings.is_integer() and train.ramp_steps > 0
    if (train.ramp_batch_size or train.ramp_steps) and not ramps:
        problems.append(
            f"train.ramp_batch_size={train.ramp_batch_size} must reach "
            f"train.batch_size={train.batch_size} by doubling, over at least one step; now "
            f"train.ramp_steps={train.ramp_steps}"
        )
    if train.batch_size % train.accumulation_steps:
        problems.append(
            f"train.batch_size={train.batch_size} is not divisible by "
            f"train.accumulation_steps={train.accumulation_steps}"
        )
    if model.seq_len % train.loss_chunks:
        problems.append(
            f"model.seq_len={model.seq_len} is not divisible by "
            f"train.loss_chunks={train.loss_chunks}"
        )
    if "" in cfg.sample.stop:
        problems.append(
            "sample.stop contains an empty string, which would end every text at once; leave it out"
        )
    if cfg.data.sha256 and not all(map(DIGEST.fullmatch, cfg.data.sha256.split(","))):
        problems.append(
            f"data.sha256={show(cfg.data.sha256)} must be a SHA-256 in 64 hex digits, or "
            "several separated by commas"
        )
    problems += lora_problems(cfg)
    mesh = asdict(cfg.mesh)
    if list(mesh.values()).count(-1) > 1:
        problems.append(f"only one mesh axis can be -1 (all other devices): {mesh}")
    if cfg.init.state == "all" and not cfg.init.from_run:
        problems.append("init.state=all needs a run to branch from: set init.from_run")
    if cfg.init.from_run and cfg.init.from_model:
        problems.append("init.from_run and init.from_model both say where to start: set one")
    if 0 in mesh.values():
        problems.append(f"a mesh axis of size 0 has no devices: {mesh}; use 1 for an unused axis")
    return problems


def objective_problems(cfg: "Config") -> list[str]:
    """Return the contradictions of the objective with its own fields, the data and the loss."""
    objective, problems = cfg.objective, []
    kind = objective.kind
    name = objective.loss if kind == "preference" else kind
    for field, rule in objective.rules().items():
        value = getattr(objective, field)
        if value != rule.default and name not in READ_BY.get(field, (name,)):
            problems.append(
                f"objective.{field}={show(value)} has no effect with {name}: it is read by "
                f"{', '.join(READ_BY[field])}"
            )
    if kind == "distill" and not objective.teacher:
        problems.append("objective.kind=distill needs a model to learn from: objective.teacher")
    if kind == "policy" and not objective.reward:
        problems.append("objective.kind=policy needs objective.reward=FILE.py:FUNCTION")
    if kind in ("classify", "preference", "reward") and cfg.data.packing != "pack":
        problems.append(f"objective.kind={kind} needs whole examples: set data.packing=pack")
    if kind != "language" and cfg.train.z_loss:
        problems.append(f"train.z_loss={cfg.train.z_loss} has no effect with {name}")
    if kind == "reward" and cfg.model.num_labels > 1:
        problems.append(f"a reward is one number, but model.num_labels={cfg.model.num_labels}")
    return problems


def lora_problems(cfg: "Config") -> list[str]:
    """Return the contradictions of `lora` with other sections, and its patterns that can't be read.

    Whether a target is found is known once the model is.
    """
    problems = [pattern_problem(pattern) for pattern in cfg.lora.targets]
    problems = [f"lora.targets: {problem}" for problem in problems if problem]
    if cfg.lora.rank and not (cfg.init.from_run or cfg.init.from_model):
        problems.append(
            f"lora.rank={cfg.lora.rank} adapts a model: set init.from_model or init.from_run"
        )
    if cfg.lora.rank and cfg.optim.trainable_layers:
        problems.append("lora.rank and optim.trainable_layers are both set: set one of them to 0")
    if cfg.lora.base_dtype and not cfg.lora.rank:
        problems.append(
            f"lora.base_dtype={cfg.lora.base_dtype} is of the base of adapters: set lora.rank"
        )
    if cfg.lora.rank and cfg.init.state == "all":
        problems.append(
            "init.state=all continues a whole run, without new adapters: set lora.rank=0"
        )
    return problems


def optim_problems(optim: "Optim") -> list[str]:
    """Return the contradictions within `optim`, and its patterns that can't be read."""
    problems = []
    if optim.independent_decay and not optim.learning_rate:
        problems.append("optim.independent_decay needs an optim.learning_rate above 0")
    if optim.optimizer == "schedule_free" and optim.schedule != "constant":
        problems.append(
            f"schedule_free replaces the schedule optim.schedule={optim.schedule}: "
            "set optim.schedule=constant"
        )
    if optim.optimizer == "schedule_free" and optim.ema_decay:
        problems.append("schedule_free already averages: leave optim.ema_decay at 0")
    if optim.spike_factor and not (optim.spike_factor > 1 and optim.max_skipped_steps):
        problems.append(
            f"optim.spike_factor={optim.spike_factor} must be above 1, and needs "
            "optim.max_skipped_steps of at least 1"
        )
    if problem := pattern_problem(optim.decay_pattern):
        problems.append(f"optim.decay_pattern={problem}")
    for entry in optim.trainable:
        if problem := pattern_problem(entry.removeprefix("!")):
            problems.append(f"optim.trainable: {problem}")
    for entry in optim.rate_multipliers:
        try:
            parse_multiplier(entry)
        except ValueError as error:
            problems.append(f"optim.rate_multipliers: {error}")
    return problems
