"""The device's arrays of an engine, and its programs called with the engine's plain numbers."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nanojaxgpt import memory
from nanojaxgpt.generate import slots as programs
from nanojaxgpt.generate.requests import MOST_BIASES, Request, TokenScore
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.projection import decoding_params
from nanojaxgpt.model.transformer import Transformer

LOWER = "To use less memory, lower the number of slots or the context"


class Layouts:
    """Parameters of engines as they are laid out for decoding; shared arrays are laid out once."""

    def __init__(self) -> None:
        # By the array's id, which is no other's as long as the array is kept here.
        self._known: dict[tuple[Any, ...], tuple[jax.Array, Any]] = {}
        self._lock = threading.Lock()

    def lay_out(self, model: LanguageModel) -> Params:
        """Return a model's parameters for decoding one row.

        Blocks for several rows make reading prompts 1.4x slower on a CPU, and drawing no faster on
        two cores.
        """
        with self._lock:
            return decoding_params(model.config, model.params, 1, self._apply)

    def _apply(self, change: Callable, array: jax.Array, *static: Any) -> Any:
        key = (change, id(array), *static)
        if key not in self._known:
            numbers = tuple(range(1, 1 + len(static)))
            made = jax.jit(change, static_argnums=numbers)(array, *static)
            self._known[key] = array, made
        return self._known[key][1]


class Chunk(NamedTuple):
    """A part of a prompt to read into a row, from `start` on; `ids` has the token after it too."""

    row: int
    start: int
    ids: tuple[int, ...]
    is_scored: bool


class PendingStep:
    """A step that the device works on; `members` are whom it is for."""

    def __init__(
        self, drawn: programs.Drawn, drafts_BD: Any, members: Sequence[Any], has_scores: bool
    ) -> None:
        self.members, self._drawn, self._has_scores = members, drawn, has_scores
        self._drafts_BD = drafts_BD
        self.ids: list[list[int]] | None = None  # of each row; None: not read yet
        self.draft_counts: list[int] = []  # of each row: how many drafts it had

    def read(self) -> list[list[int]]:
        """Wait for the device, and return the new ids of each row."""
        if self.ids is None:
            counts_B, tokens_BW, drafts_BD = jax.device_get(
                (self._drawn.counts_B, self._drawn.tokens_BW, self._drafts_BD)
            )
            self.ids = [
                tokens_W[:count].tolist()
                for tokens_W, count in zip(tokens_BW, counts_B, strict=True)
            ]
            self.draft_counts = (drafts_BD >= 0).sum(1).tolist()
        return self.ids

    def scores(self) -> Any:
        """Return the scores of all rows' tokens as arrays; None where nobody asks for any."""
        return jax.device_get(self._drawn.scores) if self._has_scores else None


