"""The loss: its value and gradient against the plain formula, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens, small_model
from jax.sharding import NamedSharding

from nanojaxgpt.loss import loss_sum, map_chunks, token_loss
from nanojaxgpt.model.head import Head
from nanojaxgpt.rehearse.collectives import read_collectives
from nanojaxgpt.sharding import make_mesh, partition_spec


def plain(logits_BTV, targets_BT, z_loss):
    """Return the token losses by their definition."""
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    picked_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], -1)[..., 0]
    return -picked_BT + z_loss * jax.nn.logsumexp(logits_BTV, -1) ** 2


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_value_and_gradient_are_the_formulas(z_loss):
    logits_BTV = 3 * jax.random.normal(jax.random.key(0), (2, 6, 31))
    targets_BT, weights_BT = random_tokens(2, 6), np.linspace(0, 1, 12).reshape(2, 6)
    total = lambda f, x: jnp.sum(f(x, targets_BT, z_loss) * weights_BT)
    ours = jax.value_and_grad(lambda x: total(token_loss, x))(logits_BTV)
    theirs = jax.value_and_grad(lambda x: total(plain, x))(logits_BTV)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), ours, theirs)


def test_z_loss_has_a_gradient_of_its_own():
    logits_BTV = jax.random.normal(jax.random.key(0), (2, 6, 31))
    total = lambda f, z: jnp.sum(f(logits_BTV, random_tokens(2, 6), z))
    ours = jax.grad(lambda z: total(token_loss, z))(0.1)
    np.testing.assert_allclose(ours, jax.grad(lambda z: total(plain, z))(0.1), rtol=1e-5)


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_give_the_same_value_and_gradient(chunks):
    x_BTD = jax.random.normal(jax.random.key(0), (2, 8, 5))
    head_VD = jax.random.normal(jax.random.key(1), (31, 5))
    targets_BT, weights_BT = random_tokens(2, 8), np.linspace(0, 1, 16).reshape(2, 8)

    def run(chunks):
        def loss(x_BTD, head_VD):
            head = lambda x: jnp.einsum("BTD,VD->BTV", x, head_VD)
            return loss_sum(head, x_BTD, targets_BT, weights_BT, 0.01, chunks)

        return jax.value_and_grad(loss, (0, 1))(x_BTD, head_VD)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), run(1), run(chunks))


def test_chunks_never_hold_all_logits():
    def jaxpr(chunks):
        head_VD = jnp.ones((31, 5))
        head = lambda x: jnp.einsum("BTD,VD->BTV", x, head_VD)
        loss = lambda x: loss_sum(head, x, random_tokens(2, 8), np.ones((2, 8)), 0.0, chunks)
        return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 8, 5))))

    assert "f32[2,8,31]" in jaxpr(1)
    assert "f32[2,8,31]" not in jaxpr(4)
    assert "f32[2,2,31]" in jaxpr(4)


def test_tokens_of_weight_zero_count_for_nothing():
    logits = lambda x: x
    x_BTV = jax.random.normal(jax.random.key(0), (1, 4, 31))
    targets_BT, weights_BT = random_tokens(1, 4), np.array([[1.0, 0, 1, 0]])
    whole = loss_sum(logits, x_BTV, targets_BT, weights_BT)
    rest = loss_sum(logits, x_BTV[:, ::2], targets_BT[:, ::2], weights_BT[:, ::2])
    np.testing.assert_allclose(whole, rest, rtol=1e-6)


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(slice=2, fsdp=2, sequence=2), dict(data=8)])
def test_on_a_mesh_the_head_is_gathered_and_its_gradient_summed_once(sizes):
    cfg = small_model(vocab_size=32, logit_softcap=9.0)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    x_BTD, head_VD, bias_V, wise_VD = (
        draw(0, 8, 16, 16),
        draw(1, 32, 16),
        draw(2, 32),
        draw(3, 32, 16),
    )
    targets_BT, weights_BT = random_tokens(8, 16), np.linspace(0, 1, 128).reshape(8, 16)

    def loss(x_BTD, head_VD, bias_V, wise_VD, multiplier, chunks=4):
        head = Head(head_VD, bias_V, multiplier, "TI,OI->TO", cfg)
        wise = Head(wise_VD, None, 1.0, "TI,OI->TO", cfg)
        pair = lambda heads, x: jnp.sum(heads[0](x) * heads[1](x), -1)
        products_BT = map_chunks(pair, chunks, (head, wise), x_BTD)
        one = loss_sum(head, x_BTD, targets_BT, weights_BT, multiplier / 9, chunks)
        return one + jnp.sum(jnp.sin(products_BT) * weights_BT)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))
    arrays = x_BTD, head_VD, bias_V, wise_VD, jnp.float32(1.5)
    plain = run(*arrays)
    mesh = make_mesh(sizes)
    axes = ("batch", "sequence", None), ("vocab", "embed"), ("vocab",), ("vocab", "embed"), ()
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, partition_spec(names)))
            for array, names in zip(arrays, axes, strict=True)
        ]
        found = run(*placed)
        program = read_collectives(run.lower(*placed).compile().as_text())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 2e-5), plain, found)
    assert not program.unknown_loops
    assert max(one.times for one in program.collectives) == 1
    kinds = {one.kind for one in program.collectives if one.size >= head_VD.nbytes}
    assert kinds >= ({"all-gather", "reduce-scatter"} if "fsdp" in sizes else {"all-reduce"})


@pytest.mark.parametrize("sizes", [dict(tensor=8), dict(data=4, tensor=2), dict(sequence=8)])
def test_where_chunks_cannot_be_local_the_compiler_decides(sizes):
    cfg, draw = small_model(vocab_size=32), jax.random.normal
    x_BTD, head_VD = draw(jax.random.key(0), (4, 16, 16)), draw(jax.random.key(1), (32, 16))

    def loss(x_BTD, head_VD):
        head = Head(head_VD, None, 1.0, "TI,OI->TO", cfg)
        return loss_sum(head, x_BTD, random_tokens(4, 16), np.ones((4, 16)), 0.0, 4)

    plain = jax.jit(jax.value_and_grad(loss, (0, 1)))(x_BTD, head_VD)
    with jax.set_mesh(make_mesh(sizes)):
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(x_BTD, head_VD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 2e-5), plain, found)
