"""What a sweep's report says and draws."""

import csv
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny, write_trial
from matplotlib.figure import Figure

from nanojaxgpt import config
from nanojaxgpt.__main__ import main
from nanojaxgpt.hosts import process
from nanojaxgpt.sweep import plots
from nanojaxgpt.sweep.plan import SEED, Trial, load_trials, read_plan, swept_fields
from nanojaxgpt.sweep.report import seeds_needed, write_report
from nanojaxgpt.sweep.results import Group, TrialResult, group_seeds
from nanojaxgpt.sweep.space import choice, product

RATE = "optim.learning_rate"


@pytest.fixture(autouse=True)
def own_allocator(monkeypatch):
    """Keep the settings of this process's allocator."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)


@pytest.fixture
def write_experiment(tmp_path):
    """Return a function that writes an experiment with this `sweep()` and gives its path."""

    def write(space: str) -> str:
        more = f"def sweep():\n    return {space}\n"
        return str(write_tiny(tmp_path, "train.num_steps = 6", more))

    return write


def test_without_matplotlib_a_report_has_no_plots(write_experiment, tmp_path, monkeypatch):
    trials = load_trials(write_experiment(f"choice('{RATE}', 1e-3, 1e-2)"), {})
    for trial in trials:
        write_trial(tmp_path / "s", trial, 2.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = write_report(tmp_path / "s", trials, "validation_loss", False)
    assert lines[-1] == "no plots: matplotlib is not installed: pip install 'nanojaxgpt[plots]'"
    names = {path.name for path in (tmp_path / "s" / "report").iterdir()}
    assert names == {"best.py", "report.txt", "trials.csv"}


@pytest.mark.slow
def test_a_report_has_a_table_the_best_and_plots(write_experiment, tmp_path, capsys):
    path = write_experiment(
        f"product(choice('{RATE}', 1e-3, 1e-2), choice('model.mlp', 'gelu', 'relu'), "
        f"choice('{SEED}', 0, 1))"
    )
    trials = load_trials(path, {})
    found = [3.0, 3.2, 2.2, 2.0, 1.9, 2.5, 5.0, float("nan")]  # the best one has not the best mean
    for trial, loss in zip(trials, found, strict=True):
        write_trial(tmp_path / "s", trial, loss, "finished" if loss == loss else "non-finite")
    assert main(["sweep", "report", f"--config={path}", f"--dir={tmp_path}/s"]) == 0
    out = capsys.readouterr().out
    target = tmp_path / "s" / "report"
    assert (target / "report.txt").read_text() == out
    lines = out.splitlines()
    assert lines[0].startswith("8 of 8 trials ended: 7 finished, 1 non-finite; 12 s")
    assert lines[3].split() == [
        "2.1000",
        "0.1414",
        "2",
        "finished",
        *["learning_rate=0.001", "mlp=relu"],
    ]
    assert "differ by 0.1000; to detect that at the 5 %" in out
    rows = list(csv.DictReader(open(target / "trials.csv")))  # noqa: SIM115
    assert [float(row["validation_loss"]) for row in rows[:7]] == found[:7]
    assert rows[7]["state"] == "non-finite"
    assert rows[4][RATE] == "0.01"
    best = config.load_config(str(target / "best.py"))
    assert config.differences(best, trials[2].cfg) == []
    assert "best.py, by the mean over 2 seeds; the config of" in lines[-1]
    pictures = {p.name for p in target.glob("*.png")}
    assert pictures == {
        "curves.png",
        f"{RATE}.png",
        "model.mlp.png",
        f"{RATE}-model.mlp.png",
    }
    assert (
        main(["sweep", "report", f"--config={path}", f"--dir={tmp_path}/s", "--metric=lose"]) == 2
    )
    assert "no metric lose; did you mean loss?" in capsys.readouterr().err
    assert main(["sweep", "status", f"--config={path}", f"--dir={tmp_path}/s"]) == 0
    assert capsys.readouterr().out.startswith("8 trials: 7 finished, 1 non-finite")
    text = write_report(tmp_path / "s", trials, "validation_loss", maximize=True)
    assert "mlp=gelu" in text[3]


@pytest.fixture
def figures(monkeypatch):
    """Return the figures that are drawn from now on, by the names of their files."""
    found = {}
    save = lambda self, path, **_: found.__setitem__(path.name, self)
    monkeypatch.setattr(Figure, "savefig", save)
    return found


def draw(points, value, curve=None) -> None:
    """Draw the curves and the plots of fields of these points as a report does."""
    trials = [Trial(str(point), point, None) for point in points]
    results = [
        TrialResult(t, "finished", 1.0, value(t.point), curve(t.point) if curve else [(1, 0.0)])
        for t in trials
    ]
    fields = [field for field in swept_fields(trials) if field != SEED]
    groups = group_seeds(results, maximize=False)
    plots.plot_curves(Path("curves.png"), groups, fields, "loss", False)
    for field in fields:
        plots.plot_field(Path(f"{field}.png"), groups, field, fields, "loss", False)


def test_curves_have_a_line_and_a_band_for_each_setting(figures):
    space = product(choice(RATE, 1e-2, 1e-3, 1e-4), choice(SEED, 0, 1, 2))

    def curve(point):
        wave = [(step, 100 * point[RATE] + point[SEED] ** 2 + step) for step in range(4)]
        return wave[: 3 if point[SEED] == 2 else 4]

    draw(space.points(), lambda point: 1.0, curve)
    (axes,) = figures["curves.png"].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"learning_rate={rate}" for rate in (1e-4, 1e-3, 1e-2)]
    assert len(axes.lines) == len(axes.collections) == 3
    for line, band, rate in zip(axes.lines, axes.collections, (1e-4, 1e-3, 1e-2), strict=True):
        assert list(line.get_xdata()) == [0, 1, 2]  # steps that all seeds have
        at = 100 * rate + np.arange(3)
        np.testing.assert_allclose(line.get_ydata(), at + 5 / 3)  # the mean of 0, 1 and 4
        edges = band.get_paths()[0].vertices[:, 1]
        assert (edges.min(), edges.max()) == (at[0], at[-1] + 4)


def test_many_settings_are_colored_by_the_number_that_is_swept(figures):
    rates = [2.0**-n for n in range(12)]
    space = product(choice(RATE, *rates), choice("model.mlp", "gelu", "relu"), choice(SEED, 0, 1))
    draw(space.points(), lambda p: abs(math.log2(p[RATE]) + 5) + p[SEED] if p[RATE] < 1 else 1e9)
    axes, bar = figures["curves.png"].axes
    assert (bar.get_ylabel(), bar.get_yscale()) == (RATE, "log")
    assert len({tuple(line.get_color()) for line in axes.lines[:24]}) == len(rates)
    assert len(axes.lines) == 24 + 2  # of the legend
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["mlp=gelu", "mlp=relu"]
    assert {line.get_linestyle() for line in axes.lines} == {"-", "--"}
    (axes,) = figures[f"{RATE}.png"].axes
    assert axes.get_ylim()[1] < 8  # what diverged is a cross
    labels = sorted(text.get_text() for text in axes.get_legend().get_texts())
    assert labels == ["mlp=gelu", "mlp=relu", "not finite, or far off"]
    for bars, extra in zip(axes.containers, labels[:2], strict=True):
        means = bars.lines[0]
        assert bars.get_label() == extra
        assert list(means.get_xdata()) == sorted(rates)[:-1]
        assert list(means.get_ydata()) == [abs(n) + 0.5 for n in range(-6, 5)]


def test_of_many_names_the_best_have_a_legend(figures):
    names = [f"m{number}" for number in range(12)]
    draw(choice("model.mlp", *names).points(), lambda point: int(point["model.mlp"][1:]))
    (axes,) = figures["curves.png"].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["4 others", *(f"mlp={name}" for name in names[:8])]


def test_seeds_alone_are_one_line_without_a_plot_of_their_own(figures):
    draw(choice(SEED, 0, 1, 2).points(), lambda point: 1.0, lambda p: [(1, 2.0), (2, p[SEED])])
    assert set(figures) == {"curves.png"}
    (axes,) = figures["curves.png"].axes
    assert len(axes.lines) == len(axes.collections) == 1
    assert axes.get_legend() is None


def test_status_and_report_need_the_folder_alone(write_experiment, tmp_path, capsys, monkeypatch):
    folder, rates = tmp_path / "s", "('embed_=0.3',), ('embed_=1',)"
    path = write_experiment(f"choice('optim.rate_multipliers', {rates})")  # tuples are JSON's lists
    named = [f"--config={path}", "--config.train.num_steps=5", f"--dir={folder}"]
    assert main(["sweep", "report", f"--dir={folder}"]) == 2
    assert "s has no sweep.json, which `sweep run` writes" in capsys.readouterr().err
    trials = load_trials(path, {"train.num_steps": "5"})
    for trial, loss in zip(trials, (3.0, 2.0), strict=True):
        write_trial(folder, trial, loss)
    assert main(["sweep", "run", *named]) == 0  # all are done
    said = {}
    for action in ("status", "report"):
        assert main(["sweep", action, *named]) == 0
        said[action] = capsys.readouterr().out
    best = (folder / "report" / "best.py").read_text()
    assert "cfg.train.num_steps = 5" in best
    monkeypatch.chdir(tmp_path)
    for action, out in said.items():
        assert main(["sweep", action, f"--dir={folder}"]) == 0
        assert capsys.readouterr().out == out
    assert (folder / "report" / "best.py").read_text() == best
    plan = read_plan(folder)
    assert [(t.name, t.point, t.cfg) for t in plan.trials] == [tuple(t) for t in trials]
    for arguments, words in (
        (["report", f"--dir={folder}", "--config.train.seed=1"], "needs --config"),
        (["run", f"--dir={folder}"], "sweep run needs --config=EXPERIMENT.py\n"),
    ):
        assert main(["sweep", *arguments]) == 2
        assert words in capsys.readouterr().err
    unknown, empty = '{"base": {"model": {"depth": 1}}}', '{"base": {}, "trials": [1]}'
    for text in ("[" * 100_000, "[]", "{", unknown, empty):
        (folder / "sweep.json").write_text(text)
        assert main(["sweep", "report", f"--dir={folder}"]) == 2
        assert "sweep.json" in capsys.readouterr().err


def test_seeds_needed_keeps_its_promise():
    def group(mean, spread, count):
        rng = random.Random(repr((mean, count)))
        values = [rng.gauss(mean, spread) for _ in range(count)]
        trials = [Trial("", {SEED: seed}, None) for seed in range(count)]
        results = [
            TrialResult(t, "finished", 1.0, v, []) for t, v in zip(trials, values, strict=True)
        ]
        return group_seeds(results, maximize=False)[0]

    needed = seeds_needed(
        Group(group(0, 1, 9).results, 0.0, 1.0), Group(group(1, 1, 9).results, 1.0, 1.0)
    )
    assert needed == 16  # 2 x 2.8016 ** 2 = 15.7
    rng, shown = np.random.default_rng(0), 0
    for _ in range(2000):
        a, b = rng.normal(0, 1, needed), rng.normal(1, 1, needed)
        pooled = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / needed)
        shown += abs(a.mean() - b.mean()) / pooled > 1.96
    assert 0.76 < shown / 2000 < 0.85
    assert seeds_needed(group(0, 1, 1), group(1, 1, 1)) == 0