class CachedModel:
    """A model on its devices, with a cache for each of an engine's slots.

    `context` is at most the model's own: no token from there on is read.
    """

    def __init__(
        self, model: LanguageModel, slots: int, context: int, width: int, layouts: Layouts
    ) -> None:
        self.model, self.slots, self.width = model, slots, width
        self.context = min(context, model.config.seq_len)
        self.chunk = min(programs.CHUNK, context)
        self._layouts = layouts
        self._length = programs.cache_length(self.context, width)
        self._facts = programs.Facts(
            Transformer(model.config), model.tokenizer.vocab_size, self.context
        )
        stored, computed = (
            np.dtype(dtype).itemsize
            for dtype in (model.config.param_dtype, model.config.compute_dtype)
        )
        self.parts: dict[str, float] = {  # bytes on each device
            # As given, and for decoding.
            "parameters": memory.shard_bytes(model.params) * (1 + computed / stored),
            "cache": memory.cache_bytes(model.config, slots, self._length),
        }

    def check_memory(self, draft: "CachedModel | None") -> None:
        """Raise MemoryExceeded where the model and its draft model don't fit."""
        beside = {f"draft {name}": size for name, size in (draft.parts if draft else {}).items()}
        memory.check("the engine", {**self.parts, **beside}, self.model.mesh, lambda: LOWER)

    def warm_up(self) -> None:
        """Lay out the parameters, and run each program once on idle slots."""
        self._params = self._layouts.lay_out(self.model)
        self._cache = programs.make_cache(self.model.config, self.slots, self._length)
        self.read([])
        if self.slots > 1:
            self.copy(0, 0, 0)

    def read(self, chunks: Sequence[Chunk]) -> Any:
        """Read chunks; return the scores of the tokens after theirs, or None if none is scored."""
        rows_P = np.zeros(programs.CHUNKS, np.int32)
        starts_P = np.full(programs.CHUNKS, self.context, np.int32)
        ids_PC, targets_PC = np.zeros((2, programs.CHUNKS, self.chunk), np.int32)
        for place, (row, start, ids, _) in enumerate(chunks):
            rows_P[place], starts_P[place] = row, min(start, self.context)
            ids_PC[place, : len(ids) - 1], targets_PC[place, : len(ids) - 1] = ids[:-1], ids[1:]
        has_scores = any(chunk.is_scored for chunk in chunks)
        self._cache, scores = programs.read_chunks(
            self._facts, self._params, self._cache, rows_P, starts_P, ids_PC, targets_PC,
            np.bool_(has_scores),
        )  # fmt: skip
        return jax.device_get(scores) if has_scores else None

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of `count` tokens from one row to another."""
        self._cache = programs.copy_slot(self._cache, *map(np.int32, (source, target, count)))


class DeviceSlots(CachedModel):
    """The slots of an engine on its model's devices."""

    def warm_up(self) -> None:
        """Do the same, and enter a request; the first step is the engine's, with its drafts."""
        super().warm_up()
        self.drawing = programs.make_slots(self.model.config, self.slots)  # beside the cache
        words = -(-self.model.config.vocab_size // programs.WORD)
        self._all_BX = self._place(np.full((self.slots, words), programs.ALL))
        self.enter(0, Request((0,)))

    def _place(self, x: np.ndarray) -> jax.Array:
        """Return an array on all devices, as those of other calls: a program is compiled once."""
        return jax.device_put(x, NamedSharding(self.model.mesh, PartitionSpec()))

    def enter(self, row: int, request: Request) -> None:
        """Let a row draw as a request asks for, from its last token on."""
        ids_A = np.full(MOST_BIASES, self.model.config.vocab_size, np.int32)
        values_A = np.zeros(MOST_BIASES, np.float32)
        for place, (token, value) in enumerate(request.logit_bias):
            ids_A[place], values_A[place] = token, value
        choice = programs.Choice(
            np.uint32(request.seed), np.float32(request.temperature), np.int32(request.top_k),
            np.float32(request.top_p), np.float32(request.min_p),
            np.float32(request.presence_penalty), np.float32(request.frequency_penalty), None,
        )  # fmt: skip
        last, position = np.int32(request.ids[-1]), np.int32(len(request.ids) - 1)
        biased = ids_A, values_A
        self.drawing = programs.enter(self.drawing, np.int32(row), last, position, choice, biased)

    def advance(
        self,
        members: Sequence[Any],
        rows: Sequence[int],
        drafts_BD: Any,
        allowed: Mapping[int, np.ndarray],
        has_scores: bool,
    ) -> PendingStep:
        """Start a step for members, in some rows, with drafts for all (-1: none).

        `allowed` has bits of the ids that some rows may draw; the others may draw any.
        """
        active_B = np.isin(np.arange(self.slots), rows)
        allowed_BX = self._all_BX
        if allowed:
            given_BX = np.full(self._all_BX.shape, programs.ALL)
            for row, bits_X in allowed.items():
                given_BX[row] = 0
                given_BX[row, : len(bits_X)] = bits_X
            allowed_BX = self._place(given_BX)
        self._cache, self.drawing, drawn = programs.advance(
            self._facts, self._params, self._cache, self.drawing, active_B, drafts_BD, allowed_BX,
            np.bool_(has_scores),
        )  # fmt: skip
        return PendingStep(drawn, drafts_BD, members, has_scores)


def make_scores(request: Request, ids: Sequence[int], scores: Any, first: int) -> list[TokenScore]:
    """Return the scores of tokens, from the row `first` on, with as many others as asked for."""
    if request.alternatives < 0 or scores is None:
        return []
    last, count = first + len(ids), request.alternatives
    rows = zip(
        ids, scores.chosen_R[first:last].tolist(), scores.ids_RA[first:last, :count].tolist(),
        scores.likeliest_RA[first:last, :count].tolist(), strict=True,
    )  # fmt: skip
    return [
        TokenScore(token, chosen, tuple(zip(others, likeliest, strict=True)))
        for token, chosen, others, likeliest in rows
    ]
