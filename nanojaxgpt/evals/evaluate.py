"""Benchmarks of a model: prompts, answers that are kept, metrics; and two models compared."""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nanojaxgpt.console import warn, with_bar
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.evals.answers import AnswerStore, model_identity, request_key
from nanojaxgpt.evals.generation import generate_texts
from nanojaxgpt.evals.metrics import (
    Measured,
    centered,
    check_metrics,
    measure_scores,
    measure_texts,
)
from nanojaxgpt.evals.scoring import Pair, check_pair, roll, score_pairs
from nanojaxgpt.evals.tasks import Benchmark, Opened, few_shot, open_benchmark
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.interchange.templates import break_control
from nanojaxgpt.language_model import LanguageModel, Score
from nanojaxgpt.rundir import code_hash
from nanojaxgpt.text_stream import encode_pair, encode_prompt

SEED = 1234  # of the few-shot examples


class Prompts(NamedTuple):
    """The requests of a benchmark: pairs of each question, or what to generate after."""

    opened: Opened
    shots: int
    pairs: list[list[Pair]]
    ids: list[list[int]]
    text_hash: str


class Evaluated(NamedTuple):
    """What `evaluate_tasks` returns: a summary that is JSON, and all metrics by task."""

    summary: dict[str, Any]
    metrics: dict[str, dict[str, Measured]]


def evaluate_tasks(
    model: LanguageModel,
    benchmarks: Sequence[Benchmark],
    data: Path,
    *,
    limit: int = 0,
    fewshot: int = -1,
    seed: int = SEED,
    chat: bool = False,
    cache: Path | None = None,
    report: Callable[[str], None] = warn,
    team: Team = ALONE,
) -> Evaluated:
    """Return the metrics of a model on benchmarks whose files are in the folder `data`.

    Of each the first `limit` questions count (0: all), after `fewshot` examples (-1: as the task
    says) drawn by `seed`. With `chat` a question is a message of the user, in the model's template.
    In the folder `cache` answers are kept, and those there are not asked again. Several processes,
    a `team`, ask as one, and the first one keeps the answers. Raises ConfigError, DataError,
    MemoryExceeded.
    """
    for benchmark in benchmarks:
        check_metrics(benchmark)
    asked = [
        make_prompts(model, open_benchmark(one, data, limit, report), fewshot, seed, chat)
        for one in benchmarks
    ]
    if others := team.differing([prompts.text_hash for prompts in asked]):
        raise DataError(f"the tasks' files in {data} are not the same on {others} as on "
                        f"{team.name(0)}")  # fmt: skip
    keep = cache is not None and jax.process_count() == team.count  # all must run the same batches
    path = cache / f"{model_identity(model)}.jsonl" if cache is not None and keep else None
    answers = AnswerStore(path, team)
    shapes = score_prompts(model, asked, answers, report)
    metrics, tasks, sums = {}, {}, []
    for prompts in asked:
        benchmark = prompts.opened.benchmark
        found = measure(prompts, answers)
        metrics[benchmark.name] = found
        tasks[benchmark.name] = task_summary(prompts, found)
        if benchmark.chance >= 0:
            sums.append((found[headline(benchmark, found)].value, benchmark.chance))
    facts = {
        "model": str(model.run),
        "step": model.step,
        "chat_template": chat,
        "seed": seed,
        "limit": limit,
        "tasks": tasks,
        **({"centered": centered(sums)} if sums else {}),
        "compiled_shapes": shapes,
        "code": code_hash(),
    }
    return Evaluated(facts, metrics)


def make_prompts(
    model: LanguageModel, opened: Opened, fewshot: int, seed: int, chat: bool
) -> Prompts:
    """Return the requests of a benchmark. Raises ConfigError, DataError with the question's place.

    In a chat nothing stands between the prompt and a choice, as in lm-eval.
    """
    benchmark, tokenizer = opened.benchmark, model.tokenizer
    shots = benchmark.fewshot if fewshot < 0 else fewshot
    shots = 0 if benchmark.kind == "perplexity" else shots

    def encode_plain(text: str) -> list[int]:
        return encode_prompt(tokenizer, text) if text else [model.first_id]

    encode = model.template.encode_text if chat else encode_plain
    chosen = benchmark.kind in ("multiple_choice", "schema")
    between = "" if chat and chosen else benchmark.delimiter
    pairs, ids, digest = [], [], hashlib.sha256()

    def ask(context: str) -> str:
        return model.template.text([{"role": "user", "content": context}]) if chat else context

    for number, question in enumerate(opened.questions):
        before = few_shot(opened, number, shots, seed)
        contexts = [ask(before + context) for context in question.contexts]
        ends = [break_control(between + one, tokenizer.control) if chat else between + one
                for one in question.continuations]  # fmt: skip
        digest.update(repr((contexts, ends)).encode())
        try:
            if benchmark.kind == "generate":
                ids.append(encode(contexts[0]))
                continue
            if benchmark.kind == "perplexity":
                text = tokenizer.encode(question.continuations[0]).tolist()
                pairs.append(roll(text, model.first_id, model.config.seq_len))
            else:
                contexts *= len(ends) // len(contexts)
                both = zip(contexts, ends, strict=True)
                pairs.append([Pair(*encode_pair(tokenizer, *one, encode)) for one in both])
            for pair in pairs[-1]:
                check_pair(pair, model.config.seq_len)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{question.place}: task {benchmark.name}: {error}") from error
    return Prompts(opened, shots, pairs, ids, digest.hexdigest()[:16])


