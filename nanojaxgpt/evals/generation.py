"""In: prompts as ids. Out: the texts that greedy decoding gives, in batches of few shapes."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax

from nanojaxgpt import memory
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.evals.scoring import Shape, choose_shapes
from nanojaxgpt.language_model import LOWER, LanguageModel
from nanojaxgpt.sample import Sampling, padded_length, stream
from nanojaxgpt.text_stream import TextStream

MOST_ROWS = 16  # of a batch


def generate_texts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    until: Sequence[str],
    known: Callable[[int], bool] = lambda number: False,
    each: Callable[[Sequence[tuple[int, list[int]]]], Iterator[tuple[int, list[int]]]] = iter,
) -> Iterator[tuple[int, dict[int, str]]]:
    """Yield the cache's length and the texts of each batch, by their prompts' numbers.

    A text ends before a string of `until`, an end id, or after `max_tokens`. Of a prompt that
    leaves no room for them the end counts. Batches that are all `known` are left out. Raises
    ConfigError, MemoryExceeded.
    """
    cfg = model.config
    room = cfg.seq_len - max_tokens
    if room < 1:
        raise ConfigError(
            f"{max_tokens} tokens to generate leave no room for a prompt in a context of "
            f"{cfg.seq_len}"
        )
    cut = [list(prompt)[-room:] for prompt in prompts]
    batches = [
        (slots, those)
        for slots, those in plan_prompts([len(prompt) for prompt in cut], room, max_tokens)
        if not all(map(known, those))
    ]
    how = Sampling(0.0, vocab_size=model.tokenizer.vocab_size, end_ids=model.end_ids)
    for slots, those in each(batches):
        rows = [cut[number] for number in those]
        cache = memory.cache_bytes(cfg, len(rows), slots)
        held = {"parameters": 2 * memory.shard_bytes(model.params), "cache": cache}
        memory.check("the evaluation", held, model.mesh, lambda: LOWER)
        texts = [TextStream(model.tokenizer, row, until, model.end_ids) for row in rows]
        with model.on_devices("the evaluation"):
            chunks = stream(
                cfg, model.params, rows, max_tokens=max_tokens, rng=jax.random.key(0), how=how,
                slots=slots,
            )  # fmt: skip
            for chunk in chunks:
                for text, new in zip(texts, chunk.tolist(), strict=True):
                    text.add(new)
                if all(text.finish for text in texts):
                    break
        for text in texts:
            text.close()
        yield slots, {number: text.text for number, text in zip(those, texts, strict=True)}


def plan_prompts(lengths: Sequence[int], room: int, max_tokens: int) -> list[tuple[int, list[int]]]:
    """Return (slots of the cache, numbers of prompts) of each batch, the longest first.

    All batches of a length have as many rows: the last one repeats its first prompt.
    """
    shapes = [Shape(0, padded_length(length, room), max_tokens) for length in lengths]
    chosen = choose_shapes(shapes)
    members: dict[int, list[int]] = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        slots = chosen[shapes[number]].length + math.ceil(max_tokens / 64) * 64
        members.setdefault(slots, []).append(number)
    batches = []
    for slots, those in members.items():
        rows = math.ceil(len(those) / math.ceil(len(those) / MOST_ROWS))
        for first in range(0, len(those), rows):
            part = those[first : first + rows]
            batches.append((slots, part + part[:1] * (rows - len(part))))
    return batches
