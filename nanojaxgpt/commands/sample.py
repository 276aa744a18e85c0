"""In: the arguments of `nanojaxgpt sample`. Out: the text that a run's checkpoint continues."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config
from nanojaxgpt.arguments import Command, chosen_step, open_run
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from nanojaxgpt.data.tokenizers import Tokenizer
    from nanojaxgpt.text_stream import TextStream

HELP = {
    "prompt": "the text to continue; empty for a new document",
    "stop": "a string to stop before; repeat the option for several, empty for none",
    "end_ids": "token ids to stop at, besides the tokenizer's end token, as in 5,6",
}


def sample(arguments: list[str]) -> None:
    """Generate text from a prompt with a checkpoint of a run, and print it as it is drawn."""
    defaults = config.base_config().sample
    options: dict[str, dict[str, Any]] = {
        name: {"default": None, "help": HELP.get(name, f"overrides the config's sample.{name}")}
        for name in defaults
    }
    options["stop"]["action"] = "append"
    parsed, cfg = open_run("sample", sample.__doc__, arguments, options)
    if parsed.stop is not None:
        parsed.stop = repr(tuple(filter(None, parsed.stop)))
    given = {f"sample.{name}": getattr(parsed, name) for name in defaults}
    cfg = config.override_config(cfg, {k: v for k, v in given.items() if v is not None})
    run, how = Path(parsed.run), cfg.sample
    from nanojaxgpt.data.loader import load_run_tokenizer
    from nanojaxgpt.text_stream import TextStream

    tokenizer = load_run_tokenizer(run, warn)
    prompt = read_prompt(tokenizer, how.prompt, defaults.prompt)
    if len(prompt) > cfg.model.seq_len:
        warn(
            f"the prompt has {len(prompt)} tokens; the model sees the last {cfg.model.seq_len}, "
            "its context"
        )
    if unknown := [token for token in how.end_ids if token >= tokenizer.vocab_size]:
        raise ConfigError(
            f"sample.end_ids contains {unknown[0]}, but the last id is {tokenizer.vocab_size - 1}"
        )
    end_ids = tuple({*how.end_ids, tokenizer.end_id} - {-1})
    import jax

    from nanojaxgpt import memory, sharding
    from nanojaxgpt.checkpoint import load_params
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.sample import Sampling, stream

    mesh, model_cfg = sharding.make_mesh({}, jax.devices()[:1]), ModelConfig(**cfg.model)
    length = min(model_cfg.seq_len, len(prompt) + how.max_tokens)
    cache = memory.cache_bytes(model_cfg, how.num_samples, length)
    lower = "To use less memory, lower sample.num_samples or sample.max_tokens"
    shown = tokenizer.decode(prompt)
    with memory.explained("sampling", mesh, lambda: lower):
        memory.check_model("sampling", cfg, mesh, cache, lower)
        streams = [TextStream(tokenizer, prompt, how.stop, end_ids) for _ in range(how.num_samples)]
        _, params = load_params(run, model_cfg, mesh, chosen_step(run, parsed.step), warn)
        chunks = stream(
            model_cfg, params, [prompt] * how.num_samples,
            max_tokens=how.max_tokens, rng=jax.random.key(how.seed),
            how=Sampling(
                how.temperature, how.top_k, how.top_p, how.min_p, tokenizer.vocab_size, end_ids
            ),
        )  # fmt: skip
        print_streams(chunks, streams, shown)
    settings = how.to_dict()
    save_samples(
        run,
        [{"prompt": how.prompt, "text": shown + one.text, "sampling": settings} for one in streams],
    )


def read_prompt(tokenizer: "Tokenizer", text: str, default: str) -> list[int]:
    """Return the ids of the prompt; the default one serves every tokenizer.

    Raises ConfigError and DataError where another prompt can't be encoded.
    """
    from nanojaxgpt.text_stream import encode_prompt

    try:
        return encode_prompt(tokenizer, text)
    except (ConfigError, DataError):
        if text != default:
            raise
    warn(
        f"the tokenizer can't encode the default prompt, {default!r}: starting from "
        f"{tokenizer.decode([0])!r}; choose another with --prompt=TEXT"
    )
    return [0]


def print_streams(
    chunks: Iterable["np.ndarray"], streams: Sequence["TextStream"], prompt: str
) -> None:
    """Print the prompt and the first text as it is drawn, then the others; fill all streams."""
    print(prompt, end="", flush=True)
    for chunk in chunks:
        texts = [one.add(ids) for one, ids in zip(streams, chunk.tolist(), strict=True)]
        print(texts[0], end="", flush=True)
        if all(one.finish for one in streams):
            break
    texts = [one.close() for one in streams]
    print(texts[0])
    for one in streams[1:]:
        print("-" * 40 + f"\n{prompt}{one.text}")


def save_samples(run: Path, samples: list[dict[str, Any]]) -> None:
    """Append the samples to the run's samples/samples.jsonl, where it can be written."""
    try:
        (run / "samples").mkdir(exist_ok=True)
        with open(run / "samples" / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
    except OSError as error:
        warn(f"can't save the samples in {run}: {error.strerror}")


COMMANDS = {"sample": Command(sample, "RUN --prompt=TEXT", "generate text from a prompt", order=3)}
