"""Searches: Optuna draws, ASHA prunes, and however often a worker is killed the count is met."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
from conftest import ROOT, write_tiny
from test_sweep import patch_mesh

from nanojaxgpt import metrics
from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.sweep import run
from nanojaxgpt.sweep.claims import Claims, read_outcome, run_path
from nanojaxgpt.sweep.plan import load_plan
from nanojaxgpt.sweep.run import Pruned, run_trials
from nanojaxgpt.sweep.search import Search, Suggestions
from nanojaxgpt.sweep.space import (
    chain,
    choice,
    fixed,
    log_uniform,
    product,
    tpe,
    uniform,
    zip_,
)

RATE, NUM, STEPS = "optim.learning_rate", 8, (2, 4, 6, 8)
SPACE = f"product(log_uniform('{RATE}', 1e-4, 1e-1), choice('model.mlp', 'gelu', 'relu'))"


@pytest.fixture(autouse=True)
def own_allocator(monkeypatch):
    """Keep the settings of this process's allocator."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def write_experiment(tmp_path_factory):
    """Return a function that writes an experiment with this `sweep()` and gives its path."""
    folder = tmp_path_factory.mktemp("search")

    def write(space: str):
        path = write_tiny(
            folder,
            f"""
            train.num_steps = {STEPS[-1]}
            cfg.eval.every_steps, cfg.eval.num_batches = {STEPS[0]}, 2
            cfg.checkpoint.every_steps = 3
            """,
            f"def sweep():\n    return {space}\n",
        )
        return str(path)

    return write


def open_search(path, folder) -> Search:
    plan = load_plan(path, {})
    return Search(folder, plan.base, plan.tpe)


def search_all(path, folder, say=lambda line: None) -> Search:
    """Run a search to its end as `sweep run` does; return it."""
    folder.mkdir(exist_ok=True)
    search = open_search(path, folder)
    run_trials(folder, [], "", 16, say, search)
    return search


def stand_in(monkeypatch, ran) -> None:
    """Put a known loss in the place of training; `ran` gets the trials that came to their end."""

    def train(sweep, trial):
        path, look, state = run_path(sweep.folder, trial.name), sweep.search.watch(trial), ""
        path.mkdir(parents=True, exist_ok=True)
        writer = open(path / "metrics.jsonl", "w")  # noqa: SIM115
        try:
            for step in STEPS:
                loss = abs(math.log10(trial.point[RATE]) + 2) + 1 / step
                writer.write(json.dumps({"step": step, "validation_loss": loss}) + "\n")
                writer.flush()
                look(step)
        except Pruned:
            state = "pruned"
        ran.append(trial.name)
        sweep.finish(trial, 1.0, state or "finished")

    monkeypatch.setattr(run, "run_alone", train)


def test_ranges_are_optunas_distributions():
    study, D = optuna.create_study(), optuna.distributions
    space = product(
        log_uniform("a.rate", 1e-4, 1e-1), uniform("a.beta", 0.8, 0.9), fixed("a.name", "x"),
        uniform("a.width", 2, 9, whole=True), choice("b.c", True, False),
        zip_(choice("b.d", 1, 2), choice("b.e", 3, 4)),
    )  # fmt: skip
    trial = study.ask()
    point = space.draw(Suggestions(trial))
    assert trial.distributions == {
        "a.rate": D.FloatDistribution(1e-4, 1e-1, log=True),
        "a.beta": D.FloatDistribution(0.8, 0.9),
        "a.name": D.CategoricalDistribution(["x"]),
        "a.width": D.IntDistribution(2, 9),
        "b.c": D.CategoricalDistribution(["True", "False"]),
        "b.d+b.e": D.CategoricalDistribution(["1, 3", "2, 4"]),
    }
    assert point.keys() == {"a.rate", "a.beta", "a.name", "a.width", "b.c", "b.d", "b.e"}
    assert type(point["b.c"]) is bool
    assert point["b.e"] == point["b.d"] + 2
    assert point["a.rate"] == pytest.approx(trial.params["a.rate"], rel=1e-5)
    branches = chain(log_uniform("a.rate", 1e-4, 1e-3), log_uniform("a.rate", 1.0, 10.0))
    names = set()
    for _ in range(20):
        trial = study.ask()
        branches.draw(Suggestions(trial))
        names |= trial.params.keys()
    assert names == {"chain", "chain 0: a.rate", "chain 1: a.rate"}
    with pytest.raises(ConfigError, match="two parts of the space apart, both named chain"):
        product(branches, chain(fixed("b.c", 1))).draw(Suggestions(study.ask()))


