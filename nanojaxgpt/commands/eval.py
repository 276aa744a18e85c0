"""In: the arguments of `eval` and `compare`. Out: the loss of a model, its scores on benchmarks."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config, rundir
from nanojaxgpt.arguments import (
    TEAM,
    Command,
    check_team,
    chosen_step,
    integer,
    open_model_config,
    open_team,
)
from nanojaxgpt.config.sections import Config
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError

if TYPE_CHECKING:
    from nanojaxgpt.evals.evaluate import Evaluated
    from nanojaxgpt.hosts.team import Team
    from nanojaxgpt.language_model import LanguageModel

DATA = ("evaluate on this source, written as in data.source; default: the validation split. With "
        "--tasks: the folder of their files")  # fmt: skip
BENCHMARKS: dict[str, dict[str, Any]] = {
    "tasks": {"default": "", "help": "benchmarks: names, or FILE.json[:NAME]; see docs/evals.md"},
    "limit": {"default": 0, "type": integer(1), "help": "questions of a task; default: all"},
    "fewshot": {"default": -1, "type": integer(0), "help": "examples before each question"},
    "seed": {"default": 1234, "type": integer(0), "help": "of the examples' choice"},
    "chat": {"default": False, "action": "store_true", "help": "ask in the model's chat template"},
    "json": {"default": "", "help": "write the results to this file"},
    "fresh": {"default": False, "action": "store_true", "help": "neither use nor keep answers"},
}
CURVE: dict[str, dict[str, Any]] = {
    "curve": {"default": False, "action": "store_true",
              "help": "of each checkpoint that the run has kept"},
}  # fmt: skip


def evaluate(arguments: list[str]) -> None:
    """Print the validation loss and bits per byte of a model as JSON; with --tasks, its benchmarks.

    Of a run over its validation split; with --data=SOURCE on all of another source, with the
    model's own tokenizer.
    """
    options = {"data": {"default": "", "help": DATA}, **BENCHMARKS, **CURVE, **TEAM}
    parsed, cfg = open_model_config("eval", evaluate.__doc__, arguments, options)
    if parsed.tasks:
        check_team(parsed)
        with open_team(parsed) as team:
            evaluate_benchmarks(parsed, cfg, team)
        return
    for name, settings in (BENCHMARKS | CURVE | TEAM).items():
        if getattr(parsed, name) != settings["default"]:
            raise ConfigError(f"--{name} is of benchmarks: name them with --tasks=NAMES")
    if parsed.data:
        # What the run's config says of its own source: which hash it has, how much is looked at.
        own = {"data.sha256": "", "eval.num_batches": "0"}
        cfg = config.override_config(cfg, own | parsed.overrides)
    from nanojaxgpt import language_model

    model = open_on_mesh(parsed.source, cfg, chosen_step(parsed), warn)
    found = language_model.evaluate(model, parsed.data, warn)
    source = {"source": parsed.data} if parsed.data else {}
    print(json.dumps({"step": model.step, **source, **found}))


def evaluate_benchmarks(parsed: argparse.Namespace, cfg: Config, team: "Team") -> None:
    """Print the table of the benchmarks; of several processes, the first one prints and writes."""
    from nanojaxgpt.hosts.joining import preflight

    preflight(team, cfg)
    options = {name: getattr(parsed, name) for name in BENCHMARKS | CURVE if name != "json"}
    if others := team.differing(options):
        raise ConfigError(f"{others}: the options are not those of {team.name(0)}; start all "
                          "processes with the same ones")  # fmt: skip
    steps = team.decide(lambda: all_steps(parsed) if parsed.curve else [chosen_step(parsed)])
    results = run_benchmarks(parsed, [(parsed.source, cfg, step) for step in steps], team)
    if team.first:
        found = [one.summary for one in results]
        write_results(parsed.json, found if parsed.curve else found[0])
        print("\n".join(curve_lines(found) if parsed.curve else benchmark_lines(found[0])))


def compare(arguments: list[str]) -> None:
    """Compare two models on benchmarks, question by question: difference, interval, examples."""
    options = {"data": {"default": "", "help": "the folder of the tasks' files"}, **BENCHMARKS}
    more = {"other": {"metavar": "MODEL", "help": "the model to compare it with"}}
    parsed, cfg = open_model_config("compare", compare.__doc__, arguments, options, more)
    if not (parsed.other and parsed.tasks):
        raise ConfigError("compare needs two models and tasks: nanojaxgpt compare MODEL MODEL "
                          "--tasks=NAMES")  # fmt: skip
    if parsed.step:
        raise ConfigError("--step: compare takes the newest checkpoint of a run")
    from nanojaxgpt.interchange.opening import config_of, find_model

    second = find_model(parsed.other)
    second_cfg = config.override_config(config_of(second), parsed.overrides)
    from nanojaxgpt.evals.evaluate import compare_tasks
    from nanojaxgpt.hosts.team import ALONE

    results = run_benchmarks(parsed, [(parsed.source, cfg, 0), (second, second_cfg, 0)], ALONE)

    found = compare_tasks(*results)
    write_results(parsed.json, {"models": [one.summary for one in results], "comparison": found})
    print("\n".join(comparison_lines(found)))


def all_steps(parsed: argparse.Namespace) -> list[int]:
    """Return the steps of a run's checkpoints. Raises ConfigError."""
    if parsed.step:
        raise ConfigError("--curve takes all checkpoints of a run: leave out --step")
    run = parsed.source
    steps = rundir.saved_steps(run / "checkpoints") if isinstance(run, Path) else []
    if not steps:
        raise ConfigError("--curve is for a run with checkpoints: leave it out")
    return steps


