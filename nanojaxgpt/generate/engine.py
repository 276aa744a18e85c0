"""One thread that owns the devices, and answers many requests at once.

A request waits in a queue, gets a slot, has its prompt read in parts between the steps of the
others, and then draws with them. The program of a step is the same whatever the slots hold, so
a request's bits are its own.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate.answers import Answer, Ticket
from nanojaxgpt.generate.device import (
    Chunk,
    DeviceSlots,
    Layouts,
    PendingStep,
    make_scores,
)
from nanojaxgpt.generate.drafts import LOOKAHEAD, DraftModel
from nanojaxgpt.generate.grammar import Grammars
from nanojaxgpt.generate.requests import (
    EngineFailed,
    Limits,
    Part,
    QueueFull,
    Request,
    TokenScore,
    check_request,
)
from nanojaxgpt.generate.slots import CHUNKS
from nanojaxgpt.language_model import LanguageModel

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event of every XLA compilation
MOST_CONTEXT = 2048  # by default: the caches of all slots are allocated at once


class SlotState:
    """A slot: `held` are the ids, in whole chunks, whose keys it keeps."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.held: tuple[int, ...] = ()
        self.used = 0.0  # when, so that the oldest is given away first
        self.ticket: Ticket | None = None
        self.answer: Answer | None = None
        self.read = -1  # tokens of the prompt in the cache; -1: not begun
        self.prompt_scores: list[TokenScore] = []


