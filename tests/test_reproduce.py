"""Papers: verdicts by a stated criterion, what is missing is not run, what was stopped goes on."""

import functools
import json
import math
import subprocess
import sys
from dataclasses import replace

import jax
import pytest
from conftest import ROOT
from matplotlib.figure import Figure

from nanojaxgpt import sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import base_config, load_module, override_config
from nanojaxgpt.errors import ConfigError, Stopped
from nanojaxgpt.papers.paper import (
    Arm,
    Claim,
    Paper,
    Plot,
    Run,
    first_seeds,
    load_paper,
    paper_problems,
    verdict,
)
from nanojaxgpt.papers.reproduce import (
    draw_curves,
    measure_claim,
    reproduce,
    save_report,
    to_markdown,
)
from nanojaxgpt.sweep import run
from nanojaxgpt.sweep.space import choice, zip_

PAPERS = sorted((ROOT / "experiments" / "papers").glob("*.py"))


def claim(**changes) -> Claim:
    return replace(Claim("loss", 1.0, "here", lambda: 1.0, (0.9, 1.1)), **changes)


@pytest.mark.parametrize(
    ("measured", "every_seed", "expected"),
    [
        ([1.0], False, "PASS"),
        ([0.9], False, "PASS"),
        ([1.1001], False, "FAIL"),
        ([0.8, 1.2], False, "PASS"),
        ([0.8, 1.2], True, "FAIL"),
        ([1.0, math.nan], False, "FAIL"),
        ([math.inf], False, "FAIL"),
        ([], False, "NOT-RUN"),
    ],
)
def test_the_verdict_is_the_criterions(measured, every_seed, expected):
    assert verdict(claim(every_seed=every_seed), measured) == expected


def test_a_number_that_was_never_logged_is_accepted_by_nothing():
    run = Run(ROOT, None, [{"step": 5, "loss": 2.0}, {"step": 5, "validation_loss": 3.0}])
    assert (run.at(5), run.at(5, "loss")) == (3.0, 2.0)
    assert verdict(claim(accept=(-math.inf, math.inf)), [run.at(6)]) == "FAIL"


