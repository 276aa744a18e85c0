"""Sampling: greedy against a loop without a cache, filters against their definitions, streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_model

from nanojaxgpt.attention.cache import init_cache
from nanojaxgpt.model.block import Block
from nanojaxgpt.model.projection import decoding_params
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.sample import (
    Decoding,
    Sampling,
    choose,
    filter_logits,
    generate,
    read,
    row_keys,
    stream,
)

CFG = small_model(seq_len=32)


@functools.cache
def params() -> dict:
    """Return parameters large enough that greedy choices differ from step to step."""
    fresh = jax.jit(lambda: init_params(CFG, jax.random.key(0)))()
    return jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, fresh)


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompts right-padded, and their lengths."""
    lengths_B = np.array([len(p) for p in prompts], np.int32)
    prompts_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(prompts_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return prompts_BT, lengths_B


def stream_ids(prompts, max_tokens: int, seed: int, how: Sampling, chunk: int = 8) -> np.ndarray:
    """Return all ids of a stream."""
    rng = jax.random.key(seed)
    parts = stream(
        CFG, params(), prompts, max_tokens=max_tokens, rng=rng, how=how, chunk=chunk
    )  # fmt: skip
    return np.concatenate(list(parts), 1)


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
    np.testing.assert_array_equal(run(params()), run(decoding_params(CFG, params(), 1)))


@pytest.mark.slow
@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.7, top_k=5, top_p=0.9)])
def test_a_stream_gives_what_generate_gives_and_only_by_its_seed(how):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    prompts_BT, lengths_B = padded(prompts)
    whole_BT = generate(
        Transformer(CFG), params(), prompts_BT, lengths_B, jax.random.key(7), max_tokens=20, how=how
    )

    def streamed(seed, chunk=8):
        return stream_ids(prompts, 20, seed, how, chunk=chunk)

    np.testing.assert_array_equal(streamed(7), whole_BT)
    np.testing.assert_array_equal(streamed(7, chunk=3), whole_BT)
    assert (streamed(8) != whole_BT).any()


def test_decoding_in_blocks_is_the_full_forward():
    """Eight rows of a model 256 wide: kernels turned over and read by blocks."""
    cfg = small_model(embed_dim=256, num_heads=2, mlp_dim=512, num_layers=1)
    weights = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    ids_BT = random_tokens(8, 6)
    full_BTV = jax.jit(Transformer(cfg).apply)({"params": weights}, ids_BT)[0]
    cache = init_cache(1, 8, 8, 2, 128, "float32")
    laid_out = decoding_params(cfg, weights, 8)
    assert laid_out["layers"][0]["down_DF"].blocks_GIO.shape == (1, 512, 256)
    step = jax.jit(Transformer(cfg).apply)
    for at in range(6):
        logits_BTV, cache = step(
            {"params": laid_out}, ids_BT[:, at : at + 1], np.full((8, 1), at), cache=cache
        )
        np.testing.assert_allclose(logits_BTV[:, 0], full_BTV[:, at], atol=2e-5)


def greedy_by_full_forwards(prompt: list[int], max_tokens: int) -> list[int]:
    """Return the argmax of the whole context at each token; it keeps its half where it is full."""
    forward = jax.jit(lambda ids: Transformer(CFG).apply({"params": params()}, ids)[0])
    context, found = prompt[-CFG.seq_len :], []
    for _ in range(max_tokens):
        if len(context) > CFG.seq_len:
            context = context[-(CFG.seq_len // 2) :]
        ids_BT = np.zeros((1, CFG.seq_len), np.int32)
        ids_BT[0, : len(context)] = context
        found.append(int(np.argmax(forward(ids_BT)[0, len(context) - 1])))
        context = [*context, found[-1]]
    return found


@pytest.mark.slow
def test_each_row_has_its_own_context_where_another_is_full():
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 29, 9, 32, 40)]
    ids_BT = stream_ids(prompts, 60, 0, Sampling(temperature=0))
    for prompt, ids in zip(prompts, ids_BT, strict=True):
        assert ids.tolist() == greedy_by_full_forwards(prompt, 60)
    assert len({tuple(ids) for ids in ids_BT[:, -8:].tolist()}) == 5
    with pytest.raises(ValueError, match="at least one token"):
        stream_ids([[1], []], 1, 0, Sampling())


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0.7, top_k=9, top_p=0.9)])
def test_a_row_draws_the_same_alone_as_among_others(how):
    """Logits differ in their last bits by the number of rows; no draw here is as near as that."""
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 29, 9)]
    together_BT = stream_ids(prompts, 70, 3, how)
    keys_B = row_keys(jax.random.key(3), 3)
    again = stream(CFG, params(), prompts, max_tokens=70, rng=keys_B, how=how)
    np.testing.assert_array_equal(np.concatenate(list(again), 1), together_BT)
    for row, prompt in enumerate(prompts):
        alone = stream(CFG, params(), [prompt], max_tokens=70, rng=keys_B[row : row + 1], how=how)
        assert np.concatenate(list(alone), 1)[0].tolist() == together_BT[row].tolist()
    same_BT = stream_ids([prompts[0]] * 3, 70, 3, how)
    assert same_BT[0].tolist() == together_BT[0].tolist()
    assert len({tuple(ids) for ids in same_BT.tolist()}) == 3