class Engine:
    """Answers requests for a model, `slots` of them at once, each in `context` tokens.

    A `context` of 0 is the model's, up to 2,048 tokens. `queue` requests wait at most. `lookahead`
    tokens are guessed and verified in each step: those that a smaller model, `draft`, draws (0: 4
    of them), or else those that followed before. Engines of models that share arrays share them
    too as they are laid out for decoding, if all are given the same `layouts`. Raises ConfigError,
    MemoryExceeded.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 8,
        context: int = 0,
        queue: int = 128,
        lookahead: int = 0,
        draft: LanguageModel | None = None,
        layouts: Layouts | None = None,
    ) -> None:
        seq_len = model.config.seq_len
        context = context or min(seq_len, MOST_CONTEXT)
        lookahead = lookahead or (LOOKAHEAD if draft else 0)
        for name, value, low, high in (
            ("slots", slots, 1, 1024), ("context", context, 1, seq_len),
            ("queue", queue, 1, 1 << 20), ("lookahead", lookahead, 0, 15),
        ):  # fmt: skip
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} must be from {low} to {high:,}")
        self.model, self.slots, self.context = model, slots, context
        self.queue, self.lookahead, self.draft = queue, lookahead, draft
        self.limits = Limits(context, model.tokenizer.vocab_size)
        self.grammars = Grammars(model.tokenizer, model.end_ids)
        self.ready = False
        self.failed: BaseException | None = None
        self.compiles = self.prompt_tokens = self.generated_tokens = 0
        self.draft_tokens = self.accepted_tokens = 0
        layouts = layouts or Layouts()
        self._device = DeviceSlots(model, slots, context, 1 + lookahead, layouts)
        self._draft = DraftModel(draft, self._device, layouts) if draft else None
        self._device.check_memory(self._draft)
        self._rows = [SlotState(row) for row in range(slots)]
        self._reading: collections.deque[tuple[SlotState, Ticket]] = collections.deque()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._ends_at = float("inf")  # on the monotonic clock, once the engine is closing
        self._closing = False
        self._pending: PendingStep | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def queued(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """How many slots have a request."""
        return sum(slot.ticket is not None for slot in self._rows)

    def start(self, wait: bool = True) -> None:
        """Compile everything, then answer; a second call does nothing.

        Raises what kept the engine from starting. Without `wait` it returns at once, and what is
        submitted is answered later.
        """
        if self._thread.ident is None:
            self._thread.start()
        if not wait:
            return
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self.failed)
        if self.failed:
            raise self.failed

    def submit(self, request: Request, on_part: Callable[[Part], None] | None = None) -> Ticket:
        """Return the ticket of a request. `on_part` is called from the engine's thread.

        Raises ConfigError for a request that can't be run, QueueFull, EngineFailed.
        """
        check_request(request, self.limits)
        grammar = self.grammars.begin(request.schema) if request.schema else None
        ticket = Ticket(request, on_part, self._wake, grammar)
        with self._changed:
            if self.failed or self._closing:
                raise EngineFailed(str(self.failed or "the engine is closing"))
            if len(self._waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests wait already")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def close(self, drain: bool = True, grace: float = 30.0) -> None:
        """Take no more requests, answer those that are there within `grace` seconds, and end.

        What is not done by then is cancelled; without `drain` all is.
        """
        with self._changed:
            self._closing = True
            self._ends_at = time.monotonic() + (grace if drain else 0)
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> "Engine":
        """Start."""
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Close; where an exception leaves the context, without answering what is left."""
        self.close(drain=kind is None)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and threading.current_thread() is self._thread:
            self.compiles += 1

    def _run(self) -> None:
        """Be the engine's thread."""
        jax.monitoring.register_event_duration_secs_listener(self._count)
        try:
            with self.model.on_devices("the engine"):
                self._device.warm_up()
                if self._draft:
                    self._draft.warm_up()
                self._advance([]).read()
                with self._changed:
                    self.ready = True
                    self._changed.notify_all()
                while self._turn():
                    pass
            finish, reason = "cancelled", ""
        except BaseException as error:
            finish, reason = "error", f"the engine has failed: {error}"
            self.failed = error
        finally:
            jax.monitoring.unregister_event_duration_listener(self._count)
        with self._changed:
            self.ready, self._closing = False, True
            tickets = [slot.ticket for slot in self._rows if slot.ticket] + [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for slot in self._rows:
            slot.ticket = None
        for ticket in tickets:
            put_safely(ticket, Part(finish=finish, error=reason))

    def _turn(self) -> bool:
        """Do one round: admit, read a chunk, start a step, hand out the last one's tokens.

        The device works on the new step while the host turns the last one's tokens into text. Where
        one of them has a grammar they are handed out first: what may follow depends on the token.
        Returns whether there may be more to do.
        """
        if not self._admit():
            return False
        self._read_prompts()
        if self._pending and self.lookahead and not self._draft:  # guesses follow what was drawn
            ids = self._pending.read()
            for slot, ticket in self._pending.members:
                if slot.ticket is ticket and slot.answer and slot.answer.repeats:
                    slot.answer.repeats.add(ids[slot.row])
        if self._pending and any(ticket.grammar for _, ticket in self._pending.members):
            last, self._pending = self._pending, None
            self._hand_out(last)
        members = [slot for slot in self._rows if self._goes_on(slot)]
        last, self._pending = self._pending, self._advance(members) if members else None
        if last:
            self._hand_out(last)
        return True

    def _goes_on(self, slot: SlotState) -> bool:
        """Return whether a slot draws, also after the step that is on its way."""
        if slot.answer is None:
            return False
        if self._pending is None or (slot, slot.ticket) not in self._pending.members:
            return True
        ids = self._pending.ids
        return slot.answer.goes_on_after(ids[slot.row] if ids is not None else None)

    def _admit(self) -> bool:
        """Drop what was cancelled and give free slots to those that wait.

        Waits where there is nothing to do; returns False once the engine is to end.
        """
        with self._changed:
            self._changed.wait_for(self._has_work)
            over = time.monotonic() >= self._ends_at
            if over or (self._closing and not (self._waiting or self.busy)):
                return False
            dropped = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in dropped:
                self._waiting.remove(ticket)
            cancelled = [slot for slot in self._rows if slot.ticket and slot.ticket.cancelled]
        for ticket in dropped:
            put_safely(ticket, Part(finish="cancelled"))
        for slot in cancelled:
            self._finish(slot, Part(finish="cancelled"))
        with self._changed:
            for _ in range(min(self.slots - self.busy, len(self._waiting))):
                self._give_slot(self._waiting[0])  # while it is queued: never uncounted
                self._waiting.popleft()
        return True

    def _has_work(self) -> bool:
        return bool(self._waiting or self.busy or self._pending or self._closing)

    def _give_slot(self, ticket: Ticket) -> None:
        """Put a request into the free slot that holds most of its prompt and nothing else.

        Else into the one that has been idle longest: what others hold is copied, and stays.
        """

        def rank(slot: SlotState) -> tuple[int, float]:
            common = self._common(slot, ticket.request)
            return common if common == len(slot.held) else 0, -slot.used

        slot = max((slot for slot in self._rows if slot.ticket is None), key=rank)
        slot.ticket, slot.answer, slot.read, slot.prompt_scores = ticket, None, -1, []
        ticket.queued_seconds = ticket.age()
        self._reading.append((slot, ticket))

    def _common(self, slot: SlotState, request: Request) -> int:
        """Return how many tokens of a prompt a slot holds, in whole chunks.

        Those read as chunks alone: drawn ones have other bits. The last token is always read by a
        step, and scores need the whole prompt read.
        """
        if request.echo:
            return 0
        size = self._device.chunk
        most = min(len(slot.held), len(request.ids) - 1) // size * size
        starts = range(0, most, size)
        held, ids = slot.held, request.ids
        differ = (at for at in starts if held[at : at + size] != ids[at : at + size])
        return next(differ, most)

    def _read_prompts(self) -> None:
        """Read the next chunks of the oldest prompts, and let those draw that are read."""
        size, found = self._device.chunk, list[tuple[SlotState, Chunk]]()
        for slot, ticket in self._reading:
            ids, is_scored = ticket.request.ids, ticket.request.echo
            if slot.read < 0:
                self._reuse(slot, ticket.request)
            for start in range(slot.read, len(ids) - 1, size):
                part = ids[start : start + size + 1]
                found.append((slot, Chunk(slot.row, start, part, is_scored)))
            if len(found) >= CHUNKS:
                break
        if found := found[:CHUNKS]:
            chunks = [chunk for _, chunk in found]
            scores = self._device.read(chunks)
            if self._draft:
                self._draft.read(chunks)
            for number, (slot, chunk) in enumerate(found):
                self._note_read(slot, chunk, scores, number * size)
        while self._reading:
            slot, ticket = self._reading[0]
            if slot.read < len(ticket.request.ids) - 1:
                return
            self._reading.popleft()
            self._begin(slot, ticket)

    def _note_read(self, slot: SlotState, chunk: Chunk, scores: Any, first: int) -> None:
        """Take down that a chunk was read; its scores are in the rows from `first` on."""
        assert slot.ticket
        request, count = slot.ticket.request, len(chunk.ids) - 1
        if chunk.is_scored:
            slot.prompt_scores += make_scores(request, chunk.ids[1:], scores, first)
        slot.read = chunk.start + count
        if count == self._device.chunk:
            slot.held = request.ids[: slot.read]
        self.prompt_tokens += count

    def _reuse(self, slot: SlotState, request: Request) -> None:
        """Keep what the slot holds of the prompt, or copy it from one that holds more."""
        slot.read = self._common(slot, request)
        best = max(self._rows, key=lambda other: self._common(other, request))
        if (common := self._common(best, request)) > slot.read:
            self._device.copy(best.row, slot.row, common)
            if self._draft:
                self._draft.copy(best.row, slot.row, common)
            slot.read = common
        slot.held = request.ids[: slot.read]

    def _begin(self, slot: SlotState, ticket: Ticket) -> None:
        """Let a slot draw, as its prompt is read but for the last token."""
        request, model = ticket.request, self.model
        self._device.enter(slot.row, request)
        try:
            repeats = self.lookahead > 0 and not self._draft
            slot.answer = Answer.begin(ticket, model.tokenizer, model.end_ids, self.limits, repeats)
            if request.echo:
                first = TokenScore(request.ids[0], None)
                ticket.put(Part(prompt_scores=(first, *slot.prompt_scores)))
            if not slot.answer.left:
                self._finish(slot, Part(finish="length"))
        except Exception as error:
            self._finish(slot, failure(error))

    def _advance(self, slots: list[SlotState]) -> PendingStep:
        """Start a step of these slots."""
        members, allowed, has_scores = [], {}, False
        for slot in slots:
            assert slot.ticket
            assert slot.answer
            members.append((slot, slot.ticket))
            if grammar := slot.answer.grammar:
                allowed[slot.row] = grammar.allowed_X
            has_scores |= slot.ticket.request.alternatives >= 0
        rows, drafts_BD = [slot.row for slot in slots], self._guess(slots)
        return self._device.advance(members, rows, drafts_BD, allowed, has_scores)

    def _guess(self, slots: list[SlotState]) -> Any:
        """Return the drafts [B, D] of these slots, -1: none; those with a grammar have none."""
        if self._draft:
            return self._draft.guess([s.row for s in slots if s.answer and not s.answer.grammar])
        drafts_BD = np.full((self.slots, self.lookahead), -1, np.int32)
        for slot in slots:
            if slot.answer and slot.answer.repeats:
                found = slot.answer.repeats.guess(self.lookahead)
                drafts_BD[slot.row, : len(found)] = found
        return drafts_BD

    def _hand_out(self, step: PendingStep) -> None:
        """Wait for a step and hand its tokens to those that still hold their slots."""
        ids_of, scores = step.read(), step.scores()
        for slot, ticket in step.members:
            if slot.ticket is not ticket or slot.answer is None:
                continue
            ids = ids_of[slot.row]
            self.draft_tokens += step.draft_counts[slot.row]
            self.accepted_tokens += len(ids) - 1
            try:
                made = make_scores(ticket.request, ids, scores, slot.row * (1 + self.lookahead))
                part = slot.answer.add(ids, made)
                self.generated_tokens += len(part.ids)
                ticket.first_token_seconds = ticket.first_token_seconds or ticket.age()
                if part.finish:
                    self._finish(slot, part)
                else:
                    ticket.put(part)
            except Exception as error:
                self._finish(slot, failure(error))

    def _finish(self, slot: SlotState, part: Part) -> None:
        """Free a slot, and hand out the last part of its request."""
        ticket, slot.ticket, slot.answer, slot.used = slot.ticket, None, None, time.monotonic()
        if ticket:
            with contextlib.suppress(ValueError):
                self._reading.remove((slot, ticket))
            put_safely(ticket, part)


def failure(error: Exception) -> Part:
    """Return the last part of a request that has raised."""
    return Part(finish="error", error=f"{type(error).__name__}: {error}")


def put_safely(ticket: Ticket, part: Part) -> None:
    """Hand out a last part, whatever the receiver raises: it may be gone."""
    try:
        ticket.put(part)
    except Exception:
        ticket.finished = True
