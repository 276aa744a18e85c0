"""Attention: every kernel against the formula, what each refuses, which one is chosen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt import attention, sharding
from nanojaxgpt.attention import KERNELS, attend, blocked, choose_kernel, splash
from nanojaxgpt.attention.cache import (
    Cache,
    attend_cache,
    attend_used,
    init_cache,
    update_cache,
)
from nanojaxgpt.attention.plain import plain_attention
from nanojaxgpt.attention.request import Mask, Request
from nanojaxgpt.config import base_config, with_fields
from nanojaxgpt.config.blocks import splash_blocks
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.transformer import Transformer, init_params

REQUEST = Request("cpu", 128, 128, heads=4, key_heads=2, head_dim=16, dtype="float32")
CASES = {
    "causal": dict(key_heads=4),
    "window": dict(window=50),
    "packed": dict(packed=True),
    "softcap": dict(softcap=5.0),
    "odd": dict(query_length=151, key_length=151),
    "odd-window-packed": dict(query_length=151, key_length=151, window=70, packed=True),
    "bfloat16": dict(dtype="bfloat16"),
    "all": dict(window=50, packed=True, softcap=5.0, dtype="bfloat16", key_heads=1),
}
ALONE = ("window", "packed", "softcap", "bfloat16")


def inputs(request: Request, rows: int = 2) -> tuple[list[jax.Array], Mask]:
    """Return q, k, v and the output's gradient, and the mask, of random rows.

    The numbers are those of bfloat16 in any dtype.
    """
    draw = np.random.default_rng(0)
    heads = (request.heads, request.key_heads, request.key_heads, request.heads)
    length, order_1T = request.query_length, jnp.arange(request.query_length)[None]
    arrays = [draw.standard_normal((rows, length, n, request.head_dim)) for n in heads]
    arrays[0] *= 3  # scores that a softcap of 5 changes
    segments_BT = None
    if request.packed:
        ends = draw.integers(1, length, (rows, 2, 1))
        segments_BT = jnp.asarray((np.arange(length) >= ends).sum(1), jnp.int32)
    mask = Mask(order_1T, order_1T, segments_BT, segments_BT)
    return [jnp.asarray(x, "bfloat16").astype(request.dtype) for x in arrays], mask


def gradients(request: Request, kernel: str) -> tuple[jax.Array, ...]:
    """Return a kernel's output and its gradients by q, k and v."""
    arrays, mask = inputs(request)

    @jax.jit
    def run(arrays: list[jax.Array], mask: Mask) -> tuple[jax.Array, ...]:
        mask = mask._replace(window=request.window)
        options = dict(scale=0.25, softcap=request.softcap, kernel=kernel, blocks=request.blocks)
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, **options), *arrays[:3])
        return out, *pull(arrays[3])

    return run(arrays, mask)


@functools.cache
def expected(request: Request) -> tuple[jax.Array, ...]:
    """Return what the formula gives in float32."""
    return gradients(request, "plain")


@pytest.fixture
def tiled(monkeypatch) -> None:
    """Short rows take the code for long ones, in loops over small tiles."""
    monkeypatch.setattr(blocked, "LONGEST_SAVED", 0)
    monkeypatch.setattr(blocked, "TILE", 32)
    monkeypatch.setattr(blocked, "MOST_SPANS", 2)


