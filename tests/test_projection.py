"""Products in bfloat16, their gradients against float64; where bfloat16 is the dtype."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt import cpu, products, sharding
from nanojaxgpt.attention import attend
from nanojaxgpt.attention.cache import init_cache
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.loss import token_loss
from nanojaxgpt.model.block import ACTIVATIONS, activate
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.model.projection import decoding_params, project
from nanojaxgpt.model.transformer import Transformer, init_params


@pytest.fixture(params=[False, True], ids=["any CPU", "with bfloat16"])
def fast_cpu(request, monkeypatch) -> bool:
    """Have the gradients computed as on a CPU with or without instructions for bfloat16."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("terms", ["TI,IO->TO", "TI,OI->TO"])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_gradients_in_bfloat16_are_those_of_float64(terms, sizes, dtype, fast_cpu):
    rng, (inputs, outputs) = np.random.default_rng(0), sizes
    x, dy = rng.normal(size=(2, 9, inputs)), rng.normal(size=(2, 9, outputs))
    kernel = rng.normal(size=sizes if "IO" in terms else sizes[::-1])
    small = [jnp.bfloat16(a) for a in (x, kernel, dy)]

    def value(x, kernel, dy):
        return jnp.sum(project(x, kernel, terms, dtype).astype(jnp.float32) * dy)

    y = project(*small[:2], terms, dtype)
    assert y.dtype == (dtype or jnp.bfloat16)
    dx, dw = jax.jit(jax.grad(value, (0, 1)))(*small)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    x, kernel, dy = (np.asarray(a, np.float64) for a in small)
    matrix = terms.split(",")[1].split("->")[0]
    for found, right in (
        (dx, np.einsum(f"BTO,{matrix}->BTI", dy, kernel)),
        (dw, np.einsum(f"BTI,BTO->{matrix}", x, dy)),
    ):
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, right, rtol=2**-8, atol=2**-8 * np.abs(right).max())


def test_every_product_of_a_step_in_bfloat16_multiplies_bfloat16(fast_cpu):
    cfg = small_model(compute_dtype="bfloat16", num_layers=1)
    model, tokens = Transformer(cfg), jnp.zeros((1, 8), jnp.int32)
    params = init_params(cfg, jax.random.key(0))

    def loss(params):
        logits, _ = model.apply({"params": params}, tokens)
        return jnp.sum(token_loss(logits, tokens, jnp.float32(0)))

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    found = re.findall(r"dot_general.*\(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", text)
    assert len(found) >= 3 * 7  # forward, and two gradients: six kernels and the head
    assert found == [("bf16", "bf16")] * len(found)


@pytest.mark.parametrize(
    ("features", "dtype", "shapes", "expected"),
    [
        ("avx2", "float32", [(9, 4), (9, 8)], True), ("avx2", "float32", [(9, 8), (9, 8)], False),
        ("avx512f", "float32", [(9, 4), (9, 8)], False),
        ("avx2", "float32", [(2, 9, 4), (2, 9, 8)], False),
        ("avx2", "bfloat16", [(9, 4), (9, 8)], False),
        ("amx_bf16", "bfloat16", [(2, 9, 8), (2, 9, 4)], True),
    ],
)  # fmt: skip
def test_a_product_over_tokens_is_transposed_where_that_is_faster(
    features, dtype, shapes, expected, monkeypatch
):
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    for name in ("has_avx512", "multiplies_bfloat16"):
        monkeypatch.setattr(products, name, getattr(cpu, name).__wrapped__)
    pair = [jnp.ones(shape, dtype) for shape in shapes]
    assert products.gains_by_transpose(*pair) == expected
    text = jax.jit(lambda *pair: products.multiply_transposed(*pair, dtype)).lower(*pair).as_text()
    assert ("stablehlo.pad" in text) == expected


@pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["blocks", "tiles"])
def test_gradients_of_attention_in_bfloat16_are_those_of_float32(softcap, fast_cpu):
    rng, order = np.random.default_rng(0), jnp.arange(160)[None]
    arrays = [jnp.bfloat16(rng.normal(size=(2, 160, 3, 32))) for _ in range(4)]

    def gradients(q, k, v, d_out):
        def value(q, k, v):
            out = attend(q, k, v, Mask(order, order), scale=0.2, softcap=softcap, kernel="blocked")
            return jnp.sum(out.astype(jnp.float32) * d_out)

        return jax.jit(jax.grad(value, (0, 1, 2)))(q, k, v)

    right = gradients(*(a.astype(jnp.float32) for a in arrays))
    for found, exact in zip(gradients(*arrays), right, strict=True):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.float32(found) - exact).max()
        assert error < 2**-6 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_bfloat16_are_rounded_once(kind):
    x, dy = (jnp.linspace(-4, 4, 999, dtype=jnp.bfloat16) * sign for sign in (1, -1))

    def gradient(x):
        y, pull = jax.vjp(lambda x: activate(x, kind), x)
        return y, pull(dy.astype(y.dtype))[0]

    found, right = gradient(x), gradient(x.astype(jnp.float32))
    for one, exact in zip(found, right, strict=True):
        np.testing.assert_array_equal(np.float32(one), np.float32(exact.astype(jnp.bfloat16)))


