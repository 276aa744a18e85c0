"""In: the arguments of `lm-eval`. Out: the tasks of lm-evaluation-harness on a model."""

import json
from pathlib import Path
from typing import Any

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, chosen_step, integer, open_model_config
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.extras import require_package


def lm_eval(arguments: list[str]) -> None:
    """Run tasks of lm-evaluation-harness on a model, in this process and without torch."""
    options: dict[str, dict[str, Any]] = {
        "tasks": {"default": "", "help": "names of lm-eval's tasks, separated by commas"},
        "include_path": {"default": "", "help": "a folder of your own tasks as YAML files"},
        "limit": {"default": 0, "type": integer(1), "help": "questions of a task; default: all"},
        "fewshot": {"default": -1, "type": integer(0), "help": "default: as the task says"},
        "chat": {"action": "store_true", "help": "apply the model's chat template"},
        "json": {"default": "", "help": "write the results to this file"},
    }
    parsed, cfg = open_model_config("lm-eval", lm_eval.__doc__, arguments, options)
    if not parsed.tasks:
        raise ConfigError("lm-eval needs tasks: nanojaxgpt lm-eval MODEL --tasks=arc_easy,piqa")
    if parsed.json:
        rundir.check_file("--json", Path(parsed.json))
    require_package("lm_eval", "lm-eval", "lm-eval")
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    names = parsed.tasks.split(",")
    tasks = TaskManager(include_path=parsed.include_path or None)
    if unknown := [name for name in names if not tasks.match_tasks([name])]:
        raise ConfigError(f"lm-eval has no task {unknown[0]}; own tasks need --include_path=FOLDER")
    from nanojaxgpt import language_model
    from nanojaxgpt.evals.lm_eval import Adapter

    model = language_model.open_model(parsed.source, cfg, None, chosen_step(parsed), warn)
    found: Any = simple_evaluate(
        model=Adapter(model), tasks=names, task_manager=tasks, limit=parsed.limit or None,
        num_fewshot=None if parsed.fewshot < 0 else parsed.fewshot,
        apply_chat_template=parsed.chat, log_samples=False,
    )  # fmt: skip
    if parsed.json:
        text = json.dumps(found, indent=2, default=str)
        rundir.write_text(Path(parsed.json), text + "\n")
    print(make_table(found))


COMMANDS = {
    "lm-eval": Command(
        lm_eval, "MODEL --tasks=NAMES [--limit=N]", "tasks of lm-evaluation-harness", order=16
    )
}