def score_prompts(
    model: LanguageModel,
    asked: Sequence[Prompts],
    answers: AnswerStore,
    report: Callable[[str], None],
) -> dict[str, int]:
    """Add all answers that are missing; return how many shapes were compiled for it."""
    pairs = [one for prompts in asked for one in prompts.pairs]
    keys = [[pair_key(pair) for pair in one] for one in pairs]
    texts = [prompts for prompts in asked if prompts.ids]
    missing = sum(key not in answers for one in keys for key in one)
    missing += sum(key not in answers for prompts in texts for key in text_keys(prompts))
    total = sum(map(len, keys)) + sum(len(prompts.ids) for prompts in texts)
    report(f"{total:,} requests, {total - missing:,} of them answered before")
    scoring, generating = set(), set()
    found = score_pairs(
        model, pairs, lambda question, row: keys[question][row] in answers,
        functools.partial(with_bar, what="scoring"),
    )  # fmt: skip
    for shape, scores in found:
        scoring.add(shape)
        answers.add({keys[question][row]: list(score) for (question, row), score in scores})
    for prompts in texts:
        benchmark, own = prompts.opened.benchmark, text_keys(prompts)
        batches = generate_texts(
            model, prompts.ids, benchmark.max_tokens, benchmark.until,
            lambda number, own=own: own[number] in answers,
            functools.partial(with_bar, what=benchmark.name),
        )  # fmt: skip
        for slots, made in batches:
            generating.add(slots)
            answers.add({own[number]: text for number, text in made.items()})
    return {"scoring": len(scoring), "generating": len(generating)}


def pair_key(pair: Pair) -> str:
    """Return the key of a pair's answer."""
    return request_key(list(pair.context), list(pair.continuation))


def text_keys(prompts: Prompts) -> list[str]:
    """Return the keys of the texts that a benchmark asks for."""
    benchmark = prompts.opened.benchmark
    return [request_key(ids, benchmark.max_tokens, list(benchmark.until)) for ids in prompts.ids]


def measure(prompts: Prompts, answers: AnswerStore) -> dict[str, Measured]:
    """Return the metrics of a benchmark whose requests are all answered."""
    benchmark, questions = prompts.opened.benchmark, prompts.opened.questions
    if benchmark.kind == "generate":
        return measure_texts(benchmark, questions, answers.values(text_keys(prompts)))
    scores = [
        [Score(*answer) for answer in answers.values([pair_key(pair) for pair in pairs])]
        for pairs in prompts.pairs
    ]
    return measure_scores(benchmark, questions, scores)


def headline(benchmark: Benchmark, found: dict[str, Measured]) -> str:
    """Return the name of the metric that stands for a benchmark. Raises ConfigError."""
    if benchmark.metric and benchmark.metric not in found:
        known = ", ".join(found)
        raise ConfigError(f"task {benchmark.name}: metric={benchmark.metric!r}; known: {known}")
    return benchmark.metric or next(iter(found))


def task_summary(prompts: Prompts, found: dict[str, Measured]) -> dict[str, Any]:
    """Return the metrics of a benchmark, and what they were measured on, as JSON."""
    benchmark = prompts.opened.benchmark
    numbers = {}
    for name, one in found.items():
        numbers[name] = {"value": one.value}
        if not math.isnan(one.error):
            numbers[name]["stderr"] = one.error
    return {
        "metrics": numbers,
        "metric": headline(benchmark, found),
        "examples": len(prompts.opened.questions),
        "fewshot": prompts.shots,
        **({"chance": benchmark.chance} if benchmark.chance >= 0 else {}),
        "file_hash": prompts.opened.file_hash,
        "prompt_hash": prompts.text_hash,
        "source": benchmark.source,
        "licence": benchmark.licence,
    }


def compare_tasks(first: Evaluated, second: Evaluated) -> dict[str, dict[str, Any]]:
    """Return how two models differ on each task, question by question.

    `interval` is that of 95 % for the difference, second minus first, and `examples_needed` as many
    as show a difference of this size four times in five.
    """
    found = {}
    for name, task in first.summary["tasks"].items():
        metric = task["metric"]
        left, right = (one.metrics[name][metric] for one in (first, second))
        row = {"metric": metric, "first": left.value, "second": right.value,
               "difference": right.value - left.value}  # fmt: skip
        if left.values is not None and right.values is not None and len(left.values) > 1:
            each = right.values - left.values
            spread = float(each.std(ddof=1))
            error = spread / math.sqrt(len(each))
            row["stderr"], middle = error, float(np.mean(each))
            row["interval"] = [middle - 1.96 * error, middle + 1.96 * error]
            if middle:  # 1.96 for 5 % two-sided, 0.84 for a power of 80 %
                row["examples_needed"] = math.ceil(((1.96 + 0.84) * spread / middle) ** 2)
        found[name] = row | {"examples": task["examples"]}
    return found