PAPER = """from nanojaxgpt.config import base_config
from nanojaxgpt.papers.paper import Arm, Claim, Paper
from nanojaxgpt.sweep.space import choice, zip_

def get_paper():
    arms = (Arm("plain", base_config()),)
    claims = (Claim("loss", 1.0, "here", lambda run: 1.0, accept=(0, 1), arms=("plain",)),)
    return Paper("A paper", claims, arms)
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (", accept=(0, 1)", "", r"'loss' has no criterion; add accept=\(low, high\)"),
        ("accept=(0, 1)", "accept=(1, 0)", "accepts nothing"),
        ('arms=("plain",)', 'arms=("plane",)', "no arm plane; did you mean plain"),
        ('"here"', '""', "has no source"),
        ("base_config())", "base_config(), ())", "'plain' has no seeds"),
        (", claims,", ", (),", "add a Claim"),
        ("get_paper", "paper", "has no function get_paper"),
        ('Paper("A paper", claims, arms)', "claims", "a tuple, not a Paper"),
        ("base_config()", "base_config().modle", "modle"),
        (
            "base_config())",
            "base_config(), space=choice('optim.rate', 1))",
            "no config field optim.rate",
        ),
        ("base_config())", "base_config(), space=choice('train.seed', 1))", "by seeds="),
        ("base_config())", "base_config(), space=choice('optim.eps'))", "has an empty space"),
    ],
)
def test_a_paper_that_can_not_be_judged_is_refused(tmp_path, old, new, words):
    path = tmp_path / "paper.py"
    path.write_text(PAPER)
    load_paper(str(path))
    assert old in PAPER
    path.write_text(PAPER.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        load_paper(str(path))


def test_the_recipe_can_not_be_changed_from_outside(tmp_path):
    path = tmp_path / "paper.py"
    path.write_text(PAPER)
    arm = load_paper(str(path), {"data.source": "text:other.txt"}).arms[0]
    assert arm.config.data.source == "text:other.txt"
    with pytest.raises(ConfigError, match=r"train\.num_steps is part of the recipe"):
        load_paper(str(path), {"train.num_steps": "3"})


@pytest.fixture
def tiny(small_config, monkeypatch):
    """Return a paper of one arm and two seeds: a claim that holds, and one that must not."""
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    small = {
        "model.num_layers": "1",
        "model.mlp": "none",
        "checkpoint.every_steps": "0",
        "eval.every_steps": "5",
    }
    cfg = small_config(**small, **{"train.num_steps": "10"})
    loss = Claim("loss", 2.9, "here", lambda run: run.at(10), (0, 3.5), ("plain",))
    wrong = replace(loss, name="impossible loss", accept=(-2.0, -1.0))
    return Paper("A tiny paper", (loss, wrong, claim(name="exact")), (Arm("plain", cfg, (3, 4)),))


@pytest.mark.slow
def test_a_reproduction_that_was_stopped_goes_on(tiny, tmp_path):
    said = []

    def stop_at_the_second(text):
        said.append(text)
        if "plain-3 finished" in text:
            raise Stopped("a signal", 75)

    with pytest.raises(Stopped):
        reproduce(tiny, tmp_path / "out", stop_at_the_second)
    runs = tmp_path / "out" / "trials"
    first = (runs / "plain-3" / "metrics.jsonl").read_bytes()
    assert not (runs / "plain-4").exists()
    found = reproduce(tiny, tmp_path / "out", said.append)
    assert [sum(f"plain-{seed} finished" in text for text in said) for seed in (3, 4)] == [1, 1]
    assert (runs / "plain-3" / "metrics.jsonl").read_bytes() == first
    assert [result.verdict for result in found.results] == ["PASS", "FAIL", "PASS"]
    assert [run.cfg.train.seed for run in found.runs["plain"]] == [3, 4]
    losses = found.results[0].measured
    assert set(losses) == {3, 4}
    assert losses[3] != losses[4]
    assert found.results[0].spread == pytest.approx(abs(losses[3] - losses[4]) / math.sqrt(2))

    path = save_report(found, tmp_path / "out", "nanojaxgpt reproduce tiny.py")
    text, report = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "2 PASS, 1 FAIL" in text
    assert "Scaled down" not in text
    assert [entry["verdict"] for entry in report["claims"]] == ["PASS", "FAIL", "PASS"]
    assert report["claims"][0]["measured"] == {str(seed): loss for seed, loss in losses.items()}
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_without_matplotlib_nothing_is_trained(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"a report has figures: .*'nanojaxgpt\[plots\]'"):
        reproduce(tiny, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_arms_share_programs_and_one_that_diverges_is_kept(tiny, tmp_path, monkeypatch):
    opened, open_job = [], run.open_job
    monkeypatch.setattr(
        run, "open_job", lambda cfg, **rest: opened.append(1) or open_job(cfg, **rest)
    )
    cfg, rates = tiny.arms[0].config, choice("optim.learning_rate", 1e-3, 1e30)
    rates = zip_(rates, choice("optim.weight_decay", 0.1, 1e30))  # whose update overflows
    other = override_config(cfg, {"optim.beta1": "0.5"})
    ends = claim(measure=lambda runs: sum(r.diverged for r in runs), arms=("swept",), accept=(1, 1))
    losses = claim(measure=lambda run: run.at(10), arms=("other",), accept=(0, 9))
    arms = (Arm("swept", cfg, (3, 4), rates), Arm("other", other, (3, 4)))
    seen = []
    plots = (Plot("rates.png", "loss by rate", lambda *given: seen.append(given), ("swept",)),)
    paper = Paper("Rates", (ends, losses), arms, plots=plots)
    found = reproduce(paper, tmp_path / "out", lambda _: None)
    assert len(opened) == 1
    assert found.results[0].measured == {3: 1, 4: 1}
    assert [result.verdict for result in found.results] == ["PASS", "PASS"]
    paths = [[run.path.name for run in runs] for runs in found.runs["swept"]]
    assert paths[0] == [
        "swept-learning_rate=0.001-weight_decay=0.1-3",
        "swept-learning_rate=1e+30-weight_decay=1e+30-3",
    ]
    again = reproduce(paper, tmp_path / "out", lambda _: None)
    assert len(opened) == 1  # not even the one that diverged is trained again
    assert [result.measured for result in again.results] == [r.measured for r in found.results]
    text = save_report(again, tmp_path / "out", "").read_text()
    assert "![loss by rate](rates.png)" in text
    assert len(seen[0][1]) == 2  # seeds, a list of points each
    assert [run.cfg.optim.learning_rate for run in seen[0][1][0]] == [1e-3, 1e30]


@pytest.mark.slow
def test_the_wsd_papers_cooldowns_branch_from_its_constant_runs(tiny, tmp_path, monkeypatch):
    """The paper's file with a small model and twenty steps, one seed, without the cosine."""
    wsd = load_module(str(ROOT / "experiments" / "papers" / "wsd.py"))
    numbers = dict(NUM_STEPS=20, LENGTHS=(10, 20), RATES=(1e-3, 2e-3), WARMUP=2)
    for name, value in numbers.items():
        monkeypatch.setattr(wsd, name, value)
    small = {
        f"{section}.{name}": str(value)
        for section in ("data", "model", "mesh")
        for name, value in tiny.arms[0].config[section].items()
    }
    small |= {"train.batch_size": "8", "eval.num_batches": "1", "eval.batch_size": "8"}
    paper = first_seeds(wsd.get_paper(), 1)
    arms = [replace(a, config=override_config(a.config, small)) for a in paper.arms[1:]]
    paper = replace(paper, claims=paper.claims[2:], arms=tuple(arms), tokens="")
    assert paper_problems(paper) == []
    found, said = reproduce(paper, tmp_path, lambda _: None), []
    assert [result.mean for result in found.results[:2]] == [0, 0]
    assert math.isfinite(found.results[2].mean)
    (branched,), (constant,) = found.runs["branched"], found.runs["constant"]
    assert [run.cfg.init.step for run in branched] == [8, 16, 8, 16]
    origins = [run.cfg.init.from_run for run in branched]
    assert origins == [str(run.path) for run in constant for _ in range(2)]
    assert [min(r["step"] for r in run.records if "loss" in r) for run in branched] == [
        10, 20, 10, 20
    ]  # fmt: skip
    again = reproduce(paper, tmp_path, said.append)
    assert [result.measured for result in again.results] == [r.measured for r in found.results]
    assert not any("finished" in line for line in said)


