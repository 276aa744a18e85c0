"""Sampling: greedy against a loop without a cache, filters against their definitions, streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_model

from nanojaxgpt.attention import init_cache
from nanojaxgpt.model import Transformer, init_params
from nanojaxgpt.projection import decoding_params
from nanojaxgpt.sample import Sampling, filter_logits, generate, stream
from nanojaxgpt.sharding import unbox

CFG = small_model(seq_len=32)


@functools.cache
def params() -> dict:
    """Return parameters large enough that greedy choices differ from step to step."""
    fresh = jax.jit(lambda: unbox(init_params(CFG, jax.random.key(0))))()
    return jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, fresh)


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts right-padded, and their lengths."""
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    prompts_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(prompts_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return prompts_BT, lengths_B


def test_greedy_is_the_argmax_of_the_full_forward_for_prompts_of_any_length():
    prompts = [random_tokens(n, seed=n).tolist() for n in (3, 9, 5)]
    prompts_BT, lengths_B = padded(prompts)
    greedy = Sampling(temperature=0.0)
    found_BT = generate(
        Transformer(CFG), params(), prompts_BT, lengths_B, jax.random.key(0), max_tokens=12,
        how=greedy,
    )  # fmt: skip
    forward = jax.jit(lambda ids: Transformer(CFG).apply({"params": params()}, ids)[0])
    for prompt, found in zip(prompts, np.asarray(found_BT), strict=True):
        row = list(prompt)
        for _ in range(12):
            ids_BT = np.zeros((1, CFG.seq_len), np.int32)
            ids_BT[0, : len(row)] = row
            row.append(int(np.argmax(forward(ids_BT)[0, len(row) - 1])))
        assert found.tolist() == row[len(prompt) :]
    assert len({tuple(row) for row in np.asarray(found_BT)}) == 3


def test_parameters_laid_out_for_decoding_sample_the_same():
    prompts_BT, lengths_B = padded([[1, 2, 3], [4, 5, 6]])
    run = functools.partial(
        generate, Transformer(CFG), prompts_BT=prompts_BT, lengths_B=lengths_B,
        rng=jax.random.key(0), max_tokens=8, how=Sampling(temperature=0.0),
    )  # fmt: skip
    np.testing.assert_array_equal(run(params()), run(decoding_params(params(), 1)))


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9)])
def test_a_stream_gives_what_generate_gives_and_only_by_its_seed(how):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    prompts_BT, lengths_B = padded(prompts)
    whole_BT = generate(
        Transformer(CFG), params(), prompts_BT, lengths_B, jax.random.key(7), max_tokens=20, how=how
    )

    def streamed(seed, chunk=8):
        parts = stream(CFG, params(), prompts, max_tokens=20, seed=seed, how=how, chunk=chunk)
        return np.concatenate(list(parts), 1)

    np.testing.assert_array_equal(streamed(7), whole_BT)
    np.testing.assert_array_equal(streamed(7, chunk=3), whole_BT)
    assert (streamed(8) != whole_BT).any()


def test_decoding_in_blocks_is_the_full_forward():
    """Eight rows of a model 256 wide: kernels turned over and read by blocks."""
    cfg = small_model(embed_dim=256, num_heads=2, mlp_dim=512, num_layers=1)
    weights = jax.jit(lambda: unbox(init_params(cfg, jax.random.key(0))))()
    ids_BT = random_tokens(8, 6)
    full_BTV = jax.jit(Transformer(cfg).apply)({"params": weights}, ids_BT)[0]
    cache = init_cache(1, 8, 8, 2, 128, "float32")
    laid_out = decoding_params(weights, 8)
    assert laid_out["layers"][0]["down_DF"].blocks_GIO.shape == (1, 512, 256)
    step = jax.jit(Transformer(cfg).apply)
    for at in range(6):
        logits_BTV, cache = step(
            {"params": laid_out}, ids_BT[:, at : at + 1], np.full((8, 1), at), cache=cache
        )
        np.testing.assert_allclose(logits_BTV[:, 0], full_BTV[:, at], atol=2e-5)


