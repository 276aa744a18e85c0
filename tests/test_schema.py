"""Answers by a JSON schema: they are valid, and have the bits that they have alone."""

import contextlib
import dataclasses
import json
import random
import time

import jax
import numpy as np
import pytest
from conftest import byte_level_tokenizer
from test_engine import make_model, prompt

from nanojaxgpt import extras
from nanojaxgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    train_tokenizer,
)
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate import slots as device
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.grammar import LARGEST_SCHEMA, Grammars
from nanojaxgpt.generate.requests import Request, join_parts

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", "caterpillar"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]},
    },
    "required": ["name", "kind", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "prefixItems": [{"const": "é\n"}, {"type": "number"}],
                       "items": False, "minItems": 2}},
}  # fmt: skip
TEXT = json.dumps(SCHEMA)
CHOICE = json.dumps({"enum": ["yes", "no", "unknown"]})


def fits(text: str) -> bool:
    """Return whether a text is JSON of SCHEMA; of a number only the kind is looked at."""
    found = json.loads(text)
    pair = found["next"]
    return (
        list(found) == list(SCHEMA["properties"])
        and isinstance(found["name"], str) and len(found["name"]) <= 8
        and found["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and type(found["age"]) is int and 0 <= found["age"] <= 99
        and len(found["tags"]) <= 3 and all(type(tag) is bool for tag in found["tags"])
        and (pair is None or (pair[0] == "é\n" and type(pair[1]) in (int, float)
                              and len(pair) == 2))
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    with Engine(make_model(seq_len="256"), slots=3, queue=64, lookahead=2) as engine:
        compiles = engine.compiles
        yield engine
        assert engine.compiles == compiles
        assert engine.busy == engine.queued == 0


def ask(seed: int, **options) -> Request:
    """Return a request for an answer of SCHEMA."""
    return Request(prompt(9, seed), **dict(max_tokens=200, seed=seed, schema=TEXT) | options)


def test_answers_fit_their_schema_with_the_bits_that_they_have_alone(engine):
    requests = [
        ask(seed, temperature=[1.0, 0.0, 1.5][seed % 3], top_k=[0, 3][seed % 2],
            top_p=[1.0, 0.9][seed % 2], alternatives=2)
        for seed in range(20)
    ]  # fmt: skip
    free = [dataclasses.replace(ask(seed), schema="", max_tokens=30) for seed in range(10)]
    alone = [engine.submit(request).result() for request in requests + free]
    tickets = [engine.submit(request) for request in requests + free]
    assert [join_parts(list(ticket)) for ticket in tickets] == alone
    for part in alone[:20]:
        assert (part.finish, part.error) == ("stop", "")
        assert fits(part.text), part.text
        assert part.text.encode() == bytes(part.ids)
    assert len({part.text for part in alone[:20]}) == 20
    assert len({json.loads(part.text)["kind"] for part in alone[:20]}) > 1
    assert all(not part.text.startswith("{") for part in alone[20:])


def ids_of(allowed_X: np.ndarray) -> np.ndarray:
    """Return the ids whose bits are set."""
    return np.flatnonzero(np.unpackbits(allowed_X.view(np.uint8), bitorder="little"))


def test_greedy_is_the_likeliest_of_what_is_allowed(engine):
    found = engine.submit(ask(3, temperature=0.0, alternatives=1)).result()
    grammar, context, unlikely = engine.grammars.begin(TEXT), list(prompt(9, 3)), 0
    for token, score in zip(found.ids[:40], found.scores, strict=False):
        log_probs_V = jax.nn.log_softmax(engine.model.logits(np.array([context]))[0, -1])
        allowed_V = ids_of(grammar.allowed_X)
        assert token == allowed_V[np.argmax(log_probs_V[allowed_V])]
        # What is reported is the model's own: another token may be likelier.
        np.testing.assert_allclose(score.log_probability, log_probs_V[token], atol=1e-3)
        assert score.alternatives[0][0] == np.argmax(log_probs_V)
        unlikely += score.alternatives[0][0] != token
        grammar.take(token)
        context.append(token)
    assert unlikely > 10


def test_each_step_draws_for_all_with_a_schema_or_without(engine, monkeypatch):
    steps, advance = [], device.advance

    def note(facts, params, cache, slots, active_B, drafts_BD, allowed_BX, has_scores):
        bound_B = np.any(np.asarray(allowed_BX) != device.ALL, 1)
        steps.append((sum(active_B & bound_B), sum(active_B & ~bound_B)))
        return advance(facts, params, cache, slots, active_B, drafts_BD, allowed_BX, has_scores)

    monkeypatch.setattr(device, "advance", note)
    free = Request(prompt(9), 100, seed=1, logit_bias=((256, -100.0),))
    tickets = [engine.submit(request) for request in (ask(1), free)]
    assert [ticket.result().finish for ticket in tickets] == ["stop", "length"]
    assert sum(bound and free for bound, free in steps) > 10
    for kind in (0, 1):
        draws = [place for place, counts in enumerate(steps) if counts[kind]]
        assert draws == list(range(draws[0], draws[-1] + 1))
    # Those that begin at different times share steps, too.
    steps.clear()
    tickets = [engine.submit(ask(seed)) for seed in range(9)]
    tokens = sum(len(ticket.result().ids) for ticket in tickets)
    assert sum(bound for bound, _ in steps) == tokens
    assert [bound for bound, _ in steps if bound].count(3) > 0.6 * len(steps)


def test_an_answer_ends_where_its_json_does(engine):
    for seed in range(5):
        found = engine.submit(ask(seed, schema=CHOICE)).result()
        assert json.loads(found.text) in ("yes", "no", "unknown")
        assert (found.finish, found.ids[-1]) == ("stop", ord('"'))
        # A number may always go on: the end token says that it does not.
        ends = dict(schema='{"type": "integer"}', logit_bias=((256, 30.0),))
        found = engine.submit(ask(seed, **ends)).result()
        assert type(json.loads(found.text)) is int
        assert (found.finish, found.ids[-1]) == ("stop", 256)
    cut = engine.submit(ask(0, max_tokens=5)).result()
    assert (cut.finish, cut.text) == ("length", '{"nam')
    cut = engine.submit(ask(0, stop=('"kind',))).result()
    assert cut.finish == "stop"
    assert cut.text.endswith(",")


ENDLESS = json.dumps({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"],
                      "additionalProperties": False})  # fmt: skip


def test_a_schema_that_is_found_too_complex_later_ends_its_answer_alone(engine):
    bad, good = engine.submit(ask(0, schema=ENDLESS)), [engine.submit(ask(i)) for i in range(2)]
    part = bad.result()
    assert part.finish == "error"
    assert "schema can't be followed" in part.error
    assert all(fits(ticket.result().text) for ticket in good)
    assert engine.ready


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type":', "can't be read as a JSON object"),
        ("true", "can't be read as a JSON object"),
        ('"\ud800"', "can't be read as a JSON object"),
        ('{"type": "objekt"}', "objekt"),
        ('{"type": "string", "pattern": "("}', "regex parse error"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"$ref": "#/$defs/none"}', "none"),
        ('{"$ref": "https://example.com/schema"}', "example.com"),
        ('{"$ref": "#"}', "nothing fits it"),
        ('{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, '
         '"$ref": "#/$defs/a"}', "nothing fits it"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"type": "integer", "multipleOf": 500083}', "multipleOf"),
        ('{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}', "multipleOf"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "recursion limit"),
        ('{"enum": ["' + "x" * LARGEST_SCHEMA + '"]}', "more than 65,536"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_by_its_name(engine, schema, message):
    with pytest.raises(ConfigError, match=f"^schema .*{message}"):
        engine.submit(ask(0, schema=schema))
    with pytest.raises(ConfigError, match="schema=7 is not the text"):
        engine.submit(ask(0, schema=7))


def objects(count: int, name: str) -> list[dict]:
    """Return schemas of objects, no two alike."""
    return [
        {"type": "object", "properties": {f"{name}{i}": {"type": "integer"}}} for i in range(count)
    ]


LARGE = {
    "products": {"allOf": [{"anyOf": objects(4, f"k{i}_")} for i in range(12)]},
    "references": {
        "$defs": {"l30": {"type": "object"}} | {
            f"l{i}": {"allOf": [{"$ref": f"#/$defs/l{i + 1}"}] * 2} for i in range(30)
        },
        "$ref": "#/$defs/l0",
    },
    "properties": {"type": "object",
                   "properties": {f"k{i}": {"type": "string"} for i in range(2000)}},
    "required": {"type": "object", "required": [f"k{i}" for i in range(4000)]},
    "patterns": {"type": "array", "prefixItems": [
        {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(15, 800)
    ]},
    "nested": {"type": "string", "pattern": "^" + "(x+x+)+" * 2000 + "$"},
    "repeated": {"type": "string", "pattern": r"^(((\w{0,99}){0,99}){0,99}){0,99}$"},
    "long": {"type": "string", "minLength": 10**8},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "choices": {"enum": [f"value number {i}" for i in range(2000)]},
    "multiples": {"type": "array", "prefixItems": [
        {"type": "integer", "multipleOf": i} for i in range(1, 10_000) if 9240 % i == 0
    ]},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_what_a_schema_costs_has_a_bound(name):
    grammars, began = Grammars(ByteTokenizer(), (256,)), time.process_time()
    with contextlib.suppress(ConfigError):  # some are refused, before or after they have begun
        walk(grammars, json.dumps(LARGE[name]), 0, most=40)
    assert time.process_time() - began < 5


def walk(grammars: Grammars, schema: str, seed: int, most: int = 1000) -> str:
    """Return the text of random ids that a grammar allows."""
    rng, grammar, ids = random.Random(seed), grammars.begin(schema), list[int]()
    while not grammar.is_complete and len(ids) < most:
        ids.append(int(rng.choice(ids_of(grammar.allowed_X).tolist())))
        if ids[-1] in grammars.end_ids:
            break
        grammar.take(ids[-1])
    return grammars.tokenizer.decode(ids)


def learned(kind: str) -> Tokenizer:
    """Return a tokenizer whose tokens have several characters of JSON."""
    text = json.dumps({"name": "cat", "kind": "dog"}, separators=(",", ":"))
    if kind == "gpt2":
        return byte_level_tokenizer([text], ["<|endoftext|>"], 290, end_id=0)
    return train_tokenizer(kind, [f"{text} the user {i}\n" for i in range(50)], 290)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "sentencepiece-unigram"])
def test_tokens_of_several_characters_follow_a_schema(kind):
    tokenizer = learned(kind)
    grammars = Grammars(tokenizer, (tokenizer.end_id,))
    assert tokenizer.vocab_size > 257
    assert all(fits(walk(grammars, TEXT, seed)) for seed in range(20))


def test_a_tokenizer_that_cannot_write_json_is_refused():
    for tokenizer in (CharTokenizer("abc"), WordTokenizer(["a", "b"])):
        with pytest.raises(ConfigError, match="schema is not possible with this model"):
            Grammars(tokenizer, ()).begin(CHOICE)
    everything = CharTokenizer(sorted(set('{"a b":[1,-2.5e3,true,null]}yesnounknown')))
    found = {walk(Grammars(everything, ()), CHOICE, seed) for seed in range(20)}
    assert found == {'"yes"', '"no"', '"unknown"'}


def test_without_its_package_a_schema_is_refused_with_what_to_install(engine, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"schema: .*pip install 'nanojaxgpt\[schema\]'"):
        engine.submit(ask(0))
