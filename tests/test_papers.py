"""The papers' criteria: a prototype's figures pass, a feature that does nothing fails."""

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, SHARED

from nanojaxgpt import sharding
from nanojaxgpt.config import base_config, editable, load_module, override_config, typed
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.papers import scaling
from nanojaxgpt.papers.paper import Arm, Paper, Run
from nanojaxgpt.papers.reproduce import measure_claim, reproduce

FOLDER = ROOT / "experiments" / "papers"


def module(name: str):
    return load_module(str(FOLDER / f"{name}.py"))


def fake(arm: Arm, losses: list[list[float]]) -> list[list[Run]]:
    """Return the runs of an arm's seeds with these last losses; None has diverged."""
    rows = []
    for seed, row in zip(arm.seeds, losses, strict=True):
        trials = zip(arm.trials(seed), row, strict=True)
        rows.append([fake_run(trial, loss) for trial, loss in trials])
    return rows


def fake_run(trial, loss: float | None) -> Run:
    last = {"step": trial.cfg.train.num_steps, "loss": loss, "validation_loss": loss}
    return Run(
        ROOT / trial.name, editable(trial.cfg), [last] if loss else [], diverged=loss is None
    )


def verdicts(paper: Paper, runs: dict[str, list[list[Run]]]) -> str:
    """Return the first letter of each claim's verdict, of those about these runs."""
    claims = [claim for claim in paper.claims if claim.arms and set(claim.arms) <= runs.keys()]
    return "".join(measure_claim(claim, runs, {}).verdict[0] for claim in claims)


@pytest.fixture
def qk(monkeypatch):
    """Return (paper, its prototype's losses by arm) with logits that grow with the loss."""
    found = module("lr_sensitivity_qknorm")
    logits = dict(plain=[10, 15, 25, 55, 584, 20381, 686522], qk_norm=[4, 5, 6, 11, 18, 27, 62])
    monkeypatch.setattr("nanojaxgpt.papers.reproduce.initial_loss", lambda run: 4.2)
    monkeypatch.setattr(
        found,
        "largest_logit",
        lambda run: logits[run.path.name.split("-")[0]][
            found.RATES.index(run.cfg.optim.learning_rate)
        ],
    )
    plain = [2.522, 2.209, 2.017, 1.942, 2.038, 2.501, 2.927]
    normed = [2.546, 2.267, 2.054, 1.944, 1.959, 2.011, 2.107]
    return found, plain, normed


def test_qk_norm_that_does_nothing_fails(qk):
    found, plain, normed = qk
    paper = found.get_paper()

    def judged(first, second):
        runs = {
            arm.name: fake(arm, [row])
            for arm, row in zip(paper.arms, (first, second), strict=False)
        }
        return verdicts(paper, runs)

    assert judged(plain, normed) == "PPPPPP"
    assert judged(plain, plain) == "PFFPPF"  # both bad
    assert judged(normed, normed) == "PFFPPF"  # both good
    assert judged([*plain[:5], None, None], normed) == "PPPPPP"
    runs = fake(paper.arms[0], [[*plain[:5], None, None]])[0]
    assert found.sensitivity(runs) == pytest.approx((sum(plain[:5]) + 8.4) / 7 - 1.942)


MUP = {  # best learning rates of a prototype: 2^-7 at the base, then halved or not
    "standard": (-7, -8, -9, -10),
    "mup": (-7, -8, -7, -7),
}


def valleys(paper: Paper, best: dict[str, tuple[int, ...]], fall: float) -> dict:
    """Return runs whose losses have their minimum at 2^best, lower by `fall` a width."""
    runs = {}
    for arm in paper.arms[:2]:
        losses = [
            3 + 0.1 * (power - low) ** 2 - fall * place
            for place, low in enumerate(best[arm.name])
            for power in range(-10, -3)
        ]
        runs[arm.name] = fake(arm, [losses])
    return runs


