"""Benchmarks during training: their numbers in the metrics, after a resume, and in a sweep."""

import json

import numpy as np
import pytest

from nanojaxgpt import language_model, metrics
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import fields, override_config
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.evals.evaluate import evaluate_tasks
from nanojaxgpt.evals.tasks import find_benchmarks
from nanojaxgpt.training import fit

LETTERS = "abcde"
EXPERIMENT = """from nanojaxgpt.config import base_config, with_fields
from nanojaxgpt.sweep.space import choice


def get_config():
    return with_fields(base_config(), {fields!r})


def sweep():
    return choice("optim.learning_rate", 1e-4, 3e-2)
"""


@pytest.fixture
def cfg(small_config, tmp_path):
    """Return the config of a run that is asked two tasks of its own every third step."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(20):
        words = ["".join(rng.choice(list(LETTERS), 4)) for _ in range(4)]
        lines.append({"ask": words[0], "ends": words[1:], "right": int(rng.integers(3))})
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {"file": "words.jsonl", "context": "{ask}"}
    tasks = {
        "words": {"kind": "multiple_choice", "choices": "{ends}", "gold": "{right}", **shared},
        "next": {"kind": "cloze", "continuation": "{ends.0}", "metric": "log_probability",
                 **shared},
    }  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(tasks))
    return small_config(**{
        "eval.tasks": f"('{tmp_path}/own.json',)", "eval.tasks_data": str(tmp_path),
        "eval.tasks_every_steps": "3", "eval.every_steps": "0", "train.num_steps": "7",
        "checkpoint.every_steps": "3", "checkpoint.keep_last": "9", "mesh.data": "-1",
        "optim.learning_rate": "0.01",
    })  # fmt: skip


def silent(text: str) -> None:
    """Report nothing."""


@pytest.mark.slow
def test_the_curve_is_that_of_the_checkpoints(cfg, tmp_path):
    run = tmp_path / "run"
    fit(cfg, run, report=silent)
    curves = metrics.task_curves(metrics.read_metrics(run))
    assert curves.keys() == {"task_words_acc", "task_next_log_probability"}
    assert {step for step, _ in curves["task_words_acc"]} == {3, 6, 7}
    assert len({value for _, value in curves["task_next_log_probability"]}) == 3
    assert (run / "tasks.png").stat().st_size > 1000
    benchmarks = find_benchmarks(f"{tmp_path}/own.json")
    for step in (3, 7):
        model = language_model.load(run, step=step, report=silent)
        found = evaluate_tasks(model, benchmarks, tmp_path, report=silent).metrics
        assert dict(curves["task_words_acc"])[step] == found["words"]["acc"].value
        wanted = found["next"]["log_probability"].value
        assert dict(curves["task_next_log_probability"])[step] == pytest.approx(wanted, abs=1e-5)
    # What a stopped run redoes has the same numbers.
    before = metrics.read_metrics(run)
    for step in (6, 7):
        (run / "checkpoints" / str(step)).rename(tmp_path / f"gone-{step}")
    (run / "finished.json").unlink()
    fit(cfg, run, report=silent)
    assert metrics.task_curves(metrics.read_metrics(run)) == metrics.task_curves(before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_sweep_is_ranked_by_a_task(cfg, mode, tmp_path, capsys):
    given = dict(fields(cfg))
    experiment = tmp_path / "experiment.py"
    experiment.write_text(EXPERIMENT.format(fields=given))
    arguments = [f"--config={experiment}", f"--dir={tmp_path}/sweep"]
    assert main(["sweep", "run", *arguments, f"--mode={mode}"]) == 0, capsys.readouterr().err
    name, last = "task_next_log_probability", {}
    for trial in (tmp_path / "sweep" / "trials").iterdir():
        rate = json.loads((trial / "config.json").read_text())["optim"]["learning_rate"]
        last[rate] = metrics.task_curves(metrics.read_metrics(trial))[name][-1][1]
    best, worst = sorted(last, key=last.get, reverse=True)
    for order, first, second in (("--maximize", best, worst), ("--metric=" + name, worst, best)):
        capsys.readouterr()
        assert main(["sweep", "report", *arguments, f"--metric={name}", order]) == 0
        said = capsys.readouterr().out
        assert said.index(f"{last[first]:.4f}") < said.index(f"{last[second]:.4f}")


def test_files_are_read_before_the_first_step(cfg, tmp_path):
    for changes, error, words in (
        ({"eval.tasks": "('word',)"}, ConfigError, "no task word"),
        ({"eval.tasks_data": str(tmp_path / "none")}, DataError, r"none/words\.jsonl"),
    ):
        with pytest.raises(error, match=words):
            fit(override_config(cfg, changes), tmp_path / "run", report=silent)
        assert not (tmp_path / "run" / "checkpoints").exists()
