"""A draft model: it changes how many steps answers take, and not one bit of them."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from test_engine import make_model, mixed, prompt

from nanojaxgpt.data.tokenizers import ByteTokenizer, CharTokenizer
from nanojaxgpt.errors import ConfigError, MemoryExceeded
from nanojaxgpt.generate import slots as device
from nanojaxgpt.generate.drafts import LOOKAHEAD, same_ids
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import Part, Request
from nanojaxgpt.language_model import LanguageModel

COUNT = 3  # drafts in a step
DRAFTS = {
    "another": dict(num_layers="1", embed_dim="16", positions="learned", vocab_size="257"),
    "itself": {},
    "short": dict(seq_len="20", vocab_size="300"),
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Return requests of all kinds, some of which share a prefix."""
    return [*mixed(20, seed=4), Request(prompt(9), 12, schema='{"enum": ["yes", "no", "never"]}')]


@pytest.fixture(scope="module")
def expected(model, requests) -> list[Part]:
    """Return the answers without a draft model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 8)
        with Engine(model, slots=3, queue=64, lookahead=COUNT) as engine:
            return [engine.submit(request).result() for request in requests]


@pytest.fixture(scope="module", params=DRAFTS)
def engine(request, model) -> Iterator[Engine]:
    """Return a running engine with a draft model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 8)
        draft = resized(model, make_model(**DRAFTS[request.param]))
        with Engine(model, slots=3, queue=64, lookahead=COUNT, draft=draft) as engine:
            compiles = engine.compiles
            yield engine
            assert engine.compiles == compiles
            assert engine.busy == engine.queued == 0


def resized(model: LanguageModel, draft: LanguageModel) -> LanguageModel:
    """Return the draft model with the parameters of the model, if they differ in rows alone.

    Then it guesses the same, in a table of another size.
    """
    if draft.config.embed_dim != model.config.embed_dim:
        return draft

    def fit(own, other):
        rows = min(len(own), len(other))
        return own.at[:rows].set(other[:rows])

    return dataclasses.replace(draft, params=jax.tree.map(fit, draft.params, model.params))


def ask(engine: Engine, request: Request, monkeypatch) -> tuple[Part, int, int, int]:
    """Return an answer, and the numbers of steps, drafts and accepted drafts that it took."""
    steps: list[int] = []
    advance, before = device.advance, (engine.draft_tokens, engine.accepted_tokens)
    with monkeypatch.context() as patch:
        patch.setattr(device, "advance", lambda *args: steps.append(1) or advance(*args))
        part = engine.submit(request).result()
    drafts, accepted = engine.draft_tokens - before[0], engine.accepted_tokens - before[1]
    return part, len(steps), drafts, accepted


def test_a_draft_model_changes_no_bit(engine, requests, expected):
    assert len({part.ids for part in expected}) > 18
    alone = [engine.submit(request).result() for request in requests]
    assert alone == expected
    order = np.random.default_rng(0).permutation(len(requests)).tolist() * 2
    tickets = []
    for number in order:
        tickets.append(engine.submit(requests[number]))
        if number % 4 == 0:
            left = engine.submit(dataclasses.replace(requests[number], max_tokens=40))
            next(iter(left))
            left.cancel()
    found = [ticket.result() for ticket in tickets]
    assert found == [expected[number] for number in order]
    assert 0 < engine.accepted_tokens <= engine.draft_tokens


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.0),
        dict(temperature=1.2, top_k=40, seed=5),
        dict(top_p=0.9, seed=6, presence_penalty=1.0, frequency_penalty=0.5),
        dict(seed=7, logit_bias=((97, 4.0), (256, -100.0)), alternatives=2),
    ],
)
def test_a_draft_model_that_is_right_saves_steps(engine, options, monkeypatch):
    request = Request(prompt(8), 41, **{"logit_bias": ((256, -100.0),)} | options)
    part, steps, drafts, accepted = ask(engine, request, monkeypatch)
    assert len(part.ids) == 41
    if engine.draft.config.embed_dim == 16:  # a model that is seldom right
        assert 41 >= steps > 20
        assert accepted < drafts / 3
        assert drafts >= 20 * COUNT
    elif engine.draft.config.seq_len == 64:
        assert steps <= 41 / (COUNT + 1) + 2  # one more is on its way when the answer ends
        assert accepted >= drafts - 2  # sums over four rows have other last bits
    else:  # it reads positions 7 to 19, a whole step at 7, 11 and 15, and one token at 19
        assert (accepted, drafts) == (10, 10)
        assert steps >= 41 - accepted