def test_mup_that_does_nothing_fails(monkeypatch):
    found = module("mup_transfer")
    paper = found.get_paper()
    slopes = {"mup": [0.01, -0.04, -0.01, 0.0], "standard": [0.45, 0.29, 0.52, 0.37]}
    monkeypatch.setattr(found, "slopes", lambda cfg: slopes)
    assert verdicts(paper, valleys(paper, MUP, 0.2)) == "PPPPPP"
    ignored = MUP | {"mup": MUP["standard"]}
    assert verdicts(paper, valleys(paper, ignored, 0.2)) == "PPFPPF"
    both = MUP | {"standard": MUP["mup"]}
    assert verdicts(paper, valleys(paper, both, 0.2)) == "PPPFFP"
    assert verdicts(paper, valleys(paper, MUP, -0.1)) == "PPPPPF"
    slopes["mup"] = slopes["standard"]
    assert verdicts(paper, valleys(paper, MUP, 0.2)) == "FPPPPP"


def test_wsd_without_its_cooldown_fails():
    paper = module("wsd").get_paper()

    def judged(**best):
        arms = {arm.name: arm for arm in paper.arms}
        runs = {name: fake(arms[name], [[9, loss, 9]] * 3) for name, loss in best.items()}
        for name in runs:
            before = 2.3 if name == "cosine" else 2.4
            for run in (run for row in runs[name] for run in row):
                run.records.append({"step": 400, "validation_loss": before})
        return verdicts(paper, runs)

    assert judged(cosine=2.172, constant=2.21, wsd=2.122) == "PPP"
    assert judged(cosine=2.172, constant=2.21, wsd=2.21) == "FFP"


def test_branched_cooldowns_that_are_none_fail():
    paper = module("wsd").get_paper()
    constant, wsd, branched = paper.arms[1:]

    def judged(losses, whole=2.122):
        """Return the verdicts on losses of 200, 300 and 500 steps, at the middle rate."""
        runs = {
            "constant": fake(constant, [[9, 2.21, 9]] * 3),
            "wsd": fake(wsd, [[9, whole, 9]] * 3),
            "branched": fake(branched, [[9, 9, 9, *losses, 9, 9, 9]] * 3),
        }
        for row in runs["constant"]:
            for index, run in enumerate(row):
                at_200, at_300 = (2.6, 2.4) if index == 1 else (9, 9)
                run.records.append({"step": 200, "validation_loss": at_200})
                run.records.append({"step": 300, "validation_loss": at_300})
        return verdicts(replace(paper, claims=paper.claims[3:]), runs)

    assert judged([2.5, 2.3, 2.122]) == "PP"
    assert judged([2.5, 2.41, 2.122]) == "PF"
    assert judged([2.5, 2.3, 2.15]) == "FP"
    assert judged([None, 2.3, 2.122]) == "PF"


def test_muon_that_is_adam_fails():
    paper = module("muon_vs_adamw").get_paper()

    def judged(adamw, muon):
        rows = {"adamw": adamw, "muon": muon}
        return verdicts(paper, {a.name: fake(a, [rows[a.name]] * 3) for a in paper.arms})

    adamw = [2.259, 2.171, 2.172, 2.3]
    assert judged(adamw, [1.979, 1.9, 1.87, 1.95]) == "PPP"
    assert judged(adamw, adamw) == "FPP"
    assert judged(adamw, [1.979, 1.9, 1.87, 1.86]) == "PPF"


def test_lora_that_is_full_fine_tuning_fails(monkeypatch):
    found = module("lora_forgets_less")
    paper = found.get_paper()
    arms = {arm.name: arm for arm in paper.arms}
    assert found.RATES == (1e-3, 3e-3, 1e-2, 3e-2)

    def judged(rank=25.0, **rows):
        """Return the verdicts on (losses in German by the rates, that in English at the best)."""
        english = {name: kept for name, (_, kept) in rows.items()} | {"base": 1.4}
        losses = {name: german for name, (german, _) in rows.items()} | {"base": [1.4]}
        runs = {name: fake(arms[name], [losses[name]] * 2) for name in english}
        runs["base"] = [row[0] for row in runs["base"]]

        def kept(base, run):
            run = found.best(run) if isinstance(run, list) else run
            return english[run.path.name.split("-")[0]]

        monkeypatch.setattr(found, "kept", kept)
        monkeypatch.setattr(
            found, "change_rank", lambda base, runs: 6.0 if runs[0].cfg.lora.rank else rank
        )
        return verdicts(paper, runs)

    full, high = ([1.65, 1.6, 1.7, 9], 3.0), ([9, 1.75, 1.7, 1.72], 2.8)
    low = ([9, 1.9, 1.82, 1.8], 2.5)
    assert judged(full=full, rank_8=high, rank_2=low) == "PPPPPPPP"
    assert judged(full=full, rank_8=full, rank_2=full) == "FPPFPPPF"
    assert judged(full=full, rank_8=low, rank_2=high) == "PFPPFPPP"
    assert judged(full=low, rank_8=high, rank_2=full) == "FFPFFPPF"
    diverged = ([1.65, 1.6, None, None], 1.5)
    assert judged(full=diverged, rank_8=high, rank_2=low, rank=15.0) == "PPFFFFPP"