@pytest.mark.slow
def test_padding_does_not_change_what_generate_draws():
    prompts_BT, lengths_B = padded([[1, 2, 3], [4, 5]])
    run = functools.partial(
        generate, Transformer(CFG), params(), lengths_B=lengths_B, rng=jax.random.key(0),
        max_tokens=8, how=Sampling(),
    )  # fmt: skip
    wider_BT = np.pad(prompts_BT, ((0, 0), (0, 9)), constant_values=7)
    np.testing.assert_array_equal(run(prompts_BT), run(wider_BT))


def test_a_row_ends_at_any_of_the_end_ids_and_repeats_it():
    prompts = [[1, 2, 3], [4, 5, 6]]
    free_BT = stream_ids(prompts, 24, 0, Sampling())
    end_ids = (int(free_BT[0, 5]), int(free_BT[1, 12]))
    ended_BT = stream_ids(prompts, 24, 0, Sampling(end_ids=end_ids))
    ends = [next(place for place, token in enumerate(row) if token in end_ids) for row in free_BT]
    assert 0 < min(ends) < max(ends) < ended_BT.shape[1] < 24
    for free, ended, end in zip(free_BT, ended_BT, ends, strict=True):
        assert ended[: end + 1].tolist() == free[: end + 1].tolist()
        assert set(ended[end:].tolist()) == {free[end]}
    whole_BT = generate(
        Transformer(CFG), params(), *padded(prompts), jax.random.key(0), max_tokens=24,
        how=Sampling(end_ids=end_ids),
    )  # fmt: skip
    np.testing.assert_array_equal(whole_BT[:, : ended_BT.shape[1]], ended_BT)