def run_benchmarks(
    parsed: argparse.Namespace, models: list[tuple[Any, Config, int]], team: "Team"
) -> list["Evaluated"]:
    """Return the results of each model and step; the files are checked before one is opened."""
    from nanojaxgpt.evals import tasks

    def report(text: str) -> None:
        if team.first:
            warn(text)

    benchmarks = tasks.find_benchmarks(parsed.tasks)
    data = Path(parsed.data or ".").expanduser()
    if parsed.json:
        rundir.check_file("--json", Path(parsed.json))
    for benchmark in benchmarks:
        tasks.open_benchmark(benchmark, data, parsed.limit, report)
    from nanojaxgpt.evals.evaluate import evaluate_tasks

    results = []
    for source, cfg, step in models:
        model = open_on_mesh(source, cfg, step, report, team)
        found = evaluate_tasks(
            model, benchmarks, data, limit=parsed.limit, fewshot=parsed.fewshot, seed=parsed.seed,
            chat=parsed.chat, cache=None if parsed.fresh else config.cache_dir(cfg) / "evals",
            report=report, team=team,
        )  # fmt: skip
        results.append(found)
    return results


def open_on_mesh(
    source: Any, cfg: Config, step: int, report: Callable[[str], None], team: "Team | None" = None
) -> "LanguageModel":
    """Return a model on the mesh of its config, or on one device where that does not fit.

    Raises ConfigError where it does not fit the devices of a team of several processes.
    """
    from nanojaxgpt import language_model, sharding
    from nanojaxgpt.hosts.team import ALONE

    team = team or ALONE
    try:
        mesh = sharding.make_mesh(cfg.mesh.given())
    except ConfigError:  # the run's mesh does not fit this machine: one device does
        if team.count > 1:
            raise
        mesh = None
    return language_model.open_model(source, cfg, mesh, step, report, team=team)


def write_results(path: str, found: Any) -> None:
    """Write results as JSON, where --json names a file."""
    if path:
        rundir.write_text(Path(path), json.dumps(found, indent=2) + "\n")


def benchmark_lines(summary: dict[str, Any]) -> list[str]:
    """Return a table of the tasks: questions, examples, and each metric with its error."""
    rows = [("task", "questions", "shots", "metric", "value", "")]
    for name, task in summary["tasks"].items():
        for metric, one in task["metrics"].items():
            mark = "*" if metric == task["metric"] else ""
            error = f"+- {one['stderr']:.4f}" if "stderr" in one else ""
            rows.append((name, f"{task['examples']:,}", str(task["fewshot"]), metric + mark,
                         f"{one['value']:.4f}", error))  # fmt: skip
    lines = aligned(rows)
    if "centered" in summary:
        lines.append(f"mean of (* - chance) / (1 - chance): {summary['centered']:.4f}")
    template = "on" if summary["chat_template"] else "off"
    shapes = summary["compiled_shapes"]
    lines.append(f"chat template {template}; shapes compiled: {sum(shapes.values())}")
    return lines


def curve_lines(summaries: list[dict[str, Any]]) -> list[str]:
    """Return a table of the checkpoints of a run: the headline metric of each task."""
    rows = [("step", *summaries[0]["tasks"])]
    for one in summaries:
        values = [task["metrics"][task["metric"]]["value"] for task in one["tasks"].values()]
        rows.append((str(one["step"]), *(f"{value:.4f}" for value in values)))
    return aligned(rows)


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """Return a table of the differences between two models."""
    rows = [("task", "metric", "first", "second", "difference", "95 % interval", "questions",
             "needed")]  # fmt: skip
    for name, one in found.items():
        interval = "{:+.4f} to {:+.4f}".format(*one["interval"]) if "interval" in one else ""
        needed = f"{one['examples_needed']:,}" if "examples_needed" in one else ""
        rows.append((name, one["metric"], f"{one['first']:.4f}", f"{one['second']:.4f}",
                     f"{one['difference']:+.4f}", interval, f"{one['examples']:,}",
                     needed))  # fmt: skip
    return aligned(rows)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (zip(row, widths, strict=True) for row in rows)
    return ["  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded]


COMMANDS = {
    "eval": Command(
        evaluate, "MODEL [--data=SOURCE] [--tasks=NAMES]", "loss, bits per byte, benchmarks",
        order=2,
    ),
    "compare": Command(
        compare, "MODEL MODEL --tasks=NAMES", "two models on benchmarks, with intervals", order=15
    ),
}  # fmt: skip
