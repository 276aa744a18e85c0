"""Guesses at the next tokens of an answer: what followed before, or what a smaller model draws.

A step verifies them by drawing each token itself, so they change how many steps an answer takes,
and no bit of it. Dimensions as in slots.py, with D drafts of a slot.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.attention.cache import Cache
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate.device import CachedModel, Chunk, DeviceSlots, Layouts
from nanojaxgpt.generate.slots import (
    ALL,
    WORD,
    Facts,
    Slots,
    draw_tokens,
    placed_cache,
    using,
)
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.sharding import constrain

LOOKAHEAD = 4  # drafts of a draft model, unless another number is asked for
REPEAT_SIZES = (3, 2)  # ids that must be the same for what followed them to be a guess


class Repeats:
    """Guesses at the next ids: those that followed the last few where they stood before."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # some ids -> the place after them, the last
        self.add(ids)

    def add(self, ids: Sequence[int]) -> None:
        """Take ids that follow."""
        for token in ids:
            for size in REPEAT_SIZES:
                if len(self._ids) >= size:
                    self._after[tuple(self._ids[-size:])] = len(self._ids)
            self._ids.append(token)

    def guess(self, count: int) -> list[int]:
        """Return `count` ids, or none; what repeats itself goes on repeating."""
        for size in REPEAT_SIZES:
            if (place := self._after.get(tuple(self._ids[-size:]))) is not None:
                found = self._ids[place : place + count]
                while len(found) < count:
                    found += found[: count - len(found)]
                return found
        return []


class DraftModel(CachedModel):
    """A smaller model that reads what an engine's slots read, and guesses what they will draw.

    Raises ConfigError where its tokens or its devices are others.
    """

    def __init__(self, draft: LanguageModel, device: DeviceSlots, layouts: Layouts) -> None:
        check_draft(draft, device.model)
        super().__init__(draft, device.slots, device.context, device.width, layouts)
        self._device = device

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Read chunks, those that begin in the draft model's context."""
        super().read([chunk._replace(is_scored=False) for chunk in chunks])

    def guess(self, rows: Sequence[int]) -> jax.Array:
        """Return drafts [B, D] of some rows, on the devices; -1: none."""
        asked_B = np.isin(np.arange(self.slots), rows)
        self._cache, drafts_BD = draw_drafts(
            self._facts, self.width - 1, self._params, self._cache, self._device.drawing, asked_B
        )
        return drafts_BD


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def draw_drafts(
    facts: Facts,
    count: int,
    params: Params,
    cache: tuple[Cache, ...],
    slots: Slots,
    asked_B: jax.Array,
) -> tuple[tuple[Cache, ...], jax.Array]:
    """Return the draft model's cache `count` tokens on, and the drafts [B, count]; -1: none.

    A slot reads its last token and then its drafts. It draws each as a step does, with the same
    options and the key of the same position: two models that agree on a distribution agree on the
    draw. The last draft is read as well, as all may be accepted; nothing is computed if none are
    asked for. Slots that aren't asked, or whose context is full, write behind all text.
    """
    rows, vocab_size = slots.counts_BV.shape
    asked_B &= slots.positions_B < facts.context
    no_drafts_BD = jnp.zeros((rows, 0), jnp.int32)
    all_BX = jnp.full((rows, -(-vocab_size // WORD)), ALL)

    def draw(number: jax.Array, carry: tuple) -> tuple:
        cache, tokens_B, counts_BV, drafts_BW = carry
        positions_B = slots.positions_B + number
        reads_B = asked_B & (positions_B < facts.context)
        positions_B = jnp.where(reads_B, positions_B, facts.context)
        used = jnp.max(jnp.where(reads_B, positions_B + 1, 0))
        found: Any = facts.model.apply(
            {"params": params}, tokens_B[:, None], positions_B[:, None], cache=using(cache, used)
        )
        logits_B1V, cache = found
        drawn_B = draw_tokens(
            facts, with_vocabulary(logits_B1V[:, 0], vocab_size),
            slots._replace(counts_BV=counts_BV), no_drafts_BD, all_BX, positions_B[:, None] + 1,
        )[:, 0]  # fmt: skip
        drafts_BW = drafts_BW.at[:, number].set(jnp.where(reads_B, drawn_B, -1))
        counts_BV = counts_BV.at[jnp.arange(rows), drawn_B].add(1)
        return placed_cache(cache), drawn_B, counts_BV, drafts_BW

    none_BW = jnp.full((rows, count + 1), -1)
    times = jnp.where(jnp.any(asked_B), count + 1, 0)
    carry = placed_cache(cache), slots.tokens_B, slots.counts_BV, none_BW
    cache, _, _, drafts_BW = jax.lax.fori_loop(0, times, draw, carry)
    return placed_cache(cache), constrain(drafts_BW[:, :count], None, None)


def with_vocabulary(logits_BV: jax.Array, size: int) -> jax.Array:
    """Return logits of `size` ids: tables of one tokenizer are padded to different sizes."""
    more = size - logits_BV.shape[1]
    if more <= 0:
        return logits_BV[:, :size]
    return jnp.pad(logits_BV, ((0, 0), (0, more)), constant_values=-jnp.inf)


def check_draft(draft: LanguageModel, model: LanguageModel) -> None:
    """Raise ConfigError where a model can't guess the tokens of another."""
    if not same_ids(draft.tokenizer, model.tokenizer):
        raise ConfigError(
            f"the draft model {draft.run} has another tokenizer than {model.run}, so its ids are "
            "other tokens; choose a smaller model with the same tokenizer"
        )
    if draft.mesh != model.mesh:
        raise ConfigError(
            f"the draft model {draft.run} is on other devices than {model.run}; load both with the "
            "same mesh"
        )


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Return whether ids are the same tokens in both, whichever of them end a text."""
    if one.content_hash() == other.content_hash():
        return True
    if (one.vocab_size, one.control) != (other.vocab_size, other.control):
        return False
    return all(one.piece(token) == other.piece(token) for token in range(one.vocab_size))
