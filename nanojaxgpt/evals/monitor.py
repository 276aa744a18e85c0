"""The benchmarks of eval.tasks, asked again and again of the parameters of one run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from nanojaxgpt.data.loader import RunData
from nanojaxgpt.evals.answers import AnswerStore
from nanojaxgpt.evals.evaluate import SEED, headline, make_prompts, measure, score_prompts
from nanojaxgpt.evals.metrics import check_metrics
from nanojaxgpt.evals.tasks import find_benchmarks, open_benchmark
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.metrics import TASK
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import Params


def make_benchmarks(
    cfg: JobConfig, data: RunData, mesh: Mesh
) -> Callable[[Params], dict[str, float]]:
    """Return benchmarks(params) -> {task_NAME_METRIC: value}, the headline metric of each task.

    The files are read, and the prompts made, at once. Raises ConfigError, DataError.
    """
    known = find_benchmarks(",".join(cfg.eval.tasks))
    folder, limit = Path(cfg.eval.tasks_data).expanduser(), cfg.eval.tasks_limit
    shell = LanguageModel(cfg.model, {}, data.tokenizer, mesh, cfg, Path(), 0)
    for benchmark in known:
        check_metrics(benchmark)
    asked = [
        make_prompts(shell, open_benchmark(one, folder, limit), -1, SEED, chat=False)
        for one in known
    ]

    def run_benchmarks(params: Params) -> dict[str, float]:
        model = dataclasses.replace(shell, params=params)
        answers, found = AnswerStore(), {}
        score_prompts(model, asked, answers, lambda text: None)
        for prompts in asked:
            benchmark, metrics = prompts.opened.benchmark, measure(prompts, answers)
            name = headline(benchmark, metrics)
            found[f"{TASK}{benchmark.name}_{name}"] = metrics[name].value
        return found

    return run_benchmarks