@pytest.mark.slow
def test_a_claim_about_fine_tuning(tiny, tmp_path):
    """Adapters of the trained runs: one step from its loss, where one step from scratch is not."""
    (plain,), last = tiny.arms, 40
    more = {
        "train.num_steps": str(last),
        "optim.learning_rate": "0.01",
        "train.log_every_steps": "1",
    }
    plain = replace(plain, config=override_config(plain.config, more))
    tuned = {
        "init.from_run": "plain",
        "init.step": str(last),
        "lora.rank": "2",
        "train.num_steps": "1",
    }
    arms = (
        plain,
        replace(plain, name="tuned", config=override_config(plain.config, tuned),
                branch_of="plain", tunes=True),
    )  # fmt: skip

    def gap(before, after):
        return abs(before.at(last, "loss") - after.at(1, "loss"))

    claims = (claim(measure=gap, accept=(0, 0.2), arms=("plain", "tuned"), every_seed=True),)
    paper = replace(tiny, arms=arms, claims=claims)
    assert paper_problems(paper) == []
    found = reproduce(paper, tmp_path, lambda _: None)
    assert [result.verdict for result in found.results] == ["PASS"]
    for base, after in zip(found.runs["plain"], found.runs["tuned"], strict=True):
        assert (after.cfg.init.from_run, after.cfg.init.state) == (str(base.path), "params")
        assert after.at(1, "loss") < base.at(1, "loss") - 0.2
    again = reproduce(paper, tmp_path, lambda _: None)
    assert again.results[0].measured == found.results[0].measured