def test_the_rank_of_a_change(monkeypatch):
    """Three equal singular values in every kernel, whichever dimension a layer sums over."""
    found = module("lora_forgets_less")
    cfg = complete(typed(override_config(base_config(), {"model.vocab_size": "7"})))
    rng, run = np.random.default_rng(0), Run(ROOT / "base-0", base_config(), [])
    tuned = replace(run, path=ROOT / "full-0")
    before: dict = {"layers": {}}
    after: dict = {"layers": {}}
    for row in parameters(cfg.model).values():
        if row.kind == "kernel":
            inputs = math.prod(row.shape[axis] for axis in row.summed)
            outputs = math.prod(row.shape) // inputs
            u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (inputs, outputs))
            outer = [axis for axis in range(len(row.shape)) if axis not in row.summed]
            order = [*row.summed, *outer]
            change = (u @ v.T).reshape([row.shape[axis] for axis in order])
            change = np.transpose(change, np.argsort(order))
            before["layers"][row.name] = rng.normal(size=(row.layers, *row.shape))
            after["layers"][row.name] = before["layers"][row.name] + change
    monkeypatch.setattr(found, "base_job", lambda base: SimpleNamespace(cfg=cfg))
    monkeypatch.setattr(found, "merged", lambda base, path: before if path == base else after)
    assert len(before["layers"]) == 6
    assert found.change_rank(run, [tuned]) == 3


@pytest.mark.slow
def test_mup_at_its_base_is_the_standard_model_until_a_multiplier_is_ignored(
    small_config, tmp_path, monkeypatch
):
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one_device)
    claim = module("mup_transfer").get_paper().claims[-1]
    small = {"model.num_layers": "1", "model.mlp": "none", "train.num_steps": "4"}
    cfg = small_config(**small)
    mup = override_config(cfg, {"model.mup_base_dim": "16", "model.attention_scale": f"{8**-0.5}"})
    wider = override_config(mup, {"model.mup_base_dim": "8"})
    for other, verdict in ((mup, "PASS"), (wider, "FAIL")):
        arms = (Arm("mup_at_base", other), Arm("standard_at_base", cfg))
        result = reproduce(Paper("", (claim,), arms), tmp_path / verdict, lambda _: None).results[0]
        assert result.verdict == verdict


@pytest.mark.slow
def test_chinchilla_without_its_tokens_fails(monkeypatch):
    points = SHARED / "data" / "chinchilla_points.csv"
    if not points.exists():
        pytest.skip(f"needs the points of Besiroglu et al. at {points}")
    monkeypatch.setenv("CHINCHILLA_POINTS", str(points))

    def judged():
        found = module("chinchilla_refit")
        monkeypatch.setattr(found, "SAMPLES", 50)
        monkeypatch.setattr(found, "DRAWS", 3)
        return "".join(
            measure_claim(claim, {}, {}).verdict[0] for claim in found.get_paper().claims
        )

    assert judged() == "P" * 12
    right = scaling.objective

    def blind(vector, points):
        return right(vector, points._replace(tokens=np.full_like(points.tokens, 1e11)))

    monkeypatch.setattr(scaling, "objective", blind)
    assert judged().count("F") >= 6


@pytest.mark.slow
def test_chinchilla_without_its_points_runs_the_synthetic_claim(tmp_path, monkeypatch):
    monkeypatch.setenv("CHINCHILLA_POINTS", str(tmp_path / "absent.csv"))
    found = module("chinchilla_refit")
    monkeypatch.setattr(found, "SAMPLES", 50)
    monkeypatch.setattr(found, "DRAWS", 3)
    result = reproduce(found.get_paper(), tmp_path / "out", lambda _: None)
    verdicts = [r.verdict for r in result.results]
    assert verdicts == ["NOT-RUN"] * 10 + ["PASS"] * 2
    assert "CHINCHILLA_POINTS" in result.results[0].reason
