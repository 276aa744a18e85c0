"""In: scores or texts of the questions of a benchmark. Out: a value for each, and their summary.

A question's value is a number, or the two whose sums' ratio is the summary.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.config import load_module
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.evals.tasks import Benchmark, Question
from nanojaxgpt.extras import require_package
from nanojaxgpt.language_model import Score

EXTRA = "evals"
ROUGE = ("rouge1", "rouge2", "rougeL")
CORPUS = ("bleu", "chrf")  # of all texts together
OPTIONS = ("measure", "pattern", "pick", "ignore", "ignore_case")


class Measured(NamedTuple):
    """A metric over the questions: its value, its standard error (NaN: none), each question's."""

    value: float
    error: float
    values: np.ndarray | None


def measure_scores(
    benchmark: Benchmark, questions: Sequence[Question], scores: Sequence[Sequence[Score]]
) -> dict[str, Measured]:
    """Return the metrics of a benchmark whose continuations were scored."""
    if benchmark.kind in ("multiple_choice", "schema"):
        found: dict[str, list[float]] = {}
        for question, ones in zip(questions, scores, strict=True):
            total = np.array([one.log_probability for one in ones])
            sizes = {"acc": np.ones(len(total))}
            if benchmark.kind == "multiple_choice":
                texts = question.continuations
                sizes["acc_norm"] = np.array([len(text) for text in texts])
                sizes["acc_bytes"] = np.array([len(text.encode()) for text in texts])
            for name, size in sizes.items():
                right = int(np.argmax(total / size)) == question.gold
                found.setdefault(name, []).append(float(right))
        return {name: mean(values) for name, values in found.items()}
    logs = np.array([sum(one.log_probability for one in ones) for ones in scores])
    if benchmark.kind == "cloze":
        of_log = mean(logs)
        surprise = math.exp(min(-of_log.value, 700))
        return {
            "acc": mean([float(ones[0].greedy) for ones in scores]),
            "log_probability": of_log,
            "perplexity": Measured(surprise, surprise * of_log.error, None),
        }
    texts = [question.continuations[0] for question in questions]
    sizes = np.array([len(text.encode()) for text in texts])
    bits = ratio(-logs / math.log(2), sizes)
    tokens = sum(one.tokens for ones in scores for one in ones)
    return {"bits_per_byte": bits, "loss": Measured(-logs.sum() / tokens, math.nan, None)}


def mean(values: Sequence[float] | np.ndarray) -> Measured:
    """Return the mean of the questions' values, with its standard error."""
    array = np.asarray(values, np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Measured(float(array.mean()), float(error), array)


def ratio(parts: np.ndarray, sizes: np.ndarray) -> Measured:
    """Return the ratio of two sums, with the standard error of its linear approximation."""
    value = parts.sum() / sizes.sum()
    rest = mean((parts - value * sizes) / sizes.mean())
    return Measured(float(value), rest.error, parts / sizes)


def check_metrics(benchmark: Benchmark) -> None:
    """Raise ConfigError for a metric of texts that does not exist, or can't be computed here."""
    for name, options in benchmark.metrics.items():
        place, kind = f"task {benchmark.name}: metric {name}", options.get("measure", name)
        if unknown := [option for option in options if option not in OPTIONS]:
            raise ConfigError(f"{place}: no option {unknown[0]}; known: {', '.join(OPTIONS)}")
        for pattern in [options.get("pattern", ""), *options.get("ignore", [])]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{place}: the pattern {pattern!r} is wrong: {error}") from error
        if kind in ROUGE:
            require_package("rouge_score", EXTRA, place)
        elif kind in CORPUS:
            require_package("sacrebleu", EXTRA, place)
        elif kind != "exact_match":
            open_function(place, kind)


def measure_texts(
    benchmark: Benchmark, questions: Sequence[Question], texts: Sequence[str]
) -> dict[str, Measured]:
    """Return the metrics of a benchmark whose answers were generated."""
    references = [question.continuations for question in questions]
    found = {}
    for name, options in benchmark.metrics.items():
        kind = options.get("measure", name)
        answers = [extract(text, options) for text in texts]
        if kind in CORPUS:
            found[name] = Measured(measure_corpus(kind, answers, references), math.nan, None)
            continue
        one = measure_one(kind, options, f"task {benchmark.name}: metric {name}")
        pairs = zip(answers, references, strict=True)
        found[name] = mean([one(answer, own) for answer, own in pairs])
    return found


def extract(text: str, options: Mapping[str, Any]) -> str:
    """Return what the pattern finds in a text, its first or, with pick=-1, its last; else "".

    Of a match its groups count, if it has any: the first that took part. Without a pattern it is
    the text without spaces around it.
    """
    if not options.get("pattern"):
        return text.strip()
    found = [
        next((group for group in match.groups() if group), "") if match.groups() else match[0]
        for match in re.finditer(options["pattern"], text)
    ]
    return found[options.get("pick", 0)].strip() if found else ""


def measure_one(
    kind: str, options: Mapping[str, Any], place: str
) -> Callable[[str, Sequence[str]], float]:
    """Return value(answer, references) of a metric; that of the best reference counts."""
    if kind in ROUGE:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        return lambda answer, own: max(scorer.score(one, answer)[kind].fmeasure for one in own)
    if kind == "exact_match":

        def plain(text: str) -> str:
            for pattern in options.get("ignore", []):
                text = re.sub(pattern, "", text)
            text = text.strip()
            return text.lower() if options.get("ignore_case") else text

        return lambda answer, own: float(plain(answer) in map(plain, own))
    function = open_function(place, kind)

    def value(answer: str, own: Sequence[str]) -> float:
        found = function(answer, list(own))
        if not isinstance(found, int | float) or not math.isfinite(found):
            raise DataError(f"{place}: {kind} gave {found!r}, not a finite number")
        return float(found)

    return value


def open_function(place: str, name: str) -> Callable[..., Any]:
    """Return the function(answer, references) -> number of FILE.py:FUNCTION. Raises ConfigError."""
    path, _, function = name.rpartition(":")
    if not path:
        known = ", ".join(("exact_match", *ROUGE, *CORPUS))
        raise ConfigError(f"{place}: measure={name!r} must be one of {known}, or FILE.py:FUNCTION")
    found = getattr(load_module(str(Path(path).expanduser())), function, None)
    if not callable(found):
        raise ConfigError(f"{place}: {path} has no function {function!r}")
    return found


def measure_corpus(kind: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return sacrebleu's BLEU or chrF, from 0 to 100."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[own[min(i, len(own) - 1)] for own in references] for i in range(most)]
    score = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[kind]
    return score(list(answers), streams).score


def centered(values: Sequence[tuple[float, float]]) -> float:
    """Return the mean of (value - chance) / (1 - chance), as CORE sums up its tasks (DCLM)."""
    return float(np.mean([(value - chance) / (1 - chance) for value, chance in values]))
