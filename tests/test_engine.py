"""The engine: a request has the same bits whatever else runs, and none of them can stop it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from nanojaxgpt import sharding
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.data.tokenizers import ByteTokenizer
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate import slots as device
from nanojaxgpt.generate.drafts import Repeats
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import (
    EngineFailed,
    Limits,
    Part,
    QueueFull,
    Request,
    check_request,
    join_parts,
)
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.transformer import init_params
from nanojaxgpt.sample import Sampling, filter_logits

BAD = 0xEE  # an id at which a tokenizer of the tests fails
SIZES = {
    "model.num_layers": "2", "model.embed_dim": "32", "model.num_heads": "4",
    "model.num_kv_heads": "2", "model.seq_len": "64", "model.vocab_size": "264",
    "model.positions": "rotary",
}  # fmt: skip


def make_model(mesh: dict[str, int] | None = None, **changes: str) -> LanguageModel:
    """Return a model with random weights, large enough that draws differ, that reads bytes."""
    fields = SIZES | {f"model.{name}": value for name, value in changes.items()}
    cfg = complete(override_config(base_config(), fields))
    devices = sharding.make_mesh(mesh or {}, jax.devices() if mesh else jax.devices()[:1])
    params = jax.jit(lambda: init_params(cfg.model, jax.random.key(0)))()
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    return LanguageModel(cfg.model, params, ByteTokenizer(), devices, cfg, Path("tiny"), 0)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return random letters."""
    return tuple(np.random.default_rng(seed).integers(97, 123, length).tolist())


def mixed(count: int, seed: int = 0) -> list[Request]:
    """Return requests of all kinds."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        ids = prompt(int(rng.integers(1, 50)), int(rng.integers(0, 1 << 30)))
        if number % 3 == 0:
            ids = prompt(33, 7)[: int(rng.integers(8, 34))] + ids[:9]
        found.append(Request(
            ids,
            max_tokens=int(rng.integers(1, 20)),
            temperature=float(rng.choice([0.0, 0.7, 1.0, 1.5])),
            top_k=int(rng.choice([0, 0, 5, 40])),
            top_p=float(rng.choice([1.0, 1.0, 0.9])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
            seed=int(rng.integers(0, 1 << 31)),
            logit_bias=((97, 4.0), (98, -100.0)) if number % 5 == 0 else (),
            presence_penalty=float(rng.choice([0.0, 0.0, 1.0])),
            frequency_penalty=float(rng.choice([0.0, 0.0, 0.5])),
            alternatives=int(rng.choice([-1, 0, 3])),
            echo=False,
        ))  # fmt: skip
        if number % 7 == 0:
            found[-1] = dataclasses.replace(found[-1], alternatives=2, echo=True)
    return found


class Fragile(ByteTokenizer):
    """A tokenizer that fails at one id."""

    def decode(self, ids):
        if BAD in list(ids):
            raise RuntimeError("a bad id")
        return super().decode(ids)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    """Return a running engine, whose prompts of a few tokens have several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "CHUNK", 8)
        with Engine(model, slots=3, queue=64, lookahead=2) as engine:
            compiles = engine.compiles
            yield engine
            assert engine.compiles == compiles
            assert engine.busy == engine.queued == 0


def test_a_request_has_the_same_bits_among_others_as_alone(engine):
    requests = mixed(24)
    alone = [engine.submit(request).result() for request in requests]
    tickets = [engine.submit(request) for request in reversed(requests)]
    together = [ticket.result() for ticket in reversed(tickets)]
    assert together == alone
    assert len({part.ids for part in alone}) == 24
    other = dataclasses.replace(requests[1], seed=5, temperature=1.5)
    assert engine.submit(other).result().ids != alone[1].ids