def test_an_arm_that_tunes_may_have_a_corpus_of_its_own(tiny, tmp_path):
    """What it needs is known once its base, whose tokenizer it has, was trained."""
    (plain,) = (replace(arm, seeds=(3,)) for arm in tiny.arms)
    tuned = {"init.from_run": "plain", "init.step": "10", "train.num_steps": "1"}
    cfg = override_config(plain.config, tuned)
    arms = (
        plain,
        Arm("absent", override_config(cfg, {"data.source": f"text:{tmp_path}/absent.txt"}), (3,),
            branch_of="plain", tunes=True),
        Arm("other", cfg, (3,), branch_of="plain", tunes=True, tokens="0123456789abcdef"),
    )  # fmt: skip
    claims = [tiny.claims[0]]
    claims += [claim(measure=lambda run: 1.0, arms=(arm.name,)) for arm in arms[1:]]
    found = reproduce(replace(tiny, arms=arms, claims=tuple(claims)), tmp_path, lambda _: None)
    assert [result.verdict for result in found.results] == ["PASS", "NOT-RUN", "NOT-RUN"]
    assert "absent.txt" in found.results[1].reason
    assert "its tokens are not those of hash 0123456789abcdef" in found.results[2].reason
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["plain-3"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"branch_of": "plane"}, "no arm plane; did you mean plain"),
        ({"seeds": (3, 5)}, "has seeds that 'plain' does not have"),
        ({"space": choice("init.step", 4, 5)}, "init.step=4, and 'plain' keeps no checkpoint"),
        ({"space": choice("init.step", 0)}, "init.step=0, and 'plain' keeps no checkpoint"),
    ],
)
def test_a_branch_of_what_is_not_there_is_refused(changes, words, tiny):
    kept = {"checkpoint.every_steps": "5", "checkpoint.keep_every_steps": "5"}
    plain = replace(tiny.arms[0], config=override_config(tiny.arms[0].config, kept))
    branch = Arm("branch", plain.config, (3,), choice("init.step", 5, 10), branch_of="plain")
    about = claim(arms=("branch",), measure=lambda runs: 1.0)
    arms = (plain, replace(branch, **changes))
    problems = paper_problems(replace(tiny, arms=arms, claims=(tiny.claims[0], about)))
    assert words in "".join(problems)
    assert bool(problems) == bool(words)


@pytest.mark.slow
def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(tiny, tmp_path):
    paper = replace(tiny, arms=(replace(tiny.arms[0], seeds=(3,)),))
    reproduce(paper, tmp_path / "out", lambda _: None)
    other = override_config(tiny.arms[0].config, {"optim.learning_rate": "0.5"})
    changed = replace(paper, arms=(Arm("plain", other, (3,)),))
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.001 there, 0\.5 here"):
        reproduce(changed, tmp_path / "out", lambda _: None)


def test_what_needs_an_accelerator_is_not_run_on_a_cpu(tiny, tmp_path):
    found = reproduce(replace(tiny, needs="one GPU"), tmp_path / "out", lambda _: None)
    assert [result.verdict for result in found.results] == ["NOT-RUN", "NOT-RUN", "PASS"]
    assert found.results[0].reason == "it needs one GPU, and only a CPU is available"


def test_fewer_seeds_are_said_to_be_fewer(tiny):
    few = first_seeds(tiny, 1)
    assert few.arms[0].seeds == (3,)
    assert few.scaled_down == "Only 1 of the 2 seeds that the file states."
    assert first_seeds(tiny, 2) == first_seeds(tiny, 0) == tiny
    with pytest.raises(ConfigError, match="at least 1"):
        first_seeds(tiny, -1)