@pytest.mark.parametrize("engine", ["itself"], indirect=True)
def test_a_prefix_is_copied_in_the_draft_model_too(engine, monkeypatch):
    ids, bias = prompt(40, 21), ((256, -100.0),)
    ask(engine, Request(ids, 17, logit_bias=bias), monkeypatch)
    read, drafts, accepted = engine.prompt_tokens, engine.draft_tokens, engine.accepted_tokens
    tickets = [engine.submit(Request(ids, 17, seed=seed, logit_bias=bias)) for seed in range(3)]
    assert len({ticket.result().ids for ticket in tickets}) == 3
    assert engine.prompt_tokens - read == 3 * 7  # the last, incomplete chunk
    drafts, accepted = engine.draft_tokens - drafts, engine.accepted_tokens - accepted
    assert drafts > 30
    assert accepted >= drafts - 6


def test_beyond_its_context_a_draft_model_guesses_nothing(model, monkeypatch):
    draft = make_model(seq_len="20")
    with Engine(model, slots=2, draft=draft) as engine:
        assert engine.lookahead == LOOKAHEAD
        _, steps, drafts, _ = ask(engine, Request(prompt(21), 9), monkeypatch)
        assert (drafts, steps) == (0, 9)
        _, _, drafts, accepted = ask(engine, Request(prompt(20), 9), monkeypatch)
        assert drafts == accepted == 1
        again = [ask(engine, Request(prompt(33)[:12], 9, seed=1), monkeypatch) for _ in range(2)]
        assert again[0] == again[1]
        assert again[0][2] >= LOOKAHEAD


def test_a_request_with_a_schema_has_no_drafts(engine, requests, monkeypatch):
    part, steps, drafts, _ = ask(engine, requests[-1], monkeypatch)
    assert drafts == 0
    assert steps == len(part.ids)


def test_a_mesh_has_drafts_too():
    mesh = {"fsdp": 2, "tensor": 2, "data": 2}
    model = make_model(mesh)
    requests = mixed(6, seed=1)
    with Engine(model, slots=4, lookahead=COUNT) as engine:
        plain = [engine.submit(request).result() for request in requests]
    with Engine(model, slots=4, lookahead=COUNT, draft=model) as engine:
        compiles = engine.compiles
        tickets = [engine.submit(request) for request in requests]
        assert [ticket.result() for ticket in tickets] == plain
        assert [engine.submit(request).result() for request in requests] == plain
        assert engine.compiles == compiles
        assert engine.accepted_tokens > 0.8 * engine.draft_tokens > 0
    with pytest.raises(ConfigError, match="other devices than tiny; load both with the same mesh"):
        Engine(model, draft=make_model())


class Ending(ByteTokenizer):
    """The bytes, of which another one ends a text."""

    end_id = 10

    def content_hash(self):
        return "another"


class Shifted(Ending):
    """Other bytes."""

    def piece(self, token):
        return super().piece((token + 1) % self.vocab_size)


def test_a_draft_model_has_the_same_tokens(model):
    assert same_ids(ByteTokenizer(), ByteTokenizer())
    assert same_ids(ByteTokenizer(), Ending())  # a base model's and a chat model's may differ so
    for other in (CharTokenizer("abc"), Shifted()):
        draft = dataclasses.replace(model, tokenizer=other)
        with pytest.raises(ConfigError, match=r"draft model tiny has another tokenizer .* choose"):
            Engine(model, draft=draft)


def test_memory_counts_the_draft_model(model, monkeypatch):
    monkeypatch.setattr("nanojaxgpt.memory.device_bytes", lambda _: 1000)
    with pytest.raises(MemoryExceeded, match=r"draft parameters .*, draft cache"):
        Engine(model, draft=model)