@pytest.fixture
def cudnn_by_xla(monkeypatch) -> None:
    """What is asked of cuDNN, which needs a GPU, is asked of XLA with the same arguments."""
    real = jax.nn.dot_product_attention
    by_xla = lambda *args, **options: real(*args, **options | {"implementation": "xla"})
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        # Interpreting splash takes a second a case; "all" has what the others have one by one.
        pytest.param(name, case, marks=[pytest.mark.slow] * (name == "splash" and case in ALONE))
        for name in ("blocked", "tiled", "library", "splash", "cudnn")
        for case in CASES
    ],
)
def test_kernel_computes_the_formula(name, case, request):
    """Splash runs interpreted; the kernel of cuDNN itself is another test's."""
    asked, kernel = dataclasses.replace(REQUEST, **CASES[case]), name
    if name == "tiled":
        request.getfixturevalue("tiled")
        kernel = "blocked"
    elif name == "cudnn":
        request.getfixturevalue("cudnn_by_xla")
        asked = dataclasses.replace(asked, platform="gpu", dtype="bfloat16")
    if reason := KERNELS[kernel].supports(asked):
        with pytest.raises(ConfigError, match=reason):
            gradients(asked, kernel)
        return
    exact = expected(dataclasses.replace(asked, platform="cpu", dtype="float32"))
    bound = 2e-5 if asked.dtype == "float32" else 3e-2
    for a, b in zip(exact, gradients(asked, kernel), strict=True):
        assert b.dtype == asked.dtype
        largest = float(jnp.max(jnp.abs(a)))
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=bound * largest, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "blocks",
    ["q=256 kv=128", "q=128 kv=256 kv_compute=128 backward_q=256 backward_kv=128 fused=true"],
)
def test_splash_computes_the_formula_with_any_blocks(blocks):
    asked = dataclasses.replace(
        REQUEST, **CASES["all"] | dict(query_length=256, key_length=256, dtype="float32")
    )
    exact = expected(asked)
    for a, b in zip(
        exact, gradients(dataclasses.replace(asked, blocks=blocks), "splash"), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(a))), rtol=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("query=1", "'query=1' is not one of q, kv, kv_compute, backward_q"),
        ("q=64", "q=64 must be a multiple of 128"),
        ("q=1.5", "'1.5' is not an integer"),
        ("q=384", "q=384 does not divide 1024 tokens on a device"),
        ("kv=256 backward_kv_compute=512", "backward_kv_compute=512 does not divide 256 kv"),
        ("fused=yes", "write fused=true or fused=false"),
    ],
)
def test_wrong_blocks_say_what_is_wrong(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        with_fields(base_config(), {"model.seq_len": 1024, "model.attention_blocks": text})


def test_blocks_are_of_the_tokens_that_a_device_has():
    usual = splash_blocks("", 256, 1024)
    assert usual == (256, 512, 512, 256, 512, 512, False)
    asked = dataclasses.replace(
        REQUEST, query_length=1024, key_length=1024, sequence_shards=4, blocks="q=512"
    )
    assert "q=512 does not divide 256 tokens" in splash.supports(asked)


@pytest.mark.parametrize(("remat", "kernels"), [("save=q,k,v,attention", 3), ("full", 4)])
def test_splash_runs_forward_once_where_its_results_are_saved(remat, kernels):
    sizes = dict(num_layers=1, seq_len=128, attention="splash", unroll=1, remat=remat)
    cfg, tokens_BT = small_model(**sizes), jnp.zeros((1, 128), jnp.int32)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    loss = lambda p: jnp.sum(Transformer(cfg).apply({"params": p}, tokens_BT)[0])
    assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("pallas_call[") == kernels


def test_the_cases_differ():
    """So that a kernel that ignores an option fails above."""
    plain = expected(dataclasses.replace(REQUEST, key_heads=2))[0]
    for case in ("window", "packed", "softcap"):
        other = expected(dataclasses.replace(REQUEST, **CASES[case]))[0]
        assert float(jnp.max(jnp.abs(other - plain))) > 0.5


@pytest.mark.skipif(
    jax.default_backend() != "gpu",
    reason="needs an NVIDIA GPU, and NANOJAXGPT_TEST_PLATFORMS=cuda,cpu",
)
@pytest.mark.parametrize("case", ["causal", "window", "packed"])
def test_cudnn_itself_computes_the_formula(case):
    asked = dataclasses.replace(REQUEST, **CASES[case], platform="gpu", dtype="bfloat16")
    exact = expected(dataclasses.replace(asked, dtype="float32"))
    for a, b in zip(exact, gradients(asked, "cudnn"), strict=True):
        bound = 3e-2 * float(jnp.max(jnp.abs(a)))
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("blocked", dict(alibi=True), "no ALiBi"),
        ("blocked", dict(dropout=0.1), "dropout"),
        ("blocked", dict(query_length=4), "as many queries as keys"),
        ("library", dict(softcap=30.0), "softcap"),
        ("library", dict(dropout=0.1), "dropout"),
        ("cudnn", dict(platform="cpu"), "this is a cpu"),
        ("cudnn", dict(softcap=30.0), "softcap"),
        ("cudnn", dict(alibi=True), "ALiBi"),
        ("cudnn", dict(dropout=0.1), "dropout"),
        ("cudnn", dict(dtype="float32"), "bfloat16"),
        ("cudnn", dict(head_dim=12), "divisible by 8"),
        ("cudnn", dict(head_dim=512), "256 at most"),
        ("cudnn", dict(query_length=4), "as many queries as keys"),
        ("cudnn", dict(query_length=7, key_length=7), "even length"),
        ("splash", dict(alibi=True), "ALiBi"),
        ("splash", dict(dropout=0.1), "dropout"),
        ("splash", dict(query_length=100, key_length=100), "divisible by 128"),
        ("splash", dict(sequence_shards=2), "divisible by 128"),
        ("splash", dict(query_length=4), "as many queries as keys"),
    ],
)
def test_what_a_kernel_can_t_do_has_a_reason(kernel, changes, reason):
    fits = dataclasses.replace(REQUEST, platform="gpu", dtype="bfloat16")
    assert KERNELS[kernel].supports(fits) == ""
    asked = dataclasses.replace(fits, **changes)
    assert reason in KERNELS[kernel].supports(asked)
    with pytest.raises(ConfigError, match=rf"model.attention='{kernel}' .*{reason}"):
        choose_kernel(asked, kernel)
    assert KERNELS["plain"].supports(asked) == ""
    assert KERNELS[choose_kernel(asked)].supports(asked) == ""