@pytest.mark.parametrize("substitute", [False, True])
def test_without_its_corpus_a_paper_is_not_run(tiny, tmp_path, substitute, small_config):
    cfg = tiny.arms[0].config
    if not substitute:
        cfg = small_config(**{"data.source": f"text:{tmp_path}/absent.txt"})
    paper = replace(tiny, arms=(Arm("plain", cfg, (3,)),), tokens="0123456789abcdef")
    found = reproduce(paper, tmp_path / "out", lambda _: None)
    assert [result.verdict for result in found.results] == ["NOT-RUN", "NOT-RUN", "PASS"]
    reason = "is not the corpus of this paper" if substitute else "absent.txt"
    assert reason in found.results[0].reason
    assert not (tmp_path / "out" / "trials").exists()
    text = "\n".join(to_markdown(found, ""))
    assert "1 PASS, 2 NOT-RUN" in text
    assert text.count(reason) == 1


def test_a_claim_over_two_arms_compares_runs_of_one_seed():
    def run(loss, seed):
        cfg = type("Cfg", (), {"train": type("Train", (), {"seed": seed})})
        return Run(ROOT, cfg, [{"step": 1, "validation_loss": loss}])

    runs = {"a": [run(3.0, 0), run(5.0, 1)], "b": [run(1.0, 0), run(1.5, 1)]}
    gap = claim(measure=lambda a, b: a.at(1) - b.at(1), accept=(2, 4), arms=("a", "b"))
    assert measure_claim(gap, runs, {}).measured == {0: 2.0, 1: 3.5}
    assert measure_claim(gap, runs, {"b": "no data"}).reason == "no data"


def test_curves_name_the_best_point_of_each_arm():
    def run(rate, seed, diverged=False):
        losses = [(1, 3.0 + seed), (2, abs(rate - 2) + seed + 1)]
        records = [{"step": step, "validation_loss": loss} for step, loss in losses]
        return Run(ROOT, base_config(), records, diverged)

    rates, seeds = (1.0, 2.0, 4.0), (0, 1, 2)
    swept = Arm("swept", base_config(), seeds, choice("optim.learning_rate", *rates))
    plain = Arm("plain", base_config(), seeds)
    runs = [[run(rate, seed, rate == 2.0 and seed == 1) for rate in rates] for seed in seeds]
    figure = Figure()
    draw_curves([swept, plain], figure, runs, [run(2.0, seed) for seed in seeds])
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["swept, learning_rate=1.0", "plain"]  # at 2.0 one seed diverged
    ends = [line.get_ydata()[-1] for line in axes.lines]
    assert ends == [3.0, 2.0, 4.0, 2.0]  # a line for each point: the means over three seeds
    assert len(axes.collections) == 2


def test_the_door_writes_a_report(tmp_path, capsys):
    path = tmp_path / "exact.py"
    path.write_text(
        "from nanojaxgpt.papers.paper import Claim, Paper\n"
        "def get_paper():\n"
        "    return Paper('Sums', (Claim('2 + 2', 4, 'school', lambda: 2 + 2, (4, 4)),))\n"
    )
    assert main(["reproduce", str(path), f"--dir={tmp_path}/out"]) == 0
    assert "| 2 + 2 | 4 [1] | 4 | 0 |  | 4 | PASS |" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curves.png").exists()
    assert main(["reproduce"]) == 2
    assert main(["reproduce", str(path), "--config.optim.beta1=0"]) == 2
    assert main(["reproduce", str(tmp_path / "absent.py")]) == 2


def test_papers_load_without_jax():
    lines = ["import sys", "from nanojaxgpt.papers.paper import load_paper"]
    lines += [f"load_paper({str(path)!r})" for path in PAPERS]
    lines += ["assert 'jax' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)
