"""In: the arguments of `nanojaxgpt sample`. Out: the text that a model continues."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt.arguments import Command, chosen_step, open_for_sampling
from nanojaxgpt.config.sections import Sample
from nanojaxgpt.console import printable, warn
from nanojaxgpt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nanojaxgpt.data.tokenizers import Tokenizer


def sample(arguments: list[str]) -> None:
    """Generate text from a prompt with a model, and print it as it is drawn."""
    parsed, cfg = open_for_sampling("sample", sample.__doc__, arguments)
    how, default = cfg.sample, Sample().prompt
    from nanojaxgpt import language_model

    model = language_model.open_model(parsed.source, cfg, parsed.mesh, chosen_step(parsed), warn)
    prompt = read_prompt(model.tokenizer, how.prompt, default)
    if len(prompt) > cfg.model.seq_len:
        warn(
            f"the prompt has {len(prompt)} tokens; the model sees the last {cfg.model.seq_len}, "
            "its context"
        )
    shown = model.tokenizer.decode(prompt)
    choice = how.given()
    del choice["prompt"], choice["num_samples"]
    texts = print_texts(model.stream([prompt] * how.num_samples, **choice), shown)
    if isinstance(parsed.source, Path):
        written = dict(prompt=how.prompt, sampling=how.given())
        save_samples(parsed.source, [written | {"text": shown + one} for one in texts])


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


def print_texts(chunks: Iterable[list[str]], prompt: str) -> list[str]:
    """Print the prompt and the first text as it is drawn, then the others; return all texts."""
    print(prompt, end="", flush=True)
    texts: list[str] = []
    for parts in chunks:
        print(printable(parts[0]), end="", flush=True)
        texts = [text + part for text, part in zip(texts or [""] * len(parts), parts, strict=True)]
    print()
    for text in texts[1:]:
        print("-" * 40 + f"\n{prompt}{printable(text)}")
    return texts


def save_samples(run: Path, samples: list[dict[str, Any]]) -> None:
    """Append the samples to the run's samples/samples.jsonl, where it can be written."""
    try:
        (run / "samples").mkdir(exist_ok=True)
        with open(run / "samples" / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
    except OSError as error:
        warn(f"can't save the samples in {run}: {error.strerror}")


COMMANDS = {
    "sample": Command(sample, "MODEL --prompt=TEXT", "generate text from a prompt", order=3)
}