@pytest.mark.parametrize(("num", "reduction"), [(0, 4), (3, 1), (3, -1)])
def test_searches_that_are_none(num, reduction):
    with pytest.raises(ConfigError, match="at least 1"):
        tpe(fixed("a.b", 1), num, reduction=reduction)


@pytest.mark.slow
def test_a_search_learns_prunes_and_is_the_same_again(write_experiment, tmp_path, monkeypatch):
    ran = []
    stand_in(monkeypatch, ran)
    path = write_experiment(f"tpe({SPACE}, 40, seed=1)")
    search = search_all(path, tmp_path / "one")
    assert len(ran) == len(set(ran)) == 40
    rates = [math.log10(trial.point[RATE]) for trial in search.trials()]
    near = [sum(abs(rate + 2) < 0.3 for rate in part) for part in (rates[:10], rates[-10:])]
    assert near[1] >= 6 > near[0]  # of draws at random 2 in 10 would be
    states = [read_outcome(tmp_path / "one", name)["state"] for name in ran]
    assert 4 < states.count("finished") < 30
    assert states.count("pruned") == 40 - states.count("finished")
    search_all(path, tmp_path / "two")
    assert ran[:40] == ran[40:]
    other = write_experiment(f"tpe({SPACE}, 8, seed=2, reduction=0)")
    search_all(other, tmp_path / "three")
    assert ran[80:] != ran[:8]
    assert {read_outcome(tmp_path / "three", n)["state"] for n in ran[80:]} == {"finished"}


def assert_complete(path, folder, ran) -> None:
    """Check that the count is met, that nothing ran twice, and that Optuna knows the ends."""
    search = open_search(path, folder)
    names = [trial.name for _, trial in search.drawn()]
    assert len(names) == NUM
    assert sorted(ran) == sorted(set(names))
    for asked, trial in search.drawn():
        ended = {"finished": "COMPLETE", "pruned": "PRUNED"}
        assert asked.state.name == ended[read_outcome(folder, trial.name)["state"]]
    assert all(t.state.is_finished() for t in search.study.get_trials())


@pytest.mark.slow
def test_stopped_at_each_write_and_resumed(write_experiment, tmp_path, monkeypatch):
    ran, left = [], [0]
    stand_in(monkeypatch, ran)
    path = write_experiment(f"tpe({SPACE}, {NUM}, reduction=2)")
    backend = optuna.storages.journal.JournalFileBackend
    append = backend.append_logs

    def dies(self, logs):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        append(self, logs)

    search_all(path, tmp_path / "whole")
    assert_complete(path, tmp_path / "whole", ran)
    monkeypatch.setattr(backend, "append_logs", dies)
    stopped = 0
    for moment in range(1, 60, 4):
        ran.clear()
        left[0], folder = moment, tmp_path / str(moment)
        try:
            search_all(path, folder)
        except KeyboardInterrupt:
            stopped += 1
            search_all(path, folder)
        assert_complete(path, folder, ran)
    assert stopped > 8


def test_a_torn_line_is_cut_off(write_experiment, tmp_path, monkeypatch):
    ran = []
    stand_in(monkeypatch, ran)
    path = write_experiment(f"tpe({SPACE}, {NUM})")
    with Claims(tmp_path) as claims:
        assert open_search(path, tmp_path).draw(claims)
    with open(tmp_path / "optuna.journal", "a") as journal:
        journal.write('{"op_code":5,"wor')
    search_all(path, tmp_path)
    assert_complete(path, tmp_path, ran)