@pytest.mark.parametrize(
    ("changes", "asked", "chosen"),
    [
        ({}, "auto", "blocked"),
        (dict(platform="tpu"), "auto", "splash"),
        (dict(platform="tpu", softcap=30.0), "auto", "splash"),
        (dict(platform="tpu"), "xla", "blocked"),
        (dict(platform="gpu"), "auto", "blocked"),
        (dict(platform="gpu", dtype="bfloat16"), "auto", "cudnn"),
        (dict(platform="gpu", dtype="bfloat16", softcap=30.0), "auto", "blocked"),
        (dict(alibi=True), "auto", "library"),
        (dict(alibi=True), "xla", "library"),
        (dict(dropout=0.1), "xla", "plain"),
        (dict(dropout=0.1, alibi=True), "auto", "plain"),
        ({}, "plain", "plain"),
        (dict(query_length=1, key_length=1), "splash", "blocked"),  # only initializes
    ],
)
def test_the_first_kernel_that_supports_the_request_is_chosen(changes, asked, chosen):
    assert choose_kernel(dataclasses.replace(REQUEST, **changes), asked) == chosen


def test_an_unknown_kernel_is_named():
    with pytest.raises(ConfigError, match="'flash' is not one of auto, xla, plain"):
        choose_kernel(REQUEST, "flash")


@pytest.mark.parametrize("window", [0, 1, 100, 3000, 10_000])
@pytest.mark.parametrize("length", [1, 127, 128, 4096, 5001])
def test_tiles_take_every_query_once_with_all_the_keys_it_sees(length, window):
    queries = []
    for tiles in blocked._tiles(length, window):
        assert tiles.span <= length
        for start in range(tiles.first, tiles.first + tiles.count * tiles.size, tiles.size):
            low = max(start + tiles.size - tiles.span, 0)
            assert low + tiles.span >= start + tiles.size
            assert low <= (max(start + 1 - window, 0) if window else 0)
            queries += range(start, start + tiles.size)
    assert queries == list(range(length))
    assert len(blocked._tiles(length, window)) <= blocked.MOST_SPANS + 1


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2, sequence=2), dict(fsdp=2, tensor=4)])
def test_tiles_on_a_mesh_are_the_formula(sizes, tiled):
    asked = dataclasses.replace(REQUEST, window=50, packed=True, softcap=5.0, key_heads=4)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        found = gradients(asked, "blocked")
    for a, b in zip(expected(asked), found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(a))), rtol=0)


def traced(length: int) -> jax.stages.Traced:
    """Return the trace of the gradients of one row's output."""
    q_BTNH = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    order_1T = jnp.arange(length)[None]

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attend(*qkv, Mask(order_1T, order_1T), scale=0.25))

    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*[q_BTNH] * 3)


def test_memory_of_tiles_is_linear_in_the_length(tiled):
    """Beside inputs and outputs; the scores of all pairs would take four times as much."""

    def temporaries(length: int) -> int:
        return traced(length).lower().compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(2048)
    assert short < long < 2.1 * short
    assert long < 2048 * 2048 * 4 // 4