def test_drafts_change_no_bit_but_the_number_of_steps(engine, monkeypatch):
    ids = prompt(9, 3) * 3
    # A bias that makes the text repeat itself, so that drafts are right.
    requests = [
        Request(ids, 30, temperature=temperature, seed=4, alternatives=1, logit_bias=bias)
        for temperature in (0.0, 0.8) for bias in ((), ((101, 9.0), (102, 9.0)))
    ]  # fmt: skip
    steps: list[int] = []
    advance = device.advance
    monkeypatch.setattr(device, "advance", lambda *args: steps.append(1) or advance(*args))
    with_drafts = [engine.submit(request).result() for request in requests]
    count = len(steps)
    monkeypatch.setattr(Repeats, "guess", lambda *_: [])
    assert [engine.submit(request).result() for request in requests] == with_drafts
    assert count < len(steps) - count
    assert len(steps) - count >= sum(len(part.ids) for part in with_drafts)


def test_repeats_continue_what_stood_before():
    repeats = Repeats([1, 2, 3, 4, 5, 1, 2])
    assert repeats.guess(2) == [3, 4]
    assert repeats.guess(7) == [3, 4, 5, 1, 2, 3, 4]
    repeats.add([9])
    assert repeats.guess(2) == []
    assert Repeats([7, 7, 7]).guess(3) == [7, 7, 7]
    assert Repeats([7]).guess(3) == []


def test_a_prefix_is_read_once(engine):
    shared, long = prompt(24, 11), prompt(60, 12)

    def ask(ids, **options):
        before = engine.prompt_tokens
        part = engine.submit(Request(ids, 4, seed=1, alternatives=2, **options)).result()
        return part, engine.prompt_tokens - before

    first, read = ask(shared + prompt(9, 1))
    assert read == 32
    answer = shared + prompt(9, 1) + first.ids
    again, read = ask(shared + prompt(9, 1))
    assert (again, read) == (first, 0)
    _, read = ask(shared + prompt(5, 2))
    assert read == 4  # the whole chunks of the 28 were there
    _, read = ask(answer)  # drawn tokens have other bits than read ones: they are read
    assert read == len(answer) - 1 - 32
    scored, read = ask(shared + prompt(9, 1), echo=True)
    assert read == 32
    assert scored._replace(prompt_scores=()) == first
    busy = [engine.submit(Request(long, 5, seed=seed)) for seed in range(3)]
    before = engine.prompt_tokens
    assert len({ticket.result().ids for ticket in busy}) == 3
    assert engine.prompt_tokens - before < 2 * 59  # copied from the slot that read it


def test_greedy_is_the_argmax_of_the_full_forward(engine, model):
    ids = prompt(20)
    found = engine.submit(Request(ids, max_tokens=12, temperature=0.0, alternatives=3)).result()
    context = list(ids)
    for token, score in zip(found.ids, found.scores, strict=True):
        log_probs_V = jax.nn.log_softmax(model.logits(np.array([context]))[0, -1])
        assert token == np.argmax(log_probs_V) == score.alternatives[0][0]
        assert score.log_probability == score.alternatives[0][1]
        np.testing.assert_allclose(score.log_probability, log_probs_V[token], atol=1e-4)
        context.append(token)
    assert found.text == bytes(found.ids).decode(errors="replace")
    assert found.finish == "length"


def test_the_prompt_is_scored(engine, model):
    ids = prompt(29)
    found = engine.submit(Request(ids, 0, alternatives=2, echo=True)).result()
    assert (found.ids, found.text, found.finish) == ((), "", "length")
    log_probs_TV = np.asarray(jax.nn.log_softmax(model.logits(np.array([ids]))[0]))
    assert found.prompt_scores[0] == (ids[0], None, ())
    for place, score in enumerate(found.prompt_scores[1:], 1):
        assert score.id == ids[place]
        log_probs_V = log_probs_TV[place - 1]
        np.testing.assert_allclose(score.log_probability, log_probs_V[ids[place]], atol=1e-4)
        assert [token for token, _ in score.alternatives] == np.argsort(-log_probs_V)[:2].tolist()
    assert len(found.prompt_scores) == 29


