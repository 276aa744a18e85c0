"""In: a MODEL. Out: a run directory, a folder or file of another format, or what `check` finds."""

from pathlib import Path
from typing import Any

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, chosen_step, open_model_config
from nanojaxgpt.console import warn
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError

RUN = ("RUN", "the run directory to write")
FOLDER = ("FOLDER", "the folder to write, or the file of gguf")
FORMATS, DTYPES = ("hf", "gguf", "peft"), ("float32", "bfloat16", "float16", "q8_0")
# Text of several kinds, to see whether the tokenizer gives it back, and that the loss is a number.
SAMPLE = (
    "The capital of France is Paris.\n\ndef area(radius):\n    return 3.14159 * radius ** 2\n\n"
    "Größe: 12 µm, naïve café; 你好 🙂\n"
)


def open_two(
    name: str, about: str | None, arguments: list[str], options: dict[str, Any],
    target: tuple[str, str],
) -> tuple[Any, Path, Any]:  # fmt: skip
    """Return the parsed arguments of a command with a MODEL and a target, that, and the config."""
    place, about_it = target
    more = {"target": {"metavar": place, "help": about_it}}
    parsed, cfg = open_model_config(name, about, arguments, options, more)
    if not parsed.target:
        raise ConfigError(f"{name} needs a model and a target: nanojaxgpt {name} MODEL {place}")
    rundir.check_folder(place, Path(parsed.target).parent)
    return parsed, Path(parsed.target), cfg


def import_model(arguments: list[str]) -> None:
    """Write a model of another format as a run directory, after it was checked."""
    parsed, target, cfg = open_two("import", import_model.__doc__, arguments, {}, RUN)
    from nanojaxgpt import language_model

    model = language_model.open_model(parsed.source, cfg, None, chosen_step(parsed), warn)
    for line in forward_lines(model):
        warn(line)
    model.save(target)
    print(f"{target}: from {parsed.run}")


def export(arguments: list[str]) -> None:
    """Write a model as a Hugging Face folder, a GGUF file for llama.cpp, or its adapters for peft.

    But for peft, adapters are merged.
    """
    options = {
        "format": {"default": "hf", "choices": FORMATS, "help": "default: hf"},
        "dtype": {"default": "", "choices": DTYPES, "help": "default: that of the parameters"},
    }
    parsed, target, cfg = open_two("export", export.__doc__, arguments, options, FOLDER)
    from nanojaxgpt import language_model

    model = language_model.open_model(parsed.source, cfg, None, chosen_step(parsed), warn)
    model.save(target, parsed.format, parsed.dtype)
    print(f"{target}: {parsed.run} as {parsed.format}")


def check(arguments: list[str]) -> None:
    """Check a model: its files, shapes, tokenizer, chat template, memory, and a forward pass."""
    parsed, cfg = open_model_config("check", check.__doc__, arguments, {})
    from nanojaxgpt import language_model, memory
    from nanojaxgpt.model.parameters import count_params, parameters

    model = language_model.open_model(parsed.source, cfg, None, chosen_step(parsed), warn)
    shape = model.config
    kind = "run" if isinstance(parsed.source, Path) else parsed.source.family
    heads = f"{shape.num_heads} heads"
    if shape.num_kv_heads != shape.num_heads:
        heads += f" ({shape.num_kv_heads} of keys)"
    held, cache, has = map(memory.readable, (
        memory.shard_bytes(model.params), memory.cache_bytes(shape, 1, shape.seq_len),
        memory.device_bytes(model.mesh),
    ))  # fmt: skip
    rows: list[tuple[str, str]] = [
        ("model", f"{kind}: {shape.num_layers} layers x {shape.embed_dim}, {heads}, context "
                  f"{shape.seq_len:,}, vocabulary {shape.vocab_size:,}"),
        ("parameters", f"{count_params(shape):,} in {len(parameters(shape))} arrays"),
        ("memory", f"{held} as {shape.param_dtype}, {cache} of cache a row; here are {has}"),
        ("tokenizer", tokenizer_line(model)),
        ("template", template_line(model)),
    ]  # fmt: skip
    rows += [tuple(line.split(": ", 1)) for line in forward_lines(model)]  # pyright: ignore
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        print(f"{name:<{width}}{text}")


def tokenizer_line(model: Any) -> str:
    """Return how many tokens there are, which of them end a text, and whether text comes back."""
    from nanojaxgpt.data.exactness import find_loss

    tokenizer = model.tokenizer
    ends = ", ".join(map(str, sorted(model.end_ids))) or "none"
    loss = find_loss(tokenizer)
    exact = f"lossy: {loss}" if loss else "every text comes back as it was"
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, end ids {ends}; {exact}"


def template_line(model: Any) -> str:
    """Return whether the chat template can be used. Raises DataError where it can't."""
    if not model.chat_template:
        return "none: a base model"
    ids = model.template.encode([{"role": "user", "content": "Hello"}])
    return f"{len(model.chat_template):,} characters; a greeting is {len(ids)} tokens"


def forward_lines(model: Any) -> list[str]:
    """Return the line about a forward pass. Raises CheckpointError where it is not finite."""
    import numpy as np

    try:
        ids = model.tokenizer.encode(SAMPLE).tolist()
    except DataError:  # a tokenizer of few characters, or of words
        ids = list(range(min(64, model.tokenizer.vocab_size)))
    ids = ids[: model.config.seq_len]
    logits_TV = model.logits([ids])[0].astype(np.float64)
    if not np.isfinite(logits_TV).all():
        raise CheckpointError(f"{model.run}: the logits of {len(ids)} tokens are not finite")
    top_T = logits_TV.max(-1)
    norm_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(-1))
    losses = norm_T[:-1] - logits_TV[np.arange(len(ids) - 1), ids[1:]]
    chance = np.log(model.tokenizer.vocab_size)
    return [f"forward: {len(ids)} tokens of mixed text, loss {losses.mean():.3f} "
            f"(by chance {chance:.3f})"]  # fmt: skip


COMMANDS = {
    "import": Command(
        import_model, "MODEL RUN", "a run directory from a model", order=12, writes_files=True
    ),
    "export": Command(
        export, "MODEL FOLDER [--format=hf|gguf|peft]", "for transformers, vLLM, llama.cpp",
        order=13, writes_files=True,
    ),
    "check": Command(check, "MODEL", "files, shapes, tokenizer, memory, a forward pass", order=14),
}  # fmt: skip
