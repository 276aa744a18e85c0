"""Rewards of sampled groups: the loss against its formula, rollouts, resume, rewards that fail."""

import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt import sharding
from nanojaxgpt.checkpoint import load_params
from nanojaxgpt.config.sections import Objective
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.data.tokenizers import WordTokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import complete
from nanojaxgpt.objectives.policy import Rollout, advantages, policy_loss
from nanojaxgpt.rollout import completion_lengths, make_rollout, open_reward, rate, read_prompts
from nanojaxgpt.rundir import read_config
from nanojaxgpt.training import fit

HYPER = {"clip_low": 0.2, "clip_high": 0.28, "kl": 0.05}
REWARDS = """
import time

def right(prompt, completion, record):
    return float(completion == record["answer"]) + completion.count("1") / 10

def raises(prompt, completion, record):
    raise KeyError("no such thing")

def nan(prompt, completion, record):
    return float("nan")

def word(prompt, completion, record):
    return "good"

def sleeps(prompt, completion, record):
    time.sleep(60)
"""


@pytest.fixture
def reward(tmp_path):
    """Return a function from the name of a reward to the config's field."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    return lambda name: f"{tmp_path}/rewards.py:{name}"


@pytest.fixture
def policy_config(small_config, reward, monkeypatch):
    """Return a function of overrides that gives a config which learns addition from rewards."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)

    def build(**overrides: str):
        return small_config(**{
            "data.source": "task:addition,digits=1", "data.tokenizer": "", "model.num_layers": "1",
            "objective.kind": "policy", "objective.reward": reward("right"),
            "objective.max_tokens": "2", "objective.group_size": "4", "optim.schedule": "constant",
            "train.num_steps": "4", "checkpoint.every_steps": "2", "train.batch_size": "4",
            "eval.every_steps": "0", "optim.learning_rate": "0.01", "optim.warmup_steps": "0",
        } | overrides)  # fmt: skip

    return build


def random_rollout(old: bool = True) -> tuple[np.ndarray, Rollout]:
    """Return log-probabilities [4, 9] and a rollout of completions of 5, 1, 9 and no tokens."""
    draw = np.random.default_rng(0)
    new_BT, old_BT, reference_BT = -draw.exponential(size=(3, 4, 9)).astype(np.float32)
    weights_BT = (np.arange(9) < np.array([5, 1, 9, 0])[:, None]).astype(np.float32)
    ids_BT = np.zeros((4, 9), np.int32)
    spread_BT = np.repeat(draw.standard_normal((4, 1)), 9, 1).astype(np.float32)
    batch = Batch(ids_BT, ids_BT, weights_BT)
    return new_BT, Rollout(batch, spread_BT, old_BT if old else None, reference_BT)


