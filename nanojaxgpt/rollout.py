"""In: prompts and the parameters of now. Out: sampled completions with their rewards, to train on.

The sampler is that of `sample`, on the same mesh with the current weights, and its draws are a
function of the seed and the step: so a resumed run has the bits of one that was never stopped.

Dimensions: P prompts, G completions of each, B = P * G rows, T places, C tokens of a completion.
"""

import math
import threading
import traceback
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanojaxgpt import sharding
from nanojaxgpt.checks import kind_of
from nanojaxgpt.config import load_module
from nanojaxgpt.config.sections import Objective
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives.features import log_probabilities
from nanojaxgpt.objectives.policy import Rollout, advantages
from nanojaxgpt.recorder import Job
from nanojaxgpt.sample import Sampling, generate
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.step import TrainState
from nanojaxgpt.trainable import merge_params

# reward(prompt, completion, record) -> a number; record["answer"] is the completion of the data.
Reward = Callable[[str, str, Mapping[str, str]], float]
DRAWS = 1  # folded into the step's key, so that samples and dropout have different ones


class Prompt(NamedTuple):
    """A prompt, and the text that follows it in the data."""

    ids: list[int]
    text: str
    answer: str


def open_reward(objective: Objective) -> Reward:
    """Return the function that `objective.reward` names. Raises ConfigError."""
    path, _, name = objective.reward.rpartition(":")
    if not path:
        raise ConfigError(
            f"objective.reward={objective.reward!r} must name a function, FILE.py:FUNCTION"
        )
    module = load_module(path)
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"objective.reward: {path} has no function {name!r}")
    return getattr(module, name)


def read_prompts(batch: Batch, tokenizer: Tokenizer) -> list[Prompt]:
    """Return the first example of each row: what comes before its weights is the prompt."""
    tokens_BT, targets_BT = np.asarray(batch.tokens_BT), np.asarray(batch.targets_BT)
    trained_BT = np.asarray(batch.weights_BT) > 0
    if batch.segments_BT is not None:
        trained_BT &= np.asarray(batch.segments_BT) == 1
    found = []
    for tokens_T, targets_T, trained_T in zip(tokens_BT, targets_BT, trained_BT, strict=True):
        if not trained_T.any():
            raise DataError("objective.kind=policy: an example without a prompt and an answer")
        places = np.flatnonzero(trained_T)
        answer = [token for token in targets_T[places].tolist() if token != tokenizer.end_id]
        ids = tokens_T[: places[0] + 1].tolist()
        found.append(Prompt(ids, tokenizer.decode(ids), tokenizer.decode(answer)))
    return found


