"""The loss: its value and gradient against the plain formula, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from nanojaxgpt.loss import loss_sum, token_loss


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
