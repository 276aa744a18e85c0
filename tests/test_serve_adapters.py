"""Adapters of one base: its arrays are in memory once, and each answers as it does alone."""

import jax
import numpy as np
import pytest
from conftest import write_corpus

from nanojaxgpt import language_model
from nanojaxgpt.adapters import Bases
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate.device import Layouts
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import Request
from nanojaxgpt.training import fit

pytestmark = pytest.mark.slow
SIZES = {
    "model.num_layers": "2", "model.embed_dim": "32", "model.num_heads": "2", "model.seq_len": "32",
    "model.positions": "rotary", "data.tokenizer": "chars", "mesh.data": "-1",
    "train.num_steps": "1", "train.batch_size": "8", "optim.warmup_steps": "0",
    "optim.learning_rate": "0.1", "eval.num_batches": "1",
}  # fmt: skip
IDS = (3, 5, 7, 3, 5, 9, 4)


def silent(text: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that trains a run in one step and returns its folder."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_corpus(folder, 2000)

    def train(name: str, base: str = "", **changes: str):
        fields = SIZES | {"data.source": f"text:{text}", "data.cache_dir": str(folder / "cache")}
        if base:
            fields |= {"lora.rank": "2", "init.from_run": str(folder / base)}
        cfg = override_config(base_config(), fields | changes)
        fit(cfg, folder / name, report=silent)
        return folder / name

    return train


@pytest.fixture(scope="module")
def runs(train):
    """Return the folders of a base and of two adapters that were trained from it."""
    return {
        "base": train("base"), "one": train("one", "base"),
        "two": train("two", "base", **{"train.seed": "5", "lora.alpha": "8.0"}),
    }  # fmt: skip


def buffers(*trees) -> dict[int, int]:
    """Return the bytes of each buffer that the arrays of some trees have, by its address."""
    arrays = [leaf for tree in trees for leaf in jax.tree.leaves(tree)]
    return {array.unsafe_buffer_pointer(): array.nbytes for array in arrays}


def held(models, layouts) -> dict[int, int]:
    """Return the buffers of models, as they were loaded and as engines have them."""
    trees = []
    for model in models:
        with model.on_devices("a test"):
            trees += [model.params, layouts.lay_out(model)]
    return buffers(*trees)


def ask(engine):
    """Return what a request draws, with its log-probabilities."""
    return engine.submit(Request(IDS, 12, seed=3, alternatives=2)).result()


def test_a_base_is_held_once_and_each_adapter_answers_as_alone(runs):
    bases, layouts, own = Bases(), Layouts(), [Layouts() for _ in runs]
    together = {name: language_model.load(run, bases=bases) for name, run in runs.items()}
    alone = {name: language_model.load(run) for name, run in runs.items()}
    separate = {}
    for (name, model), one in zip(alone.items(), own, strict=True):
        separate |= held([model], one)
        jax.tree.map(np.testing.assert_array_equal, model.params, together[name].params)
    base = held([together["base"]], layouts)
    shared = held(together.values(), layouts)
    adapters = [leaf.nbytes for name in ("one", "two")
                for path, leaf in jax.tree_util.tree_leaves_with_path(together[name].params)
                if "_lora_" in str(path)]  # fmt: skip
    assert sum(shared.values()) == sum(base.values()) + 2 * sum(adapters)
    assert sum(separate.values()) == 3 * sum(base.values()) + 2 * sum(adapters)
    engines = {name: Engine(one, slots=2, layouts=layouts) for name, one in together.items()}
    for engine in engines.values():
        engine.start()
    assert held(together.values(), layouts).keys() == shared.keys()
    among = {name: ask(engine) for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    for name, model in alone.items():
        with Engine(model, slots=2) as engine:
            assert ask(engine) == among[name]
    assert len({part.scores for part in among.values()}) == 3


@pytest.mark.parametrize("order", [("one", "base"), ("base", "one"), ("one", "two")])
def test_any_order_shares(runs, order):
    bases = Bases()
    first, second = (language_model.load(runs[name], bases=bases) for name in order)
    assert first.params["layers"]["q_DNH"] is second.params["layers"]["q_DNH"]
    assert first.params["embed_VD"] is second.params["embed_VD"]


def test_a_server_shares_and_chooses_by_name(runs):
    pytest.importorskip("httpx")
    pytest.importorskip("starlette")
    from serving import post, serving

    body = {"prompt": list(IDS), "max_tokens": 12, "seed": 3, "logprobs": 0}
    found = {}
    with serving(runs, slots=2) as server:
        served = server.service.served
        for name, run in runs.items():
            [choice] = post(server, "/v1/completions", body | {"model": name}).json()["choices"]
            with Engine(language_model.load(run), slots=2) as engine:
                alone = engine.submit(Request(IDS, 12, seed=3, alternatives=0)).result()
            found[name] = choice["logprobs"]["token_logprobs"]
            assert found[name] == [score.log_probability for score in alone.scores]
        kernels = [one.model.params["layers"]["q_DNH"] for one in served.values()]
        assert kernels[0] is kernels[1] is kernels[2]
    assert found["base"] != found["one"] != found["two"]


def test_a_rounded_base_is_another_one(runs, train):
    run, bases = train("int8", "base", **{"lora.base_dtype": "int8"}), Bases()
    first, rounded, again = (
        language_model.load(one, bases=bases) for one in (runs["base"], run, run)
    )
    kernels = [model.params["layers"]["q_DNH"] for model in (first, rounded, again)]
    assert kernels[1] is kernels[2]
    assert 0 < np.abs(np.asarray(kernels[0] - kernels[1])).max() < 0.01
    own = language_model.load(run)
    jax.tree.map(np.testing.assert_array_equal, own.params, rounded.params)


def test_bases_are_not_mixed_up_and_a_missing_one_is_told(runs, train):
    other, bases = train("other", **{"train.seed": "7"}), Bases()
    models = [language_model.load(run, bases=bases) for run in (runs["one"], other)]
    kernels = [np.asarray(model.params["layers"]["q_DNH"]) for model in models]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    runs["base"].rename(runs["base"].with_name("moved"))
    with pytest.raises(ConfigError, match=r"init.from_run=.*, the base of .*two"):
        language_model.load(runs["two"], bases=bases)
    runs["base"].with_name("moved").rename(runs["base"])
