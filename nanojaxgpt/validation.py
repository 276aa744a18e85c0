"""The loss and the metrics of parameters over held-out data, in training and by `eval`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax.sharding import Mesh

from nanojaxgpt import memory, sharding
from nanojaxgpt.batches import Finish, make_batches, without_documents
from nanojaxgpt.config import AnyConfig, typed
from nanojaxgpt.data.loader import RunData, fetch_ahead
from nanojaxgpt.data.rows import Batch, make_eval_batches, make_ramp
from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.perplexity import (
    language_numbers,
    make_eval_step,
    make_objective_step,
    objective_numbers,
    sum_batches,
)
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.step import OBJECTIVES, make_hyper


def make_evaluation(
    cfg: AnyConfig,
    data: RunData,
    mesh: Mesh,
    model: Transformer,
    held: Mapping[str, PyTree] | None = None,
) -> Callable[..., dict[str, Any]]:
    """Return evaluate(params) -> the numbers over the validation split, or its first batches.

    A second argument is a function through which the batches go, a watchdog's say; `hyper` are the
    numbers of another config, `finish` see make_batches. Raises MemoryExceeded where a batch does
    not fit beside the abstract trees that a device holds: `held`, by name.
    """
    cfg = typed(cfg)  # a paper's measure may have changed the ConfigDict of its run
    size, seq_len = cfg.eval.batch_size or cfg.train.batch_size, cfg.model.seq_len
    sharding.check_batch("eval.batch_size", size, 1, seq_len, mesh)
    count, rows = make_eval_batches(data.validation(seq_len), size)
    count = min(count, cfg.eval.num_batches or count)
    if count:
        memory.check_evaluation(cfg, mesh, held or {})
    ahead, lower = cfg.data.prefetch_batches, lambda: memory.EVALUATION_ADVICE
    if cfg.objective.kind in ("language", "policy"):
        token_bytes, numbers = data.tokenizer.token_bytes(), language_numbers
        eval_step = make_eval_step(model, token_bytes, cfg.train.loss_chunks)
    else:
        adapters = dataclasses.replace(model.cfg.lora, dropout=0.0)
        plain = Transformer(dataclasses.replace(model.cfg, dropout=0.0, lora=adapters))
        eval_step = make_objective_step(OBJECTIVES[cfg.objective.kind](plain, cfg))
        numbers = objective_numbers
    eval_step = memory.checked(eval_step, mesh, "an evaluation step", lower)

    def run_evaluation(
        params: Params,
        each: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
        hyper: Hyper | None = None,
        finish: Finish = without_documents,
    ) -> dict[str, Any]:
        fetch = make_batches(rows, make_ramp(size), seq_len, mesh, finish)
        one = functools.partial(eval_step, hyper=hyper or make_hyper(cfg))
        with memory.explained("the evaluation", mesh, lower):
            batches = each(fetch_ahead(fetch, 0, count, ahead))
            return numbers(sum_batches(one, params, batches))

    return run_evaluation