def formula(new_BT: np.ndarray, rollout: Rollout, objective: Objective) -> float:
    """Return the mean loss, one completion after the other, from the papers."""
    total, divisor = 0.0, 0.0
    for row, weight_T in enumerate(np.asarray(rollout.batch.weights_BT)):
        chosen = np.flatnonzero(weight_T)
        if not len(chosen):
            continue
        new, old, held = (np.float64(x[row][chosen])
                          for x in (new_BT, rollout.old_BT, rollout.reference_BT))  # fmt: skip
        advantage = np.float64(rollout.advantages_BT[row, 0])
        ratio = np.exp(new - old)
        if objective.ratio == "sequence":
            ratio = np.full(len(chosen), np.exp(np.mean(new - old)))
        clipped = np.clip(ratio, 1 - HYPER["clip_low"], 1 + HYPER["clip_high"])
        loss = -np.minimum(ratio * advantage, clipped * advantage)
        loss += HYPER["kl"] * (np.exp(held - new) - (held - new) - 1)
        total += loss.mean() if objective.aggregation == "grpo" else loss.sum()
        divisor += {"dapo": len(chosen), "grpo": 1, "dr_grpo": objective.max_tokens}[
            objective.aggregation
        ]
    return total / divisor


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_the_loss_is_its_formula(aggregation, ratio):
    new_BT, rollout = random_rollout()
    objective = Objective(aggregation=aggregation, ratio=ratio, max_tokens=9)
    total, weight, _ = policy_loss(jnp.array(new_BT), rollout, HYPER, objective)
    assert total / weight == pytest.approx(formula(new_BT, rollout, objective), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_the_first_ratio_is_one(aggregation):
    new_BT, rollout = random_rollout(old=False)
    rollout = rollout._replace(reference_BT=None)
    objective = Objective(aggregation=aggregation, max_tokens=9)
    total, _, found = policy_loss(jnp.array(new_BT), rollout, HYPER, objective)
    weights_BT = np.asarray(rollout.batch.weights_BT)
    if aggregation == "grpo":
        weights_BT = weights_BT / np.maximum(weights_BT.sum(1, keepdims=True), 1)
    plain = jnp.sum(-jnp.array(rollout.advantages_BT) * weights_BT)
    assert float(total) == float(plain)  # a ratio other than exactly 1 would scale it
    assert float(found["clipped"][0]) == 0


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_a_batch_of_no_completion_adds_nothing(aggregation):
    new_BT, rollout = random_rollout()
    wild = jnp.array(new_BT).at[:].set(-jnp.inf)
    none = rollout.batch._replace(weights_BT=np.zeros((4, 9), np.float32))
    rollout = rollout._replace(batch=none)
    objective = Objective(aggregation=aggregation)
    total = lambda new: policy_loss(new, rollout, HYPER, objective)[0]
    assert float(total(wild)) == 0
    np.testing.assert_array_equal(jax.grad(total)(jnp.array(new_BT)), 0)
    assert float(policy_loss(wild, rollout, HYPER, objective)[1]) == 0


def test_advantages_are_those_of_the_group():
    rewards = np.array([1.0, 0, 0, 1, 3, 3, 3, 3])
    scaled, plain = (advantages(rewards, 4, scaled) for scaled in (True, False))
    np.testing.assert_allclose(plain, [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(scaled[:4], np.array([1, -1, -1, 1]) * 0.5 / (3**-0.5 + 1e-4))
    np.testing.assert_array_equal(scaled[4:], 0)  # a group whose rewards are alike teaches nothing


def test_a_rollout_holds_prompt_and_completion():
    prompts_BT, drawn_BC = np.array([[5, 6, 0], [7, 0, 0]]), np.array([[8, 9], [3, 8]])
    used_B = completion_lengths(drawn_BC, (3,))
    assert used_B.tolist() == [2, 1]  # the end id counts, what follows it does not
    found = make_rollout(
        prompts_BT, np.array([2, 1]), drawn_BC, used_B, np.array([1.0, -1.0]), seq_len=5
    )
    assert found.batch.tokens_BT.tolist() == [[5, 6, 8, 9, 0], [7, 3, 0, 0, 0]]
    assert found.batch.targets_BT.tolist() == [[6, 8, 9, 0, 0], [3, 0, 0, 0, 0]]
    assert found.batch.weights_BT.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_prompts_are_what_comes_before_the_weights():
    tokenizer = WordTokenizer(("0", "1", "2", "+", "="))
    tokens_BT = np.array([[1, 3, 1, 4, 2, 0, 4, 2]])
    batch = Batch(
        tokens_BT, np.array([[3, 1, 4, 2, 0, 4, 2, 0]]),
        np.array([[0, 0, 0, 1, 0, 0, 1, 0]], np.float32),
        np.array([[1, 1, 1, 1, 2, 2, 2, 0]]),
    )  # fmt: skip
    [prompt] = read_prompts(batch, tokenizer)
    assert prompt.ids == [1, 3, 1, 4]
    assert tokenizer.decode(prompt.ids), prompt.answer == ("1+1=", "2")
    with pytest.raises(DataError, match="without a prompt"):
        read_prompts(batch._replace(weights_BT=np.zeros((1, 8))), tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "KeyError: 'no such thing'"),
        ("nan", "is nan, not a finite number"),
        ("word", "is a string, not a finite number"),
        ("sleeps", "takes more than objective.reward_seconds=0.2"),
    ],
)
def test_a_reward_that_fails_is_named(name, message, reward):
    function, calls = open_reward(Objective(reward=reward(name))), [("1+1=", "02", {"answer": "2"})]
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"rewards.py:{name} of the completion '02' of") as error:
        rate(function, reward(name), 0.2, calls)
    assert message in str(error.value)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.reward": ""}, "needs objective.reward"),
        ({"objective.reward": "rewards.py"}, "must name a function"),
        ({"objective.reward": "missing.py:right"}, "no experiment file"),
        ({"objective.max_tokens": "20"}, "leaves no place for a prompt"),
    ],
)
def test_bad_configs(changes, message, policy_config, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fit(policy_config(**changes), tmp_path / "run", report=lambda _: None)


def test_a_resumed_run_has_the_same_bits(policy_config, tmp_path):
    """Its samples are a function of the seed and the step, with two updates on each."""
    cfg = policy_config(**{"objective.updates": "2"})
    fit(cfg, tmp_path / "run", report=lambda _: None)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    fit(cfg, tmp_path / "again", report=lambda _: None)
    mesh, model = sharding.make_mesh({}), complete(read_config(tmp_path / "run")).model
    (step, whole), (_, resumed) = (
        load_params(tmp_path / name, model, mesh) for name in ("run", "again")
    )
    assert step == 4
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = (rewards(tmp_path / name) for name in ("run", "again"))
    assert first == second
    assert len(set(first)) > 1


def rewards(run) -> list[float]:
    """Return the mean reward of each step."""
    return [record["reward"] for record in read_metrics(run) if "reward" in record]


@pytest.mark.slow
def test_rewards_rise(policy_config, tmp_path):
    cfg = policy_config(**{"train.num_steps": "40", "objective.group_size": "8"})
    fit(cfg, tmp_path / "run", report=lambda _: None)
    found = rewards(tmp_path / "run")
    assert np.mean(found[-5:]) > np.mean(found[:5]) + 0.05
