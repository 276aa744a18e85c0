"""A text in several turns: the cache that is kept gives the tokens of one that is read anew."""

from pathlib import Path

import jax
import pytest
from conftest import small_model

from nanojaxgpt import session as session_module
from nanojaxgpt import sharding
from nanojaxgpt.config import base_config
from nanojaxgpt.data.tokenizers import ByteTokenizer
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.transformer import init_params
from nanojaxgpt.sample import Sampling, stream
from nanojaxgpt.session import Session

GREEDY, RANDOM = Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=50)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request):
    windows = (0,) if request.param == "learned" else (24, 0)
    cfg = small_model(seq_len=128, vocab_size=257, positions=request.param, windows=windows)
    fresh = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    params = jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, fresh)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return LanguageModel(cfg, params, ByteTokenizer(), mesh, base_config(), Path("none"), 0)


def anew(model, ids, max_tokens, how, seed=0) -> list[int]:
    """Return what follows `ids`, by a cache of its own."""
    chunks = stream(
        model.config, model.params, [ids], max_tokens=max_tokens, rng=jax.random.key(seed), how=how
    )
    return [int(token) for chunk in chunks for token in chunk[0]]


def drawn(session, *how) -> list[int]:
    """Return all ids of a turn."""
    return [token for part in session.draw(*how) for token in part]


@pytest.mark.slow
def test_turns_are_those_of_a_text_that_is_read_anew(model, monkeypatch):
    session, ids, reads = Session(model), list(b"Once upon a time"), []
    fill = session_module.fill
    monkeypatch.setattr(session_module, "fill", lambda *args: reads.append(1) or fill(*args))
    for number, (more, how) in enumerate(((b" there", GREEDY), (b", and", RANDOM), (b"!", GREEDY))):
        found = drawn(session, ids, 17, how, number)
        assert found == anew(model, ids, 17, how, number)
        assert len(set(found)) > 3
        ids += found + list(more)
    assert len(reads) <= 2  # the first turn, and once where the cache grew
    other = ids[:20] + list(b"another way")
    assert drawn(session, other, 9, GREEDY) == anew(model, other, 9, GREEDY)


@pytest.mark.slow
def test_a_turn_ends_with_an_end_id_and_where_the_context_is_full(model):
    session, ids = Session(model), list(b"Once upon a time")
    whole = anew(model, ids, 30, GREEDY)
    ends = GREEDY._replace(end_ids=(whole[5],))
    part = whole[: whole.index(whole[5]) + 1]
    assert drawn(session, ids, 30, ends) == part
    follows = ids + part + [1, 2, 3]
    assert drawn(session, follows, 10, GREEDY) == anew(model, follows, 10, GREEDY)
    full = (ids * 9)[:120]
    assert drawn(session, full, 50, GREEDY) == anew(model, full, 9, GREEDY)
    with pytest.raises(ValueError, match="129 tokens in a context of 128"):
        next(session.draw((ids * 9)[:129], 5, GREEDY))


def test_a_turn_that_is_left_does_no_harm(model):
    session, ids = Session(model), list(b"Once upon a time")
    turn = session.draw(ids, 40, GREEDY)
    for _ in range(3):
        next(turn)
    turn.close()
    follows = [*ids, *b" it was"]
    assert drawn(session, follows, 10, GREEDY) == anew(model, follows, 10, GREEDY)