def test_biases_and_penalties_shift_the_logits(engine, model):
    plain = engine.submit(Request(prompt(5), 20, temperature=0.0)).result().ids
    for options in (
        dict(logit_bias=((120, 100.0), (plain[0], -100.0))),
        dict(presence_penalty=2.0, logit_bias=((120, 60.0), (121, 59.5))),
        dict(frequency_penalty=-1.5),
    ):
        request = Request(prompt(5), 20, temperature=0.0, **options)
        found, context = engine.submit(request).result().ids, list(prompt(5))
        for token in found:
            logits_V = model.logits(np.array([context]))[0, -1].copy()
            for biased, value in request.logit_bias:
                logits_V[biased] += value
            counts_V = np.bincount(context[5:], minlength=len(logits_V))
            logits_V -= request.presence_penalty * (counts_V > 0)
            logits_V -= request.frequency_penalty * counts_V
            assert token == np.argmax(logits_V)
            context.append(token)
        assert found != plain


def test_rows_are_filtered_as_each_alone():
    logits_BV = jax.numpy.array(np.random.default_rng(0).normal(0, 3, (6, 50)), np.float32)
    hows = [
        Sampling(), Sampling(0.0, 5), Sampling(0.5, 7), Sampling(2.0, 0, 0.8),
        Sampling(1.0, 0, 1.0, 0.25), Sampling(0.7, 40, 0.9, 0.125),
    ]  # fmt: skip
    columns = [np.array(column)[:, None] for column in zip(*(how[:4] for how in hows), strict=True)]
    temperature, top_k, top_p, min_p = columns
    rows = Sampling(temperature.astype(np.float32), top_k, top_p.astype(np.float32),
                    min_p.astype(np.float32), 48)  # fmt: skip
    together_BV = jax.jit(lambda x, how: filter_logits(x, how._replace(vocab_size=48)))(
        logits_BV, rows._replace(vocab_size=0)
    )
    for row, how in enumerate(hows):
        alone_1V = filter_logits(logits_BV[row : row + 1], how._replace(vocab_size=48))
        np.testing.assert_array_equal(np.isfinite(together_BV[row]), np.isfinite(alone_1V[0]))
        np.testing.assert_allclose(together_BV[row], alone_1V[0], rtol=1e-6)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_text_ends_before_a_stop_string_wherever_it_stands(engine, monkeypatch, lookahead):
    monkeypatch.setattr(Repeats, "guess", Repeats.guess if lookahead else lambda *_: [])
    ids = prompt(6, 5)
    free = engine.submit(Request(ids, 16, seed=9, alternatives=0)).result()
    assert len(free.text) > 9
    for size in (1, 3):
        for place in range(len(free.text) - size):
            stop = free.text[place : place + size]
            ticket = engine.submit(Request(ids, 16, seed=9, stop=(stop,), alternatives=0))
            parts = list(ticket)
            found = join_parts(parts)
            assert found.text == free.text[: free.text.find(stop)]
            assert found.finish == "stop"
            assert found.ids == free.ids[: len(found.ids)]
            assert found.scores == free.scores[: len(found.ids)]
            assert all(not part.finish for part in parts[:-1])
    ended = engine.submit(Request(ids, 16, seed=9, end_ids=free.ids[7:8])).result()
    first = free.ids.index(free.ids[7])
    assert (ended.finish, ended.ids) == ("stop", free.ids[: first + 1])


def test_programs_that_are_compiled_are_counted(model):
    with Engine(model, slots=5) as engine:  # no other engine of the suite has as many
        assert engine.compiles > 0


def test_a_ticket_tells_its_answer_as_often_as_it_is_asked(engine):
    ids = prompt(6, 5)
    ticket = engine.submit(Request(tuple(np.array(ids)), 6, seed=9))  # numpy's integers, too
    parts = [*ticket]
    assert ticket.result() == ticket.result() == join_parts(parts)
    assert ticket.result() == engine.submit(Request(ids, 6, seed=9)).result()
    assert [*ticket] == []


def test_an_answer_ends_where_the_context_does(engine):
    part = engine.submit(Request(prompt(60), 50)).result()
    assert (part.finish, len(part.ids)) == ("length", 5)  # the last one is never read
    part = engine.submit(Request(prompt(64), 50)).result()
    assert (part.finish, len(part.ids)) == ("length", 1)
    assert engine.submit(Request(prompt(3), 0)).result() == Part(finish="length")