def test_trials_whose_outcome_is_damaged_run_again(write_experiment, tmp_path, monkeypatch):
    ran = []
    stand_in(monkeypatch, ran)
    path = write_experiment(f"tpe({SPACE}, {NUM}, reduction=2)")
    search_all(path, tmp_path)
    first = list(ran)
    assert "pruned" in {read_outcome(tmp_path, name)["state"] for name in first}
    for name in first:
        (run_path(tmp_path, name) / "trial.json").write_text("[]")
    search_all(path, tmp_path)
    assert sorted(ran) == sorted(first * 2)  # also those that Optuna has as pruned
    assert {read_outcome(tmp_path, name)["state"] for name in first} == {"finished"}


@pytest.mark.parametrize("line", [
    b"\xff", b"{", b"[]", b"5", b"[" * 100_000, b'{"op_code": "x"}', b'{"op_code": 5}', b"9" * 5000,
])  # fmt: skip
def test_a_damaged_journal_is_named(line, write_experiment, tmp_path, capsys, monkeypatch):
    stand_in(monkeypatch, [])
    path = write_experiment(f"tpe({SPACE}, 2)")
    search_all(path, tmp_path)
    journal = tmp_path / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], line + b"\n", *lines[3:]]))
    for action in ("status", "run"):
        assert main(["sweep", action, f"--config={path}", f"--dir={tmp_path}"]) == 3
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"error: {journal}:4 is damaged")


def test_points_that_come_twice_count_and_run_once(write_experiment, tmp_path, monkeypatch):
    ran = []
    stand_in(monkeypatch, ran)
    path = write_experiment(f"tpe(choice('{RATE}', 1e-3, 1e-2), {NUM})")
    search_all(path, tmp_path)
    assert len(ran) == 2
    assert_complete(path, tmp_path, ran)


def test_only_one_draws_at_a_time(write_experiment, tmp_path):
    search = open_search(write_experiment(f"tpe({SPACE}, 2)"), tmp_path)
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("drawing")
        assert not search.draw(other)
        one.release("drawing")
        assert search.draw(other)
        assert search.draw(one)
        assert not search.draw(one)
    assert len(search.trials()) == 2