def test_gradients_of_biases_are_summed_in_float32():
    cfg = small_model(compute_dtype="bfloat16", num_layers=1, bias=True)
    model, tokens = Transformer(cfg), jnp.arange(64, dtype=jnp.int32).reshape(4, 16) % 31
    params = init_params(cfg, jax.random.key(0))
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens)[0])))(params)
    biases = {name: g for name, g in grads["layers"].items() if name.endswith("_bias")}
    assert biases
    for name, grad in biases.items():
        rounded = grad.astype(jnp.bfloat16).astype(jnp.float32)
        assert name == "k_bias" or (rounded != grad).any()


@pytest.mark.parametrize(
    ("platform", "features", "expected"),
    [
        ("gpu", "", "bfloat16"), ("tpu", "", "bfloat16"), ("cpu", "flags: fma avx2", "float32"),
        ("cpu", "flags: amx_tile amx_bf16", "bfloat16"),
        ("cpu", "flags: avx512_bf16 fma", "bfloat16"), ("cpu", "", "float32"),
    ],
)  # fmt: skip
def test_auto_is_bfloat16_where_that_is_faster(platform, features, expected, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_features", lambda: features)
    monkeypatch.setattr(sharding, "multiplies_bfloat16", cpu.multiplies_bfloat16.__wrapped__)
    assert sharding.compute_dtype("auto", platform) == expected
    assert sharding.compute_dtype("float32", platform) == "float32"


@pytest.mark.slow
def test_a_run_records_the_dtype_that_auto_was(small_config, tmp_path, monkeypatch):
    from nanojaxgpt.rundir import read_config
    from nanojaxgpt.training import fit

    cfg = small_config(**{"model.compute_dtype": "auto", "train.num_steps": "2", "mesh.data": "-1"})
    monkeypatch.setattr(sharding, "multiplies_bfloat16", lambda: True)
    fit(cfg, tmp_path / "run", report=lambda _: None)
    assert read_config(tmp_path / "run").model.compute_dtype == "bfloat16"
    monkeypatch.setattr(sharding, "multiplies_bfloat16", lambda: False)
    longer = small_config(
        **{"model.compute_dtype": "auto", "train.num_steps": "4", "mesh.data": "-1"}
    )
    with pytest.raises(ConfigError, match=r"model.compute_dtype.*'bfloat16'.*'float32'"):
        fit(longer, tmp_path / "run", report=lambda _: None)


@pytest.mark.parametrize("kernel", ["plain", "xla"])
def test_attention_in_bfloat16_sums_in_float32(kernel):
    rng, order = np.random.default_rng(0), jnp.arange(64)[None]
    q, k, v = (jnp.bfloat16(rng.normal(size=(2, 64, heads, 32))) for heads in (6, 3, 3))

    def run(*arrays):
        return attend(*arrays, Mask(order, order), scale=0.2, kernel=kernel)

    found, right = run(q, k, v), run(*(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(np.float32(found), right, atol=2**-6, rtol=2**-7)


def test_one_row_of_bfloat16_is_multiplied_as_two():
    """XLA's CPU backend would write the kernel as float32 first: an eighth of the speed."""
    rng = np.random.default_rng(0)
    x_2TI = jnp.bfloat16(rng.normal(size=(2, 1, 96)))
    kernel = jnp.bfloat16(rng.normal(size=(96, 40)))
    alone = jax.jit(project).lower(x_2TI[:1], kernel)
    assert "(tensor<2x96xbf16>, tensor<96x40xbf16>)" in alone.as_text()
    both = jax.jit(project)(x_2TI, kernel)
    np.testing.assert_array_equal(alone.compile()(x_2TI[:1], kernel), both[:1])


def test_decoding_casts_matrices_once_and_changes_no_bit():
    cfg = small_model(compute_dtype="bfloat16", tied_head=False, bias=True)
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    laid_out = decoding_params(cfg, params, 1)
    for row in parameters(cfg).values():
        array = laid_out["layers"][0][row.name] if row.stack else laid_out[row.name]
        assert array.dtype == ("bfloat16" if row.is_matrix else "float32"), row.path
    cache = init_cache(cfg.num_layers, 1, 8, cfg.num_kv_heads, cfg.head_dim, "bfloat16")
    layers = tuple({name: leaf[at] for name, leaf in params["layers"].items()} for at in (0, 1))
    tokens_BT = np.arange(8)[None]

    @jax.jit
    def apply(params):
        return Transformer(cfg).apply({"params": params}, tokens_BT, tokens_BT, cache=cache)[0]

    np.testing.assert_array_equal(apply(params | {"layers": layers}), apply(laid_out))