def test_cancelled_requests_free_their_slots(engine):
    long = [engine.submit(Request(prompt(5), 50, seed=seed)) for seed in range(8)]
    next(iter(long[0]))
    for ticket in long[:4] + long[6:]:
        ticket.cancel()
    found = [ticket.result() for ticket in long]
    assert [part.finish for part in found[4:6]] == ["length"] * 2
    cancelled = found[:4] + found[6:]
    assert all(part.finish == "cancelled" and len(part.ids) < 50 for part in cancelled)
    again = engine.submit(Request(prompt(5), 50, seed=4)).result()
    assert again == found[4]


def test_what_a_receiver_or_a_tokenizer_raises_ends_that_request_alone(engine, monkeypatch):
    monkeypatch.setattr(engine.model.tokenizer, "decode", Fragile().decode)
    fine = Request(prompt(5), 9, seed=3, logit_bias=((BAD, -100.0),))
    expected = engine.submit(fine).result()
    others = [engine.submit(fine) for _ in range(2)]
    in_prompt = engine.submit(Request((97, BAD, 98), 9)).result()
    assert (in_prompt.finish, in_prompt.error) == ("error", "RuntimeError: a bad id")
    drawn = engine.submit(Request(prompt(5), 9, logit_bias=((BAD, 100.0),))).result()
    assert (drawn.finish, drawn.error) == ("error", "RuntimeError: a bad id")
    assert [ticket.result() for ticket in others] == [expected] * 2
    seen = []

    def leave(part):
        seen.append(part)
        raise ConnectionError("gone")

    engine.submit(fine, leave)
    assert engine.submit(fine).result() == expected
    assert len(seen) <= 2
    assert engine.ready
    assert not engine.failed


def test_parts_are_given_as_they_become_final(engine):
    seen, request = [], Request(prompt(5), 20, seed=2, alternatives=0)
    ticket = engine.submit(request, seen.append)
    whole = ticket.result()
    assert join_parts(seen) == whole == engine.submit(request).result()
    assert len(seen) > 5
    assert 0 <= ticket.queued_seconds < ticket.first_token_seconds
    assert ticket.prompt_tokens == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ids=()), "at least one token"),
        (dict(ids=(5,) * 65), "65 tokens, more than the context of 64"),
        (dict(ids=(5, 257)), "ids contains 257, but ids are from 0 to 256"),
        (dict(ids=(-1,)), "ids contains -1"),
        (dict(ids=("a",)), "ids contains 'a'"),
        (dict(max_tokens=-1), "max_tokens=-1"),
        (dict(max_tokens=1.0), "max_tokens=1.0"),
        (dict(temperature=-0.1), "temperature=-0.1 must be at least 0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=14150449727468), "top_k=14150449727468 must be at most"),
        (dict(top_k=True), "top_k=True is true or false, not an integer"),
        (dict(top_p=1.5), "top_p=1.5 must be at most 1"),
        (dict(min_p="x"), "min_p='x' is a string"),
        (dict(seed=1 << 40), "seed="),
        (dict(stop=("",)), "empty string"),
        (dict(stop=("a",) * 10_000), "stop must be at most 64 strings"),
        (dict(stop=("\ud800",)), "stop='.ud800' is not valid Unicode"),
        (dict(end_ids=(300,)), "end_ids contains 300"),
        (dict(logit_bias=((300, 1.0),)), "logit_bias contains 300"),
        (dict(logit_bias=((1, 1e9),)), "logit_bias=1000000000.0 must be"),
        (dict(logit_bias=((1, 1.0), (1, 2.0))), "twice"),
        (dict(presence_penalty=float("inf")), "presence_penalty=inf"),
        (dict(frequency_penalty=-3.0), "frequency_penalty=-3.0 must be at least -2"),
        (dict(alternatives=21), "alternatives=21"),
        (dict(echo=True), "echo"),
    ],
)
def test_a_request_is_checked_before_it_is_queued(changes, message):
    check_request(Request((97,)), Limits(64, 257))
    with pytest.raises(ConfigError, match=message):
        check_request(Request(**dict(ids=(97,)) | changes), Limits(64, 257))