def test_a_stream_goes_on_where_the_context_is_full():
    parts = list(stream(CFG, params(), [[1], [2, 3]], max_tokens=100, seed=0, how=Sampling()))
    ids_BT = np.concatenate(parts, 1)
    assert ids_BT.shape == (2, 100)
    assert len(set(ids_BT[0, 40:].tolist())) > 3  # not stuck
    with pytest.raises(ValueError, match="1 to 31 tokens"):
        next(stream(CFG, params(), [[1] * 32], max_tokens=1, seed=0, how=Sampling()))


def test_rows_end_at_the_end_token():
    prompts = [[1, 2, 3], [4, 5, 6]]
    free_BT = np.concatenate(
        list(stream(CFG, params(), prompts, max_tokens=24, seed=0, how=Sampling())), 1
    )
    end = int(free_BT[0, 5])
    how = Sampling(end_id=end)
    ended_BT = np.concatenate(
        list(stream(CFG, params(), prompts, max_tokens=24, seed=0, how=how)), 1
    )
    for free, ended in zip(free_BT, ended_BT, strict=True):
        stop = free.tolist().index(end) if end in free else len(free)
        assert ended[:stop].tolist() == free[: min(stop, len(ended))].tolist()
        assert set(ended[stop:].tolist()) <= {end}


def test_generate_refuses_what_does_not_fit_the_context():
    with pytest.raises(ValueError, match="3 \\+ 31 tokens don't fit a context of 32"):
        generate(
            Transformer(CFG), params(), *padded([[1, 2, 3]]), jax.random.key(0), max_tokens=31,
            how=Sampling(),
        )  # fmt: skip


def test_generate_fills_the_context_and_one_more_which_is_never_read():
    prompt, how = [1, 2, 3], Sampling(temperature=0)
    ids_BT = generate(
        Transformer(CFG), params(), *padded([prompt]), jax.random.key(0), max_tokens=30, how=how
    )
    whole_BT = np.array([prompt + ids_BT[0, :-1].tolist()])
    logits_BTV, _ = Transformer(CFG).apply({"params": params()}, whole_BT)
    assert whole_BT.shape[1] == CFG.seq_len
    assert ids_BT[0].tolist() == np.argmax(logits_BTV[0, 2:], -1).tolist()


def kept(probabilities: list[float], **how) -> list[int]:
    """Return the ids that the filters leave."""
    logits_BV = jnp.log(jnp.array([probabilities]))
    left = filter_logits(logits_BV, Sampling(**how))[0]
    return np.flatnonzero(np.isfinite(left)).tolist()


def test_filters_are_their_definitions():
    p = [0.1, 0.5, 0.05, 0.3, 0.05]
    assert kept(p) == [0, 1, 2, 3, 4]
    assert kept(p, top_k=2) == [1, 3]
    assert kept(p, top_p=0.75) == [1, 3]
    assert kept(p, top_p=0.81) == [0, 1, 3]
    assert kept(p, top_p=0.01) == [1]
    assert kept(p, min_p=0.19) == [0, 1, 3]
    assert kept(p, top_k=3, top_p=0.5) == [1]
    assert kept(p, vocab_size=2) == [0, 1]


def test_temperature_scales_the_logits():
    logits_BV = jnp.array([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(
        filter_logits(logits_BV, Sampling(temperature=0.5)), 2 * logits_BV, rtol=1e-6
    )


def test_samples_follow_the_distribution():
    prompts_BT = np.tile(random_tokens(1, 4), (4000, 1))
    lengths_B = np.full(4000, 4, np.int32)
    ids_B1 = generate(
        Transformer(CFG), params(), prompts_BT, lengths_B, jax.random.key(0), max_tokens=1,
        how=Sampling(),
    )  # fmt: skip
    logits_BTV = Transformer(CFG).apply({"params": params()}, prompts_BT[:1])[0]
    expected_V = np.asarray(jax.nn.softmax(logits_BTV[0, -1]))
    found_V = np.bincount(np.asarray(ids_B1)[:, 0], minlength=31) / 4000
    assert np.abs(found_V - expected_V).max() < 5 * 0.5 / np.sqrt(4000)
    assert expected_V.max() < 0.99
