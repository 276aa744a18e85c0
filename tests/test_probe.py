"""Probes: the logits are those of the model's own attention, for every kind of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_model

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.papers.probe import attention_logits, attention_weights, largest_logits

KINDS = {
    "plain": {},
    "rotary with normalized heads": dict(positions="rotary", qk_norm=True),
    "grouped, windows that differ": dict(num_heads=4, num_kv_heads=2, windows=(3, 0)),
    "alibi": dict(positions="alibi"),
    "smeared keys, muP": dict(smeared_keys=True, mup_base_dim=8),
    "remat": dict(remat="full"),
}


def given(**changes):
    cfg = small_model(mlp="none", init="fan_in", final_norm=False, **changes)
    params = init_params(cfg, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    tokens_BT = random_tokens(3, 16)
    segments_BT = np.repeat([[0] * 9 + [1] * 7], 3, 0).astype(np.int32)
    ones_BT = np.ones((3, 16), np.float32)
    positions_BT = np.where(segments_BT, np.arange(16) - 9, np.arange(16)).astype(np.int32)
    return cfg, params, Batch(tokens_BT, tokens_BT, ones_BT, segments_BT, positions_BT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_the_model_uses(kind):
    cfg, params, batch = given(**KINDS[kind])
    weights_LBNTS = attention_weights(cfg, params, batch)
    assert weights_LBNTS.shape == (2, 3, cfg.num_heads, 16, 16)
    np.testing.assert_allclose(weights_LBNTS.sum(-1), 1, rtol=1e-5)
    assert weights_LBNTS[..., 9:, :9].max() == 0  # another document
    logits_LBNTS = attention_logits(cfg, params, batch)
    np.testing.assert_array_equal(
        largest_logits(cfg, params, batch), logits_LBNTS.max(axis=(1, 2, 3, 4))
    )

    def stream(layers: int):
        cut = {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
        inputs = batch.tokens_BT, batch.positions_BT, batch.segments_BT
        model = Transformer(replace(cfg, num_layers=layers))
        return model.apply({"params": cut}, *inputs, logits=False)[0][0]

    own = jax.tree.map(lambda x: x[1], params["layers"])
    y_BTD = jax.nn.standardize(stream(1), epsilon=cfg.norm_eps)
    y_BTD = y_BTD * own["attention_norm_scale"] + own["attention_norm_bias"]
    v_BSKH = jnp.einsum("BSD,DKH->BSKH", y_BTD, own["v_DKH"]) + own["v_bias"]
    v_BSNH = jnp.repeat(v_BSKH, cfg.num_heads // cfg.num_kv_heads, 2)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_LBNTS[1], v_BSNH)
    by_hand_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, own["o_NHD"]) + own["o_bias"]
    by_model_BTD = stream(2) - stream(1)
    assert jnp.abs(by_model_BTD).max() > 0.3
    np.testing.assert_allclose(by_hand_BTD, by_model_BTD, atol=2e-4)


@pytest.mark.slow
def test_nothing_is_kept_where_nobody_asks():
    cfg, params, batch = given()
    assert list(Transformer(cfg).init(jax.random.key(0), batch.tokens_BT)) == ["params"]
    (logits_BTV, cache), kept = Transformer(cfg).apply(
        {"params": params}, batch.tokens_BT, mutable="intermediates"
    )
    assert list(kept) == ["intermediates"]
    alone_BTV, _ = Transformer(cfg).apply({"params": params}, batch.tokens_BT)
    np.testing.assert_allclose(logits_BTV, alone_BTV, atol=1e-5)  # one is a loop, one a scan
    assert cache is None