def test_a_queue_has_a_bound_and_an_engine_an_end(model):
    engine = Engine(model, slots=1, queue=2, context=32)
    with pytest.raises(ConfigError, match="more than the context of 32"):
        engine.submit(Request(prompt(33)))
    tickets = [engine.submit(Request(prompt(3), 4)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests"):
        engine.submit(Request(prompt(3)))
    assert (engine.queued, engine.busy, engine.ready) == (2, 0, False)
    engine.start()
    assert len(tickets[0].result().ids) == 4
    tickets += [engine.submit(Request(prompt(3), 9, seed=1))]
    engine.close()
    assert [len(ticket.result().ids) for ticket in tickets[1:]] == [4, 9]
    with pytest.raises(EngineFailed, match="closing"):
        engine.submit(Request(prompt(3)))
    engine = Engine(model, slots=1, context=32)
    engine.start()
    tickets = [engine.submit(Request(prompt(3), 30)) for _ in range(3)]
    engine.close(drain=False)
    assert {ticket.result().finish for ticket in tickets[1:]} == {"cancelled"}


def test_a_failed_device_ends_all_requests(model, monkeypatch):
    engine = Engine(model, slots=1, context=32)
    engine.start()
    tickets = [engine.submit(Request(prompt(3), 20)) for _ in range(3)]
    next(iter(tickets[0]))

    def fail(*_):
        raise jax.errors.JaxRuntimeError("the device is gone")

    monkeypatch.setattr(device, "advance", fail)
    for ticket in tickets:
        part = ticket.result()
        assert (part.finish, part.error) == ("error", "the engine has failed: the device is gone")
    with pytest.raises(EngineFailed, match="the device is gone"):
        engine.submit(Request(prompt(3)))
    assert isinstance(engine.failed, jax.errors.JaxRuntimeError)
    assert not engine.ready
    engine.close()


def test_settings_are_checked(model):
    for options, message in (
        (dict(slots=0), "slots=0 must be from 1"), (dict(context=65), "context=65 must be from 1"),
        (dict(lookahead=99), "lookahead=99"), (dict(queue=0), "queue=0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Engine(model, **options)


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens(model):
    requests = mixed(9, seed=1)
    requests[3] = dataclasses.replace(requests[3], schema='{"enum": ["yes", "no"]}')
    found = {}
    for name, mesh in (("one", None), ("many", {"fsdp": 2, "tensor": 2, "data": 2})):
        with Engine(make_model(mesh), slots=4) as engine:
            compiles = engine.compiles
            tickets = [engine.submit(request) for request in requests]
            found[name] = [ticket.result() for ticket in tickets]
            assert [engine.submit(request).result() for request in requests] == found[name]
            assert engine.compiles == compiles
    same = [a.ids == b.ids for a, b in zip(found["one"], found["many"], strict=True)]
    assert sum(same) >= 8  # sums over shards differ in their last bits


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bfloat16", "positions": "alibi"}])
def test_a_thousand_requests_among_others_have_the_bits_of_each_alone(changes):
    model, requests = make_model(**changes), mixed(1000, seed=2)
    with Engine(model, slots=7, lookahead=3) as engine:
        alone = [engine.submit(request).result() for request in requests]
    with Engine(model, slots=7, lookahead=3) as engine:
        order = np.random.default_rng(3).permutation(len(requests)).tolist()
        flying, found, cancelled = [], {}, 0
        while order or flying:
            while order and len(flying) < 60:
                number = order.pop()
                flying.append((number, engine.submit(requests[number])))
                if number % 9 == 0:
                    left = engine.submit(requests[number])
                    left.cancel()
                    cancelled += left.result().finish == "cancelled"
            number, ticket = flying.pop(0)
            found[number] = ticket.result()
        assert engine.compiles <= 6
    assert cancelled > 50
    assert [found[number] for number in range(len(requests))] == alone