def test_rows_from_some_length_on_are_tiled():
    assert "scan" not in str(traced(blocked.LONGEST_SAVED).jaxpr)
    assert "scan" in str(traced(blocked.LONGEST_SAVED + 1).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 5.0)])
def test_decoding_from_a_prefilled_cache_is_attention_over_the_whole_row(window, softcap):
    """The prompt takes a kernel over its own keys; the cache is written beside it."""
    request = dataclasses.replace(REQUEST, query_length=20, key_length=20)
    (q, k, v, _), mask = inputs(request)
    options = dict(scale=0.25, softcap=softcap)
    whole = attend(q, k, v, mask._replace(window=window), kernel="plain", **options)

    order_1T, slots_1S = jnp.arange(16)[None], jnp.arange(24)[None]
    prompt = Mask(order_1T, order_1T, window=window)
    found = [attend(q[:, :16], k[:, :16], v[:, :16], prompt, **options)]
    cache = init_cache(1, 2, 24, request.key_heads, request.head_dim, "float32")[0]
    cache = update_cache(cache, k[:, :16], v[:, :16], order_1T)
    for start, stop in ((16, 17), (17, 20)):
        positions_BT = jnp.arange(start, stop)[None]
        cache = update_cache(cache, k[:, start:stop], v[:, start:stop], positions_BT)
        step = Mask(positions_BT, slots_1S, window=window)
        found.append(attend_cache(q[:, start:stop], cache, step, **options))
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-5)


def test_dropout_keeps_the_mean():
    q_BTNH = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    mask = Mask(jnp.arange(8)[None], jnp.arange(8)[None])
    exact = attend(q_BTNH, q_BTNH, q_BTNH, mask, scale=0.5)
    draw = lambda rng: attend(q_BTNH, q_BTNH, q_BTNH, mask, scale=0.5, dropout=0.2, rng=rng)
    draws = jax.vmap(draw)(jax.random.split(jax.random.key(1), 4000))
    assert np.abs(draws - exact).max() > 0.1
    np.testing.assert_allclose(draws.mean(0), exact, atol=0.05)


@pytest.mark.parametrize("rows", [None, (1, 0, 1)])
@pytest.mark.parametrize(
    "options",
    [{}, dict(window=40), dict(softcap=5.0), dict(alibi=True), dict(key_heads=4),
     dict(dtype="bfloat16"), dict(window=200, softcap=5.0, alibi=True, key_heads=1)],
)  # fmt: skip
def test_the_used_blocks_of_a_cache_are_all_of_it(options, rows):
    """Also bit for bit: how many blocks are read, and what stands behind, changes nothing."""
    draw, slots, heads = np.random.default_rng(0), 300, options.get("key_heads", 2)
    dtype, window = options.get("dtype", "float32"), options.get("window", 0)
    q_BTNH, k_BKSH, v_BKSH = (
        jnp.asarray(draw.standard_normal(shape), dtype)
        for shape in ((3, 3, 4, 16), (3, heads, slots, 16), (3, heads, slots, 16))
    )
    positions_BT = jnp.array([[5], [150], [37]]) + jnp.arange(3)
    rows_B = None if rows is None else jnp.array(rows)
    chosen = slice(None) if rows is None else rows_B
    q_BTNH *= 3
    mask = Mask(positions_BT, jnp.arange(slots)[None], window=window)
    scores = dict(scale=0.25, softcap=options.get("softcap", 0.0), alibi="alibi" in options)

    @jax.jit
    def run(used: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array) -> jax.Array:
        cache = Cache(k_BKSH, v_BKSH, used, rows_B)
        return attend_used(q_BTNH, cache, mask, **scores)

    expected = plain_attention(q_BTNH, k_BKSH[chosen], v_BKSH[chosen], mask, *scores.values())
    found = run(153, k_BKSH, v_BKSH)
    atol = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=atol)
    behind = jnp.arange(slots)[:, None] >= 153
    other = jnp.where(behind, 7, k_BKSH), jnp.where(behind, -7, v_BKSH)
    for used in (153, 256, 257, 300):
        np.testing.assert_array_equal(run(used, *other), found)
    seen = 152 - 20
    assert (run(153, k_BKSH.at[:, :, seen].add(1), v_BKSH) != found).any()
    short = run(40, k_BKSH, v_BKSH)
    assert (short[2] == found[2]).all()  # it sees no more
    assert (short[1] != found[1]).any()
