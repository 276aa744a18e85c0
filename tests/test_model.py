"""The Transformer: counts, causality, packing, cache, scan and remat."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import allocates_at_most, random_tokens, small_model

from nanojaxgpt.attention.cache import init_cache
from nanojaxgpt.config import sections
from nanojaxgpt.config.remat import named_activations
from nanojaxgpt.config.rotary import parse_rotary
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import ModelConfig, Multipliers
from nanojaxgpt.model.parameters import abstract_tree, count_params
from nanojaxgpt.model.rotary import frequencies, sinusoids
from nanojaxgpt.model.transformer import Transformer, init_params

VARIANTS = {
    "gpt2": {},
    "llama": dict(positions="rotary", norm="rmsnorm", bias=False, mlp="swiglu", num_kv_heads=1),
    "grouped": dict(num_heads=4, num_kv_heads=2, head_dim=6, mlp="geglu", tied_head=False),
    "grok": dict(norm_placement="post", final_norm=False, positions="sinusoidal", mlp="relu",
                 init="torch"),
    "alibi": dict(positions="alibi", mlp="relu2", init="fan_in", num_heads=4),
    "windows": dict(positions="none", windows=(3, 0), num_layers=3, qk_norm=True),
    "induction": dict(mlp="none", smeared_keys=True, logit_softcap=5.0),
    "parallel": dict(parallel_block=True, mlp="gelu", norm_bias=False, attention_scale=0.2),
    "sandwich": dict(norm_placement="sandwich", norm="rmsnorm", attention_softcap=2.0,
                     positions="rotary", windows=(3, 0), num_layers=3, embed_multiplier=4.0,
                     rotary=("", "base=1e6 scaling=linear factor=8")),
    "output": dict(norm_placement="output", qk_norm=True, qk_norm_over="width", bias_in="qkv",
                   positions="rotary", num_heads=4, num_kv_heads=2, head_dim=6,
                   rotary=("none", "scaling=yarn factor=4 original=8")),
    "two_norms": dict(parallel_block=True, parallel_norms=True, head_bias=True, tied_head=False,
                      positions="rotary",
                      rotary=("fraction=0.5 scaling=llama3 factor=8 original=8",)),
    "stacks": dict(mlp_dims=(12, 20), num_layers=3, bias_in="attention", residual_multiplier=0.5,
                   norm_scale=False, positions="rotary",
                   rotary=("fraction=0.5 scaling=longrope factor=2 original=8 short=1,1.5 "
                           "long=1,4",)),
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def fresh(cfg: ModelConfig) -> dict:
    """Return the initial parameters."""
    return init_params(cfg, jax.random.key(0))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_table_has_the_shapes_and_dtypes_of_the_parameters(name):
    lora = sections.Lora(rank=2)
    cfg = small_model(**VARIANTS[name], lora=lora, param_dtype="bfloat16", num_labels=3)
    assert abstract_tree(cfg) == jax.eval_shape(lambda: fresh(cfg))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(positions="rotary", head_dim=20_000_000),
        dict(positions="sinusoidal", embed_dim=20_000_000),
        dict(positions="alibi", num_heads=2**20, embed_dim=2**20),
    ],
)
def test_counting_parameters_builds_no_tables(sizes):
    with allocates_at_most(2**23):  # the rotary and sinusoidal tables have 38 MiB
        assert count_params(small_model(**sizes)) > 2**25


@functools.partial(jax.jit, static_argnames=("cfg", "deterministic"))
def apply(cfg: ModelConfig, params: dict, tokens_BT, **options) -> tuple:
    """Return what the model gives."""
    return Transformer(cfg).apply({"params": params}, tokens_BT, **options)


def build(**changes) -> tuple[ModelConfig, dict]:
    """Return a small model and parameters whose norms, biases and gates are not trivial."""
    cfg = small_model(**changes)
    params = fresh(cfg)
    leaves, tree = jax.tree.flatten(params)
    noise = np.random.default_rng(1)
    noisy = [np.float32(x + 0.3 * noise.standard_normal(x.shape)) for x in leaves]
    return cfg, jax.tree.unflatten(tree, noisy)


def forward(cfg: ModelConfig, params: dict, tokens_BT, **options) -> np.ndarray:
    """Return the logits."""
    return np.asarray(apply(cfg, params, tokens_BT, **options)[0])


@pytest.fixture(params=VARIANTS)
def variant(request) -> tuple[ModelConfig, dict]:
    """Return each variant in turn."""
    return build(**VARIANTS[request.param])


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((12, 768, 12), 124_439_808),
        ((24, 1024, 16), 354_823_168),
        ((36, 1280, 20), 774_030_080),
        ((48, 1600, 25), 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_number_of_parameters(shape, count):
    layers, width, heads = shape
    sizes = dict(num_layers=layers, embed_dim=width, num_heads=heads)
    assert count_params(small_model(**sizes, seq_len=1024, vocab_size=50257)) == count


def test_no_token_sees_a_later_one(variant):
    cfg, params = variant
    tokens_BT = random_tokens(2, 12)
    changed_BT = tokens_BT.copy()
    changed_BT[:, 7] = (changed_BT[:, 7] + 1) % cfg.vocab_size
    a_BTV, b_BTV = forward(cfg, params, tokens_BT), forward(cfg, params, changed_BT)
    np.testing.assert_array_equal(a_BTV[:, :7], b_BTV[:, :7])
    assert np.abs(a_BTV[:, 7:] - b_BTV[:, 7:]).max(axis=(0, 2)).min() > 1e-6


def test_window_is_the_reach_of_a_layer():
    cfg, params = build(num_layers=1, windows=(3,), positions="none")
    tokens_BT = random_tokens(1, 12)
    changed_BT = tokens_BT.copy()
    changed_BT[:, 4] = (changed_BT[:, 4] + 1) % cfg.vocab_size
    moved_T = np.abs(forward(cfg, params, tokens_BT) - forward(cfg, params, changed_BT)).max((0, 2))
    assert (moved_T > 1e-6).tolist() == [4 <= t < 4 + 3 for t in range(12)]


def test_packed_documents_are_the_documents_alone(variant):
    cfg, params = variant
    first_T, second_T = random_tokens(7), random_tokens(7, seed=1)
    packed = dict(
        positions_BT=np.array([[*range(7), *range(7)]]), segments_BT=np.array([[1] * 7 + [2] * 7])
    )
    both_BTV = forward(cfg, params, np.concatenate([first_T, second_T])[None], **packed)
    alone_TV = [forward(cfg, params, tokens_T[None])[0] for tokens_T in (first_T, second_T)]
    np.testing.assert_allclose(both_BTV[0], np.concatenate(alone_TV), atol=2e-5)
    unpacked_BTV = forward(cfg, params, np.concatenate([first_T, second_T])[None])
    assert np.abs(unpacked_BTV - both_BTV).max() > 1e-2


def test_cached_decoding_is_the_full_forward(variant):
    cfg, params = variant
    tokens_BT = random_tokens(2, 12)
    full_BTV = forward(cfg, params, tokens_BT)
    cache = init_cache(cfg.num_layers, 2, 14, cfg.num_kv_heads, cfg.head_dim, "float32")
    parts, start = [], 0
    for stop in (5, 6, 7, 12):  # a prompt, single tokens, and several at once
        positions_BT = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        logits_BTV, cache = apply(
            cfg, params, tokens_BT[:, start:stop], positions_BT=positions_BT, cache=cache
        )
        parts.append(logits_BTV)
        start = stop
    np.testing.assert_allclose(np.concatenate(parts, 1), full_BTV, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sandwich", "output", "two_norms", "stacks"])
def test_every_parameter_has_a_finite_gradient(name):
    cfg, params = build(**VARIANTS[name])
    tokens_BT = random_tokens(2, 12)
    loss = lambda p: jnp.sum(jnp.sin(Transformer(cfg).apply({"params": p}, tokens_BT)[0]))
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grad).all(), path
        assert np.any(grad), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows", "stacks"])
def test_scan_unroll_and_remat_are_one_function(name):
    tokens_BT = random_tokens(2, 16)

    def loss_and_grads(**changes):
        cfg, params = build(**VARIANTS[name], **changes)
        loss = lambda p: jnp.sum(jnp.sin(Transformer(cfg).apply({"params": p}, tokens_BT)[0]))
        found = jax.jit(jax.value_and_grad(loss))(params)
        return found, str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    plain, matmuls = loss_and_grads(unroll=1)
    for changes in ({"unroll": 3}, {"unroll": 1, "remat": "full"}, {"unroll": 1, "remat": "dots"}):
        other, count = loss_and_grads(**changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-4, 2e-4), plain, other)
        assert (count > matmuls) == (changes.get("remat") == "full")  # some are done twice


def test_the_activations_that_can_be_named_are_those_that_a_layer_makes(variant):
    cfg, params = variant
    run = lambda p: Transformer(cfg).apply({"params": p}, random_tokens(2, 12))[0]
    found = set(re.findall(r"name\[name=(\w+)\]", str(jax.make_jaxpr(run)(params))))
    assert found == set(named_activations(cfg))


# From the least memory to the most, which is from the most work to the least.
KEPT = {
    "full": "full",
    "attention": "save=attention",
    "heads": "save=q,k,v,attention",
    "offloaded": "save=q,k,v,attention,mlp_input offload=layer_input",
    "products": "save=q,k,v,attention,o,gate,up",
    "none": "none",
}


@pytest.mark.slow
def test_named_activations_are_saved_and_change_no_bit():
    shape = dict(VARIANTS["llama"], num_layers=8, seq_len=128, embed_dim=32, mlp_dim=128, unroll=1)
    tokens_BT = random_tokens(8, 128)

    def step(remat):
        cfg, params = build(**shape, remat=remat)
        loss = lambda p: jnp.sum(jnp.sin(Transformer(cfg).apply({"params": p}, tokens_BT)[0]))
        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        products = str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")
        return program(params), program.memory_analysis().temp_size_in_bytes, products

    found = {name: step(remat) for name, remat in KEPT.items()}
    plain = found["full"][0]
    assert float(plain[0])
    for name, (outputs, *_) in found.items():
        for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
            # With "none" a kernel's gradient is summed in another order, see project_matrix.
            bound = 1e-6 * np.abs(b).max() if name == "none" else 0
            np.testing.assert_allclose(a, b, 0, bound, err_msg=name)
    sizes = [size for _, size, _ in found.values()]
    counts = [count for *_, count in found.values()]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[4] > counts[5]


def test_offloaded_activations_wait_in_the_memory_of_the_host():
    def on_host(remat):
        cfg, params = build(num_layers=2, unroll=1, remat=remat)
        loss = lambda p: jnp.sum(Transformer(cfg).apply({"params": p}, random_tokens(2, 12))[0])
        return re.findall(
            r"f32<host>\[(.*?)\] = device_put", str(jax.make_jaxpr(jax.grad(loss))(params))
        )

    assert on_host("save=q,layer_input,attention") == []
    assert on_host("save=q offload=layer_input,attention") == ["2,12,16", "2,2,12,8"]


def test_parameters_have_one_layout_whatever_is_unrolled():
    shapes = [jax.tree.map(jnp.shape, fresh(small_model(unroll=u))) for u in (1, 2)]
    assert shapes[0] == shapes[1]


def test_layers_are_a_period_and_those_of_one_shape_a_stack():
    cfg = small_model(mlp_dims=(32, 64), num_layers=5, windows=(3, 0, 3, 0))
    assert [(layer.window, layer.mlp_dim) for layer in cfg.layers] == [(3, 32), (0, 64)]
    assert cfg.layer(4) == cfg.layers[0]
    assert cfg.stacks == {"layers_0": (0, 3), "layers_1": (1, 2)}  # the first, how many
    assert cfg.places == (
        ("layers_0", 0), ("layers_1", 0), ("layers_0", 1), ("layers_1", 1), ("layers_0", 2)
    )  # fmt: skip
    params = jax.eval_shape(lambda: fresh(cfg))
    assert params["layers_0"]["up_DF"].shape == (3, 16, 32)
    assert params["layers_1"]["up_DF"].shape == (2, 16, 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count_params(cfg)


def test_layers_of_one_shape_are_one_stack_whatever_else_differs():
    cfg = small_model(
        windows=(3, 0), mlp_dims=(0, 64), num_layers=7, positions="rotary", rotary=("", "", "none")
    )
    assert len(cfg.layers) == 6
    assert [layer.rotary is None for layer in cfg.layers] == [False, False, True] * 2
    assert cfg.stacks == {"layers": (0, 7)}  # mlp_dims 0 is 4 x 16
    assert cfg.places == tuple(("layers", index) for index in range(7))
    shallow = small_model(windows=(3, 0, 0), num_layers=2)
    assert [layer.window for layer in shallow.layers] == [3, 0]
    assert len(small_model(rotary=("", "none"), windows=(0, 0)).layers) == 1  # learned positions


def test_longrope_chooses_its_wavelengths_by_the_context():
    rotary = parse_rotary("scaling=longrope factor=4 original=8 short=1,2 long=4,8", 1e4)
    assert rotary is not None
    plain = np.array([1, 1e4**-0.5])
    for length, stretch in ((8, [1, 2]), (9, [4, 8])):
        angle, waves = frequencies(rotary, 4, length)
        np.testing.assert_allclose(angle, plain / stretch, rtol=1e-6)
        assert waves == pytest.approx((1 + np.log(4) / np.log(8)) ** 0.5)


def test_a_kernel_asked_for_by_name_is_not_replaced_silently():
    cfg, params = build(attention="splash")
    with pytest.raises(ConfigError, match="divisible by 128"):
        forward(cfg, params, random_tokens(1, 12))


def test_dropout_acts_only_when_training_and_by_its_rng():
    cfg, params = build(dropout=0.5)
    tokens_BT = random_tokens(2, 12)
    draws = [
        forward(cfg, params, tokens_BT, deterministic=False, rngs={"dropout": jax.random.key(k)})
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-2
    still = small_model(dropout=0.0)
    np.testing.assert_array_equal(
        forward(cfg, params, tokens_BT), forward(still, params, tokens_BT)
    )


def test_soft_cap_bounds_the_logits():
    cfg, params = build(logit_softcap=0.5)
    free, _ = build()
    tokens_BT = random_tokens(2, 12)
    assert np.abs(forward(free, params, tokens_BT)).max() > 0.5
    assert np.abs(forward(cfg, params, tokens_BT)).max() <= 0.5


@pytest.mark.slow
def test_initialisations_have_their_published_spread():
    wide = dict(embed_dim=256, num_heads=4, mlp_dim=1024, num_layers=8)
    spread = {}
    for name in ("gpt2", "fan_in", "torch"):
        params = fresh(small_model(**wide, init=name))
        layers = params["layers"]
        spread[name] = [
            float(jnp.std(x)) for x in (params["embed_VD"], layers["up_DF"], layers["down_DF"])
        ]
    np.testing.assert_allclose(spread["gpt2"], [0.02, 0.02, 0.02 / 4], rtol=0.05)
    np.testing.assert_allclose(spread["fan_in"], [1 / 16, 1 / 16, 1 / 32], rtol=0.05)
    np.testing.assert_allclose(spread["torch"], [1, 3**-0.5 / 16, 3**-0.5 / 32], rtol=0.05)


def test_sinusoids_are_vaswanis():
    waves_TD = np.asarray(sinusoids(jnp.arange(7), 8))
    position, pair = 5, 2
    angle = position / 10000 ** (2 * pair / 8)
    np.testing.assert_allclose(waves_TD[5, 4:6], [np.sin(angle), np.cos(angle)], rtol=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    cfg, params = build(positions="rotary", num_layers=1)
    tokens_BT = random_tokens(1, 8)
    here = forward(cfg, params, tokens_BT)
    shifted = forward(cfg, params, tokens_BT, positions_BT=np.arange(100, 108)[None])
    np.testing.assert_allclose(here, shifted, atol=1e-4)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    cfg = small_model(compute_dtype="bfloat16")
    params = fresh(cfg)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    logits_BTV = forward(cfg, params, random_tokens(2, 12))
    exact_BTV = forward(small_model(), params, random_tokens(2, 12))
    assert logits_BTV.dtype == np.float32
    assert 0 < np.abs(logits_BTV - exact_BTV).max() < 0.05


def test_multipliers_scale_embeddings_scores_and_logits():
    cfg, params = build(tied_head=False, positions="rotary")
    tokens_BT = random_tokens(2, 16)
    plain = forward(cfg, params, tokens_BT)

    def changed(**fields):
        return forward(dataclasses.replace(cfg, **fields), params, tokens_BT)

    np.testing.assert_allclose(changed(logit_multiplier=0.5), 0.5 * plain, rtol=1e-4, atol=1e-6)
    wider = params | {"embed_VD": 3 * params["embed_VD"]}
    expected = forward(cfg, wider, tokens_BT)
    np.testing.assert_allclose(changed(embed_multiplier=3.0), expected, rtol=1e-4, atol=1e-5)
    sharp = changed(attention_scale=4 * cfg.attention_scale)
    np.testing.assert_allclose(changed(attention_multiplier=4.0), sharp, rtol=1e-4, atol=1e-5)
    assert min(np.abs(plain - other).max() for other in (expected, sharp)) > 1e-2
    given = forward(cfg, params, tokens_BT, multipliers=Multipliers(3.0, 4.0, 0.5, 1.0))
    fields = dict(embed_multiplier=3.0, attention_multiplier=4.0, logit_multiplier=0.5)
    np.testing.assert_allclose(given, changed(**fields), rtol=1e-5, atol=1e-6)
