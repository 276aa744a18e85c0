"""One text with a model, turn by turn: its cache is kept, so that nothing is read twice."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.attention.cache import Cache
from nanojaxgpt.errors import DataError
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import (
    Decoding,
    Sampling,
    decode_jit,
    decoding_params_jit,
    empty_cache_jit,
    fill,
    padded_length,
)

CHUNK = 8  # tokens that are drawn in one call
SHORTEST = 16  # of the padded lengths, so that few programs are compiled


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def extend(
    model: Transformer, params: Any, cache: tuple[Cache, ...], ids_T: jax.Array, start: jax.Array
) -> tuple[Cache, ...]:
    """Return the cache of one row with ids from the position `start` on, which see those before."""
    positions_1T = (start + jnp.arange(len(ids_T)))[None]
    _, cache = model.apply({"params": params}, ids_T[None], positions_1T, cache=cache, logits=False)  # pyright: ignore[reportAssignmentType]
    return cache


class Session:
    """One row of ids, of which `held` are in the cache."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.transformer = model, Transformer(model.config)
        self.held: list[int] = []
        self.cache: tuple[Cache, ...] = ()
        with model.on_devices("sampling"):
            self.params = decoding_params_jit(model.config, model.params, 1)

    def draw(
        self, ids: Sequence[int], max_tokens: int, how: Sampling, seed: int = 0
    ) -> Iterator[list[int]]:
        """Yield the ids that follow `ids`, a few at a time, up to an end id or `max_tokens`.

        They are those of LanguageModel.stream, and end where the context is full. Of `ids` what
        the session has not read is read. Raises ValueError where they are longer than the context.
        """
        text, room = list(ids), self.model.config.seq_len - len(ids) + 1
        if not text:
            raise DataError("the chat template gives no token for this conversation")
        if room < 1:
            raise ValueError(f"{len(text)} tokens in a context of {self.model.config.seq_len}")
        with self.model.on_devices("sampling"):
            self.read(text, min(max_tokens, room))
        rng_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(1))
        state = Decoding(
            self.cache, jnp.array([text[-1]], jnp.int32), jnp.array([len(text) - 1], jnp.int32),
            jnp.zeros(1, bool), rng_B,
        )  # fmt: skip
        self.cache, drawn = (), 0  # the decoding owns it
        while drawn < min(max_tokens, room):
            count = min(CHUNK if drawn else 1, max_tokens - drawn, room - drawn)
            with self.model.on_devices("sampling"):
                state, tokens_BC = decode_jit(
                    self.transformer, self.params, state, count, how, CHUNK
                )
                new = np.asarray(tokens_BC)[0, :count].tolist()
            ends = [place for place, token in enumerate(new) if token in how.end_ids]
            new = new[: ends[0] + 1] if ends else new
            text, drawn = text + new, drawn + len(new)
            self.held, self.cache = text[:-1], state.cache
            yield new
            if ends:
                return

    def read(self, ids: list[int], more: int) -> None:
        """Bring all ids but the last into the cache, which gets slots for `more` after them."""
        cfg, same = self.model.config, 0
        while same < min(len(self.held), len(ids) - 1) and self.held[same] == ids[same]:
            same += 1
        new = ids[same:-1]
        padded = padded_length(max(len(new), SHORTEST), cfg.seq_len)
        slots = self.cache[0].k_BKSH.shape[2] if self.cache else 0
        if not same or slots < max(same + padded, len(ids) - 1 + more):
            needed = padded_length(len(ids) + more, cfg.seq_len)
            self.cache = empty_cache_jit(cfg, 1, max(needed, padded_length(len(ids), cfg.seq_len)))
            ids_T = np.zeros(padded_length(len(ids), cfg.seq_len), np.int32)
            ids_T[: len(ids)] = ids
            self.cache = fill(self.transformer, self.params, self.cache, ids_T, np.ones(1, bool))
        elif new:
            ids_T = np.zeros(padded, np.int32)
            ids_T[: len(new)] = new
            start = np.int32(same)
            self.cache = extend(self.transformer, self.params, self.cache, ids_T, start)
        self.held = ids[:-1]
