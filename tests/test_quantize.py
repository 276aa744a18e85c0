"""A frozen base in int8: how far off it is, that nothing larger is kept, that runs hold."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_model
from test_lora import (
    GATED,
    TOKENS_BT,
    adapted_model,
    cfg,
    first_losses,
    forward,
    gpt2,
    paths,
    random_adapters,
    run_losses,
    silent,
)

from nanojaxgpt import language_model, memory, sharding
from nanojaxgpt.config import override_config, typed
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.opening import adopt_model
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.model.quantize import Int8, dequantize_base, project_int8, quantize_base
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.step import make_step
from nanojaxgpt.training import fit

__all__ = ["cfg", "gpt2"]  # fixtures


def int8_model(**changes):
    """Return the small model with adapters, whose base is int8."""
    model = adapted_model(**changes)
    return dataclasses.replace(model, lora=dataclasses.replace(model.lora, base_dtype="int8"))


@pytest.mark.parametrize("more", [{}, GATED])
def test_a_number_is_off_by_half_a_step_of_its_output(more):
    cfg = int8_model(**more)
    params = random_adapters(cfg)
    small = quantize_base(cfg, params)
    back = dequantize_base(cfg, small)
    for path, row in parameters(cfg).items():
        stack, name = path.split("/") if "/" in path else ("", path)
        old, new = (tree[stack][name] if stack else tree[name] for tree in (params, back))
        if row.kind != "kernel":
            assert new is old
            continue
        held = small[stack][name]
        assert (held.values.dtype, held.scale.size) == (jnp.int8, old.size // size_of(row))
        axes = tuple(axis + 1 for axis in row.summed)
        step = np.abs(old).max(axes, keepdims=True) / 127
        assert np.all(np.abs(old - new) <= 0.5001 * step)
        assert np.any(old != new)
    np.testing.assert_allclose(forward(cfg, small), forward(cfg, back), atol=1e-5)


def size_of(row) -> int:
    """Return how many numbers a product with one output of a kernel sums over."""
    return int(np.prod([row.shape[axis] for axis in row.summed]))


@pytest.mark.slow
def test_gradients_are_those_of_the_same_kernels_as_floats():
    cfg = int8_model(**GATED)
    small = quantize_base(cfg, random_adapters(cfg))
    floats, targets_BT = dequantize_base(cfg, small), jnp.roll(TOKENS_BT, -1, 1)
    own = [row.path.split("/") for row in parameters(cfg).values() if row.kind == "adapter"]

    def loss(adapters, base):
        params = {name: dict(leaf) if isinstance(leaf, dict) else leaf
                  for name, leaf in base.items()}  # fmt: skip
        for (stack, name), leaf in zip(own, adapters, strict=True):
            params[stack][name] = leaf
        logits_BTV = Transformer(cfg).apply({"params": params}, TOKENS_BT)[0]
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], -1)
        )

    adapters = [small[stack][name] for stack, name in own]
    found, wanted = (jax.jit(jax.grad(loss))(adapters, base) for base in (small, floats))
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-4)


def test_the_backward_pass_keeps_no_kernel_as_floats():
    """The layers' kernels, converted, would be a stack of float32."""
    layers, width = 5, 24
    held = Int8(jnp.ones((layers, width, width), jnp.int8), jnp.ones((layers, width)))

    def run(x_TI, held, product):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x_TI, held)[0])

    def plain(x_TI, kernel):
        return (x_TI @ kernel.values.astype(x_TI.dtype)) * kernel.scale

    def own(x_TI, kernel):
        return project_int8(x_TI, kernel, "TI,IO->TO")

    kept = f"f32[{layers},{width},{width}]"
    x_TI = jnp.ones((7, width))
    texts = [
        jax.jit(jax.grad(run), static_argnums=2).lower(x_TI, held, product).compile().as_text()
        for product in (plain, own)
    ]
    assert [kept in text for text in texts] == [True, False]


def test_bytes_on_a_device(cfg, tmp_path):
    cfg = override_config(cfg, {"lora.base_dtype": "int8"})
    cfg = adopt_model(typed(cfg), tmp_path)
    job, mesh = resolve(cfg, prepare_data(cfg, silent)), sharding.make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        step = make_step(job, mesh)
        batch = memory.abstract_batch(job, mesh)
        found = memory.state_memory(job, step.abstract, step.frozen, batch, 1e9)
    table = parameters(job.model).values()
    kernels = [row for row in table if row.kind == "kernel"]
    own = sum(row.size for row in kernels)
    scales = sum(row.size // size_of(row) for row in kernels)
    rest = sum(row.size for row in table) - own
    assert found.parameters == own + 4 * scales + 4 * rest


@pytest.mark.slow
def test_a_run_on_an_int8_base_holds(cfg, gpt2, tmp_path):
    cfg = override_config(cfg, {"lora.base_dtype": "int8"})
    run = tmp_path / "run"
    state = fit(cfg, run, report=silent)
    assert run_losses(run)[-1] < run_losses(run)[0]
    shutil.rmtree(run / "checkpoints" / "6")
    again = fit(cfg, run, report=silent)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # What is sampled and exported is the base that was trained on, and not the one it came from.
    model, origin = (language_model.load(one, report=silent) for one in (run, gpt2))
    now, before = (paths(one.params)["layers/q_DNH"] for one in (model, origin))
    assert 0 < np.abs(now - before).max() < np.abs(before).max() / 127
    model.save(tmp_path / "hf", "hf")
    other = language_model.load(tmp_path / "hf", report=silent)
    np.testing.assert_allclose(other.logits(TOKENS_BT), model.logits(TOKENS_BT), atol=1e-5)


@pytest.mark.slow
def test_steps_are_the_same_on_a_mesh(cfg, tmp_path):
    changes = {"lora.dropout": "0.0", "optim.learning_rate": "0.1", "lora.base_dtype": "int8"}
    cfg = override_config(cfg, changes)
    alone = first_losses(cfg, {}, tmp_path)
    np.testing.assert_allclose(
        first_losses(cfg, {"fsdp": 2, "tensor": 2}, tmp_path), alone, rtol=1e-5
    )
    assert abs(alone[2] - alone[0]) > 0.01


def test_without_adapters_it_is_refused(small_config):
    with pytest.raises(ConfigError, match=r"lora.base_dtype=int8 .*: set lora.rank"):
        small_config(**{"lora.base_dtype": "int8"})
    assert quantize_base(small_model(), {"layers": {"q_DNH": 1}}) == {"layers": {"q_DNH": 1}}