def pad_prompts(prompts: list[Prompt], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [P, width] and lengths [P]. Raises DataError for a prompt that is longer."""
    lengths_P = np.array([len(prompt.ids) for prompt in prompts], np.int32)
    if lengths_P.max() > width:
        raise DataError(
            f"a prompt has {lengths_P.max():,} tokens, but beside objective.max_tokens there are "
            f"{width:,} places in model.seq_len; raise that, or leave such prompts out"
        )
    ids_PT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(ids_PT, prompts, strict=True):
        row[: len(prompt.ids)] = prompt.ids
    return ids_PT, lengths_P


def completion_lengths(drawn_BC: np.ndarray, end_ids: tuple[int, ...]) -> np.ndarray:
    """Return how many tokens of each row count: up to its first end id, with it, or all."""
    ends_BC = np.isin(drawn_BC, end_ids)
    return np.where(ends_BC.any(1), ends_BC.argmax(1) + 1, drawn_BC.shape[1])


def make_rollout(
    prompts_BT: np.ndarray, lengths_B: np.ndarray, drawn_BC: np.ndarray, used_B: np.ndarray,
    advantages_B: np.ndarray, seq_len: int,
) -> Rollout:  # fmt: skip
    """Return rows of `seq_len` places: each prompt, then the used tokens of its completion."""
    ids_BT = np.zeros((len(drawn_BC), seq_len + 1), np.int32)
    weights_BT = np.zeros((len(drawn_BC), seq_len), np.float32)
    for row in range(len(drawn_BC)):
        first, used = int(lengths_B[row]), int(used_B[row])
        ids_BT[row, :first] = prompts_BT[row, :first]
        ids_BT[row, first : first + used] = drawn_BC[row, :used]
        weights_BT[row, first - 1 : first - 1 + used] = 1
    spread_BT = np.broadcast_to(advantages_B[:, None], weights_BT.shape)
    batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:], weights_BT)
    return Rollout(batch, np.array(spread_BT, np.float32))


def rate(
    reward: Reward, name: str, seconds: float, calls: list[tuple[str, str, dict[str, str]]]
) -> np.ndarray:
    """Return the reward of each call, float64. A call has `seconds`, and must give a number.

    Raises ConfigError, which names the prompt, where it takes longer, raises or gives NaN.
    """
    results: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        for call in calls:
            try:
                results.put(reward(*call))
            except BaseException as error:
                results.put(error)
                return

    # A daemon, so that a reward that hangs does not keep the process.
    threading.Thread(target=work, name="rewards", daemon=True).start()
    found = np.zeros(len(calls))
    for number, (prompt, completion, _) in enumerate(calls):
        place = f"the reward {name} of the completion {completion!r} of {prompt!r}"
        try:
            value = results.get(timeout=seconds)
        except Empty:
            raise ConfigError(
                f"{place} takes more than objective.reward_seconds={seconds:g}"
            ) from None
        if isinstance(value, BaseException):
            lines = "".join(traceback.format_exception(value)).strip()
            raise ConfigError(f"{place} raised:\n{lines}") from value
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            given = kind_of(value) if isinstance(value, str | tuple | list | dict) else value
            raise ConfigError(f"{place} is {given}, not a finite number")
        found[number] = float(value)
    return found


class Roller:
    """Samples groups of completions, asks for their rewards, and makes the batch of a step."""

    def __init__(self, cfg: JobConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
        self.cfg, self.tokenizer, self.mesh = cfg, tokenizer, mesh
        self.objective, self.model = cfg.objective, Transformer(cfg.model)
        self.reward = open_reward(cfg.objective)
        ends = {*cfg.sample.end_ids} | ({tokenizer.end_id} if tokenizer.end_id >= 0 else set())
        self.ends = tuple(sorted(ends))
        self.how = Sampling(
            self.objective.sample_temperature, vocab_size=tokenizer.vocab_size, end_ids=self.ends
        )
        self.width = cfg.model.seq_len + 1 - self.objective.max_tokens
        if self.width < 1:
            raise ConfigError(
                f"objective.max_tokens={self.objective.max_tokens} leaves no place for a prompt in "
                f"model.seq_len={cfg.model.seq_len}"
            )
        self.score = jax.jit(self.log_probs)

    def log_probs(self, params: Params, rollout: Rollout, hyper: Hyper) -> jax.Array:
        """Return the log-probability of each target, [B, T], at the temperature of sampling."""
        chunks, temperature = self.cfg.train.loss_chunks, self.objective.sample_temperature
        return log_probabilities(self.model, params, rollout.batch, hyper, chunks, temperature)

    def roll(self, params: Params, batch: Batch, step: int) -> tuple[Rollout, dict[str, float]]:
        """Return the rollout of a batch of prompts at a 0-based step, and its numbers."""
        prompts = read_prompts(batch, self.tokenizer)
        size = self.objective.group_size
        ids_PT, lengths_P = pad_prompts(prompts, self.width)
        ids_BT, lengths_B = np.repeat(ids_PT, size, 0), np.repeat(lengths_P, size)
        key = jax.random.fold_in(jax.random.key(np.uint32(self.cfg.train.seed)), step)
        drawn_BC = np.asarray(generate(
            self.model, params, ids_BT, lengths_B, jax.random.fold_in(key, DRAWS),
            max_tokens=self.objective.max_tokens, how=self.how,
        ))  # fmt: skip
        used_B = completion_lengths(drawn_BC, self.ends)
        calls = []
        for row, (drawn, used) in enumerate(zip(drawn_BC.tolist(), used_B, strict=True)):
            prompt = prompts[row // size]
            ended = used and drawn[used - 1] in self.ends
            text = self.tokenizer.decode(drawn[: used - 1 if ended else used])
            calls.append((prompt.text, text, {"answer": prompt.answer}))
        limit = self.objective.reward_seconds
        rewards_B = rate(self.reward, self.objective.reward, limit, calls)
        scaled = self.objective.aggregation != "dr_grpo"
        rollout = make_rollout(
            ids_BT, lengths_B, drawn_BC, used_B, advantages(rewards_B, size, scaled),
            self.cfg.model.seq_len,
        )  # fmt: skip
        spread_P = np.ptp(rewards_B.reshape(-1, size), axis=1)
        numbers = {
            "reward": float(rewards_B.mean()),
            "completion_tokens": float(used_B.mean()),
            "groups_alike": float((spread_P == 0).mean()),
        }
        return self.place(rollout), numbers

    def place(self, rollout: Rollout) -> Rollout:
        """Return the rollout on the devices, its rows spread as those of a batch."""
        layout = sharding.batch_sharding(self.mesh)
        return jax.tree.map(lambda leaf: jax.device_put(leaf, layout), rollout)


def with_rollouts(job: Job, start: Callable[[], tuple[TrainState, Params]]) -> Job:
    """Return the job whose step samples with the state's parameters and then trains on that.

    With `objective.updates` > 1 it trains as often on the same rollout. `start` gives the state
    before the first step, which the KL term holds to. Raises ConfigError.
    """
    objective = job.cfg.objective
    if objective.kind != "policy":
        return job
    if jax.process_count() > 1:
        raise ConfigError(
            "objective.kind=policy asks for rewards in one process: leave --multihost"
        )
    roller, held = Roller(job.cfg, job.data.tokenizer, job.mesh), list[Params]()
    layout = NamedSharding(job.mesh, PartitionSpec())

    def step(
        state: TrainState, batch: Batch, hyper: Hyper, frozen: Params
    ) -> tuple[TrainState, dict[str, Any]]:
        number, params = int(state.step), merge_params(state.params, frozen)
        rollout, numbers = roller.roll(params, batch, number)
        if objective.kl:
            if not held:
                first, rest = start()
                held.append(merge_params(first.params, rest))
            rollout = rollout._replace(reference_BT=roller.score(held[0], rollout, hyper))
        # The first update's ratio is 1 by construction; later ones need what it started from.
        old_BT = roller.score(params, rollout, hyper) if objective.updates > 1 else None
        found: dict[str, Any] = {}
        for update in range(objective.updates):
            batch_now = rollout._replace(old_BT=old_BT) if update else rollout
            state, found = job.train_step(state, batch_now, hyper, frozen)
        state = state._replace(step=jax.device_put(jnp.int32(number + 1), layout))
        return state, {**found, **numbers}

    return job._replace(train_step=step)