@pytest.mark.slow
def test_bfloat16_parameters_and_a_padded_vocabulary():
    cfg = small_model(param_dtype="bfloat16", compute_dtype="bfloat16", seq_len=8)
    fresh = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    how = Sampling(temperature=1e30, vocab_size=5)
    ids_BT, again_BT = (
        np.concatenate(
            list(stream(cfg, fresh, [[1]] * 3, max_tokens=40, rng=jax.random.key(0), how=how)), 1
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(ids_BT, again_BT)
    assert set(ids_BT.ravel().tolist()) == set(range(5))


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
    np.testing.assert_array_equal(stream_ids([prompt], 30, 0, how), ids_BT)


def kept(probabilities: list[float], **how) -> list[int]:
    """Return the ids that the filters leave."""
    logits_BV = jnp.log(jnp.array([probabilities]))
    left = filter_logits(logits_BV, Sampling(**how))[0]
    return np.flatnonzero(np.isfinite(left)).tolist()


UNEQUAL = [0.1, 0.5, 0.05, 0.3, 0.05]
TWO_LEVELS = [0.05, 0.15, 0.05, 0.15, 0.15, 0.15, 0.15, 0.15]


@pytest.mark.parametrize(
    ("probabilities", "how", "ids"),
    [
        (UNEQUAL, {}, [0, 1, 2, 3, 4]),
        (UNEQUAL, dict(top_k=2), [1, 3]),
        (UNEQUAL, dict(top_k=4), [0, 1, 2, 3]),
        (UNEQUAL, dict(top_k=9), [0, 1, 2, 3, 4]),
        (UNEQUAL, dict(top_p=0.75), [1, 3]),
        (UNEQUAL, dict(top_p=0.81), [0, 1, 3]),
        (UNEQUAL, dict(top_p=0.92), [0, 1, 2, 3]),
        (UNEQUAL, dict(top_p=0.01), [1]),
        (UNEQUAL, dict(top_p=0), [1]),
        (UNEQUAL, dict(min_p=0.19), [0, 1, 3]),
        (UNEQUAL, dict(min_p=1), [1]),
        (UNEQUAL, dict(top_k=3, top_p=0.5), [1]),  # 0.5 / 0.9 of what top-k leaves
        (UNEQUAL, dict(top_k=3, top_p=0.6), [1, 3]),
        (UNEQUAL, dict(top_p=0.81, min_p=0.19), [0, 1, 3]),  # of all of it, not of 0.9
        (UNEQUAL, dict(vocab_size=2), [0, 1]),
        (UNEQUAL, dict(vocab_size=3, top_p=0.99), [0, 1, 2]),
        (UNEQUAL, dict(temperature=1e-30), [0, 1, 2, 3, 4]),  # greedy filters nothing
        ([0.01] * 100, dict(top_k=1), [0]),
        ([0.01] * 100, dict(top_k=7), [0, 1, 2, 3, 4, 5, 6]),
        ([0.1] * 10, dict(top_p=0.25), [0, 1, 2]),
        ([0.1] * 10, dict(top_p=0), [0]),
        ([0.25] * 4, dict(top_p=0.5), [0, 1]),
        ([0.1] * 10, dict(min_p=1), list(range(10))),  # all are as likely as the likeliest
        (TWO_LEVELS, dict(top_k=3), [1, 3, 4]),
        (TWO_LEVELS, dict(top_k=7), [0, 1, 3, 4, 5, 6, 7]),
        (TWO_LEVELS, dict(top_p=0.4), [1, 3, 4]),
        (TWO_LEVELS, dict(top_p=0.92), [0, 1, 3, 4, 5, 6, 7]),
        (TWO_LEVELS, dict(top_k=4, top_p=0.7), [1, 3, 4]),
    ],
)
def test_filters_keep_by_rank(probabilities, how, ids):
    assert kept(probabilities, **how) == ids


@pytest.mark.parametrize(
    "how",
    [
        Sampling(0.3, 5, 0.9, 0.05),
        Sampling(2.0, 40, 0.7, 0.0),
        Sampling(1.0, 0, 0.999, 0.02),
        Sampling(1.0, 0, 0.3, 0.0),
        Sampling(0.7, 0, 0.0, 0.5),
        Sampling(3.0, 7, 1.0, 0.2),
        Sampling(1.5, 0, 1.0, 0.1),
    ],
)
def test_filters_are_those_of_transformers(how):
    """Without ties, in which transformers goes by value for top-k and by its sort for top-p."""
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch's transformers")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    steps = transformers.LogitsProcessorList()
    steps.append(transformers.TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        steps.append(transformers.TopKLogitsWarper(how.top_k))
    steps.append(transformers.TopPLogitsWarper(how.top_p))
    steps.append(transformers.MinPLogitsWarper(how.min_p))
    logits_BV = np.random.default_rng(0).normal(0, 3, (64, 50)).astype(np.float32)
    expected_BV = steps(torch.zeros((64, 1), dtype=torch.long), torch.tensor(logits_BV))
    found_BV = filter_logits(jnp.array(logits_BV), how)
    assert 64 <= np.isfinite(found_BV).sum() < found_BV.size
    np.testing.assert_array_equal(np.isfinite(found_BV), expected_BV.isfinite().numpy())
    np.testing.assert_allclose(jax.nn.softmax(found_BV), expected_BV.softmax(-1).numpy(), atol=1e-6)


def test_a_temperature_near_zero_is_greedy():
    logits_BV = jnp.array([[0.0, 5.0, 5.0, 4.999]])
    keys_B = jax.random.split(jax.random.key(0), 1)
    state = Decoding((), jnp.zeros(1, int), jnp.zeros(1, int), jnp.zeros(1, bool), keys_B)
    for temperature in (0.0, 1e-320, 1e-45, 1e-40, 1e-30, 9e-6):
        how = Sampling(temperature=temperature, top_p=0.5)
        assert choose(logits_BV, state, how).tokens_B.tolist() == [1]


def test_extreme_temperatures_and_logits_stay_numbers():
    logits_BV = jnp.array([[3e38, -3e38, 2.9e38, -jnp.inf]])
    for temperature, expected in ((1e-5, [1, 0, 0, 0]), (1e30, None), (1.0, [1, 0, 0, 0])):
        found = jax.nn.softmax(filter_logits(logits_BV, Sampling(temperature, top_p=0.9)))[0]
        assert np.isfinite(found).all()
        assert expected is None or found.tolist() == expected
    uniform = jax.nn.softmax(filter_logits(jnp.array([[1.0, 9.0]]), Sampling(1e30)))
    assert uniform.tolist() == [[0.5, 0.5]]


def test_temperature_scales_the_logits():
    logits_BV = jnp.array([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(
        jax.nn.softmax(filter_logits(logits_BV, Sampling(temperature=0.5))),
        jax.nn.softmax(2 * logits_BV), rtol=1e-6,
    )  # fmt: skip


@pytest.mark.slow
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


@pytest.mark.parametrize(("windows", "kinds"), [((0,), 1), ((0, 4), 2)])
def test_layers_alike_are_traced_once(windows, kinds, monkeypatch):
    cfg, traced = small_model(seq_len=32, num_layers=6, windows=windows), []
    project = Block.feed_forward
    monkeypatch.setattr(
        Block, "feed_forward", lambda self, *given: traced.append(self) or project(self, *given)
    )
    fresh = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    traced.clear()
    rows = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    jax.eval_shape(lambda params, ids: read(Transformer(cfg), params, ids, 16)[1], fresh, rows)
    assert len(traced) == kinds
