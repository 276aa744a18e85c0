"""What an engine is asked for, and what it answers; a request is checked before it is queued.

No jax here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.checks import field_problems, range_problem, show
from nanojaxgpt.config.sections import Sample
from nanojaxgpt.errors import ConfigError

MOST_ALTERNATIVES = 20  # of a token, as in OpenAI's interface
MOST_BIASES = 1024  # entries of logit_bias
LARGEST_BIAS = 100.0  # either way: in effect it forces a token, or bans it
LARGEST_PENALTY = 2.0  # either way
MOST_STOPS, LONGEST_STOP = 64, 1024  # stop strings, and the characters of one

# The fields with the rules of the config's section `sample`.
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "end_ids")
PENALTIES = ("presence_penalty", "frequency_penalty")


class QueueFull(Exception):
    """The queue has as many requests as it may; try again later."""


class EngineFailed(Exception):
    """The engine has stopped working, and takes no requests."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Ids to continue, and how. The names and meanings are those of the config's `sample`."""

    ids: tuple[int, ...]
    max_tokens: int = 256  # 0: none, only the prompt's log-probabilities
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()  # beside those of the model
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
    presence_penalty: float = 0.0  # taken from the logit of each token that was generated
    frequency_penalty: float = 0.0  # the same, times how often it was
    alternatives: int = -1  # how many of the likeliest tokens are told beside each; -1: no scores
    echo: bool = False  # the prompt's scores as well
    schema: str = ""  # JSON schema that the answer fits, unless it is cut; "": any text


class TokenScore(NamedTuple):
    """A token, its log-probability, and the likeliest tokens in its place, likeliest first.

    Log-probabilities are the model's own: before temperature, filters, biases and penalties.
    """

    id: int
    log_probability: float | None  # None: of the first token of a prompt
    alternatives: tuple[tuple[int, float], ...] = ()


class Part(NamedTuple):
    """What has become final of an answer since the part before; the last one has a `finish`."""

    text: str = ""
    ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()  # in one part, if they are asked for
    finish: str = ""  # stop (a stop string, an end id), length, cancelled, error; "": it goes on
    error: str = ""


class Limits(NamedTuple):
    """What a request must keep to: tokens of prompt and answer together, and the known ids."""

    context: int
    vocab_size: int


def join_parts(parts: Sequence[Part]) -> Part:
    """Return the parts of an answer as one."""
    return Part(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.ids),
        tuple(score for part in parts for score in part.scores),
        tuple(score for part in parts for score in part.prompt_scores),
        next((part.finish for part in parts if part.finish), ""),
        next((part.error for part in parts if part.error), ""),
    )


def check_request(request: Request, limits: Limits) -> None:
    """Raise ConfigError, naming the field, where an engine can't run the request."""
    rules, last = Sample.rules(), limits.vocab_size - 1
    problems: list[str] = []
    for name in SAMPLED:
        problems += field_problems(name, getattr(request, name), rules[name])
    for name in PENALTIES:
        problems += number_problems(name, getattr(request, name), LARGEST_PENALTY)
    if not 0 <= whole(request.max_tokens) <= rules["max_tokens"].high:
        problems.append(f"max_tokens={show(request.max_tokens)} must be an integer of at least 0")
    if not -1 <= whole(request.alternatives) <= MOST_ALTERNATIVES:
        given = show(request.alternatives)
        problems.append(f"alternatives={given} must be an integer from -1 to {MOST_ALTERNATIVES}")
    elif request.echo and request.alternatives < 0:
        problems.append("echo gives the prompt's scores: it needs alternatives of at least 0")
    if len(request.stop) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in request.stop):
        problems.append(f"stop must be at most {MOST_STOPS} strings of {LONGEST_STOP} characters")
    if "" in request.stop:
        problems.append("stop contains an empty string")
    if not isinstance(request.schema, str):
        problems.append(f"schema={show(request.schema)} is not the text of a JSON schema")
    problems += bias_problems(request.logit_bias)
    if not problems:
        biased = [token for token, _ in request.logit_bias]
        for name, ids in (("ids", request.ids), ("end_ids", request.end_ids),
                          ("logit_bias", biased)):  # fmt: skip
            if wrong := [token for token in ids if not 0 <= whole(token) <= last]:
                given = show(wrong[0])
                problems.append(f"{name} contains {given}, but ids are from 0 to {last}")
    if not request.ids:
        problems.append("ids is empty: a prompt must have at least one token")
    if len(request.ids) > limits.context:
        problems.append(f"the prompt has {len(request.ids):,} tokens, more than the context of "
                        f"{limits.context:,}")  # fmt: skip
    if problems:
        raise ConfigError(problems[0])


def whole(value: Any) -> int:
    """Return an integer, numpy's too, and -2, which no field takes, for anything else."""
    return int(value) if type(value) is int or isinstance(value, np.integer) else -2


def number_problems(name: str, value: Any, largest: float) -> list[str]:
    """Return what is wrong with a number from -largest to largest; NaN is."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return [f"{name}={show(value)} is not a finite number"]
    problem = range_problem(value, -largest, largest)
    return [f"{name}={show(value)} {problem}"] if problem else []


def bias_problems(biases: Any) -> list[str]:
    """Return what is wrong with the entries of logit_bias, but for ids out of range."""
    if len(biases) > MOST_BIASES:
        return [f"logit_bias has {len(biases):,} entries, more than {MOST_BIASES:,}"]
    if len({token for token, _ in biases}) < len(biases):
        return ["logit_bias names a token twice"]
    found = [number_problems("logit_bias", value, LARGEST_BIAS) for _, value in biases]
    return [problem for problems in found for problem in problems]