@pytest.mark.slow
def test_a_real_search_by_the_commands(write_experiment, tmp_path, capsys, monkeypatch):
    patch_mesh(monkeypatch)
    path = write_experiment(f"tpe(log_uniform('{RATE}', 1e-4, 1e-1), 5, reduction=2)")
    folder = tmp_path / "s"
    arguments = [f"--config={path}", f"--dir={folder}"]
    assert main(["sweep", "plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "5 trials, chosen as it goes by TPE for the lowest validation_loss; "
        "ASHA keeps 1 in 2 at steps 2, 4\n"
    )
    assert "16 random points" in out
    assert main(["sweep", "status", *arguments]) == 0
    assert "5 of 5 to be drawn" in capsys.readouterr().out
    assert not folder.exists()
    assert main(["sweep", "run", *arguments]) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if "/5 " in line]
    assert [line.split()[0] for line in said] == [f"{n}/5" for n in range(1, 6)]
    trials = open_search(path, folder).trials()
    states = [read_outcome(folder, trial.name)["state"] for trial in trials]
    assert set(states) == {"finished", "pruned"}
    for trial, state in zip(trials, states, strict=True):
        steps = [r["step"] for r in read_metrics(run_path(folder, trial.name)) if "loss" in r]
        assert (steps[-1] == STEPS[-1]) == (state == "finished")
        assert state == "finished" or steps[-1] in STEPS
        message = read_outcome(folder, trial.name)["message"]
        assert ("is not among the best 1/2 so far" in message) == (state == "pruned")
    assert main(["sweep", "resume", *arguments]) == 0
    assert capsys.readouterr().out == ""
    assert main(["sweep", "status", *arguments]) == 0
    assert f"{states.count('pruned')} pruned" in capsys.readouterr().out
    assert main(["sweep", "report", *arguments]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert f"{states.count('pruned')} pruned" in lines[0]
    assert "finished" in lines[3]
    assert main(["sweep", "report", f"--dir={folder}"]) == 0
    assert capsys.readouterr().out.split("\n") == lines
    assert main(["sweep", "run", *arguments, "--mode=vmap"]) == 2
    assert main(["sweep", "run", *arguments, "--config.eval.every_steps=0",
                 "--config.data.validation_fraction=0.0"]) == 2  # fmt: skip
    assert "no metric validation_loss; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("tpe(choice('optim.lerning_rate', 1), 3)", "point 1 .*did you mean optim.learning_rate"),
        ("tpe(uniform('optim.beta2', 0.5, 1.9), 3)", "point [0-9]+ .*beta2=.* must be"),
        ("tpe(choice('model.mlp'), 3)", "empty space"),
        ("tpe(chain(), 3)", "empty space"),
        ("tpe(choice('model.mlp', 'gelu'), 0)", "tpe of 0 points"),
    ],
)
@pytest.mark.parametrize("action", ["plan", "run"])
def test_bad_searches_exit_2(write_experiment, space, words, action, capsys, tmp_path):
    arguments = [f"--config={write_experiment(space)}", f"--dir={tmp_path}"]
    assert main(["sweep", action, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert re.search(words, error), error


def test_a_point_that_does_not_fit_is_named_and_not_kept(write_experiment, tmp_path):
    search = open_search(write_experiment(f"tpe({SPACE}, 3)"), tmp_path)
    wrong = tpe(product(log_uniform(RATE, 1e-4, 1e-1), choice("model.num_heads", 3)), 3)
    bad = Search(tmp_path, search.base, wrong)
    with Claims(tmp_path) as claims:
        with pytest.raises(ConfigError, match=r"num_heads=3\): model.embed_dim=16 is not"):
            bad.draw(claims)
        assert bad.left() == 3
        assert search.draw(claims)


def test_without_optuna_the_extra_is_named(write_experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "nanojaxgpt.sweep.search")
    path = write_experiment(f"tpe({SPACE}, 3)")
    assert main(["sweep", "run", f"--config={path}", f"--dir={tmp_path}"]) == 2
    assert "pip install 'nanojaxgpt[sweep]'" in capsys.readouterr().err
    assert main(["sweep", "plan", f"--config={path}"]) == 0


def test_a_space_that_has_changed_is_told(write_experiment, tmp_path):
    with Claims(tmp_path) as claims:
        first = open_search(write_experiment("tpe(choice('model.mlp', 'gelu'), 2)"), tmp_path)
        assert first.draw(claims)
        path = write_experiment("tpe(choice('model.mlp', 'gelu', 'relu'), 2)")
        with pytest.raises(ConfigError, match="a space that has changed needs another --dir"):
            open_search(path, tmp_path).draw(claims)


@pytest.mark.exhaustive
def test_two_workers_killed_at_random_moments(write_experiment, tmp_path):
    path = write_experiment(f"tpe(log_uniform('{RATE}', 1e-4, 1e-1), {NUM}, reduction=2)")
    command = [sys.executable, "-m", "nanojaxgpt", "sweep", "run", f"--config={path}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    rng, folder, outputs = random.Random(0), tmp_path / "s", []

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, f"--dir={folder}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=environment,
        )  # fmt: skip

    for _ in range(4):
        pair = [begin(), begin()]
        journal = folder / "optuna.journal"
        size = (journal.stat().st_size if journal.exists() else 0) + rng.randrange(4000)
        while any(p.poll() is None for p in pair) and (
            not journal.exists() or journal.stat().st_size < size
        ):
            time.sleep(0.01)
        for one in pair:
            one.send_signal(signal.SIGKILL)
            outputs.append(one.communicate()[0])
    last = begin()
    outputs.append(last.communicate(timeout=600)[0])
    assert last.returncode == 0, outputs
    said = [line.split()[1] for text in outputs for line in text.split("\n") if f"/{NUM} " in line]
    assert len(said) == len(set(said))
    search = open_search(path, folder)
    assert_complete(path, folder, [trial.name for trial in search.trials()])
    for trial in search.trials():
        steps = [
            r["step"] for r in metrics.read_metrics(run_path(folder, trial.name)) if "loss" in r
        ]
        assert steps == [*range(1, steps[-1] + 1)]
