"""Sweeps: the algebra, the plan's checks, one compile with the bits of runs alone, the report."""

import dataclasses
import json
import re
import signal

import jax
import numpy as np
import pytest
from conftest import ROOT, write_tiny, write_trial

from nanojaxgpt import checkpoint, config, rundir, sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import ConfigError, NonFiniteError, Stopped
from nanojaxgpt.hosts import process
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import complete
from nanojaxgpt.recorder import Job
from nanojaxgpt.step import make_hyper
from nanojaxgpt.sweep import run, together
from nanojaxgpt.sweep.claims import read_outcome, run_path
from nanojaxgpt.sweep.plan import (
    group_trials,
    load_trials,
    program_key,
)
from nanojaxgpt.sweep.run import run_trials
from nanojaxgpt.sweep.space import (
    chain,
    choice,
    draws,
    fixed,
    log_uniform,
    product,
    uniform,
    zip_,
)
from nanojaxgpt.training import fit, make_job, share_job

RATE, SEED = "optim.learning_rate", "train.seed"


@pytest.fixture(autouse=True)
def own_allocator(monkeypatch):
    """Keep the settings of this process's allocator."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)


@pytest.fixture
def one_device(monkeypatch):
    patch_mesh(monkeypatch)


def patch_mesh(monkeypatch):
    """Let every mesh be of one device."""
    make_mesh = sharding.make_mesh
    alone = lambda *_: make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", alone)


@pytest.fixture(scope="module")
def write_experiment(tmp_path_factory):
    """Return a function that writes an experiment with this `sweep()` and gives its path."""
    folder = tmp_path_factory.mktemp("sweep")

    def write(space: str):
        path = write_tiny(
            folder,
            """
            train.num_steps = 6
            cfg.eval.every_steps, cfg.eval.num_batches = 3, 2
            cfg.optim.warmup_steps = 2
            """,
            f"def sweep():\n    return {space}\n",
        )
        return str(path)

    return write


def test_the_algebra_lists_points_in_order():
    assert choice("a.b", 1, 2).points() == [{"a.b": 1}, {"a.b": 2}]
    assert fixed("a.b", 1).points() == [{"a.b": 1}]
    both = product(choice("a.b", 1, 2), choice("c.d", "x", "y", "z"))
    assert len(both.points()) == 6
    assert both.points()[:4] == [
        {"a.b": 1, "c.d": "x"}, {"a.b": 1, "c.d": "y"}, {"a.b": 1, "c.d": "z"},
        {"a.b": 2, "c.d": "x"},
    ]  # fmt: skip
    paired = zip_(choice("a.b", 1, 2), choice("c.d", 3, 4))
    assert paired.points() == [{"a.b": 1, "c.d": 3}, {"a.b": 2, "c.d": 4}]
    assert chain(paired, fixed("e.f", 0)).points() == [*paired.points(), {"e.f": 0}]
    assert product().points() == chain().points() == zip_().points() == choice("a.b").points() == []
    values = [point["a.b"] for point in uniform("a.b", 0.0, 1.0, 5).points()]
    assert values == [0, 0.25, 0.5, 0.75, 1]
    values = [point["a.b"] for point in log_uniform("a.b", 1e-4, 1e-1, 4).points()]
    assert values == [1e-4, 1e-3, 1e-2, 1e-1]
    assert [p["a.b"] for p in uniform("a.b", 1, 4, 4, whole=True).points()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (lambda: product(choice("a.b", 1), choice("a.b", 2)).points(), "sets a.b twice"),
        (lambda: zip_(choice("a.b", 1), choice("c.d", 1, 2)).points(), r"sizes: \[1, 2\]"),
        (lambda: uniform("a.b", 0.0, 1.0).points(), "a continuous range"),
        (lambda: uniform("a.b", 1.0, 1.0), "must be below high"),
        (lambda: log_uniform("a.b", 0.0, 1.0), "must be above 0"),
        (lambda: draws(choice("a.b"), 3), "empty space"),
        (lambda: draws(choice("a.b", 1), 0), "draws of 0 points"),
        (lambda: product(*[choice("a", *range(1000))] * 3).points(), "1,000,000,000 points"),
        (lambda: chain(*[choice("a", *range(10**5))] * 2).points(), "random search, draws"),
        (lambda: uniform("a", 0.0, 1.0, 10**9).points(), "more than 100,000"),
        (lambda: draws(choice("a", 1), 10**9), "more than 100,000"),
    ],
)  # fmt: skip
def test_spaces_that_are_none(space, words):
    with pytest.raises(ConfigError, match=words):
        space()


def test_draws_are_the_seeds_and_stay_inside():
    space = chain(
        product(log_uniform("a.b", 1e-4, 1e-1), uniform("c.d", 3, 9, whole=True)),
        zip_(choice("a.b", 1, 2), choice("c.d", 1, 2)),
    )
    points = draws(space, 50, seed=1).points()
    assert points == draws(space, 50, seed=1).points() != draws(space, 50, seed=2).points()
    drawn = [point for point in points if point["a.b"] < 1]
    assert 0 < len(drawn) < 50
    assert all(1e-4 <= p["a.b"] <= 1e-1 and p["c.d"] in range(3, 10) for p in drawn)
    assert np.median([p["a.b"] for p in drawn]) < 0.02  # of evenly spaced ones it would be 0.05


def test_equal_points_are_one_trial_with_the_hash_of_its_config(write_experiment):
    path = write_experiment(f"chain(choice('{RATE}', 1, 1.0, 2e-3), fixed('{SEED}', 0))")
    trials = load_trials(path, {})
    assert [trial.point for trial in trials] == [{RATE: 1.0}, {RATE: 2e-3}, {SEED: 0}]
    assert [trial.name for trial in trials] == [config.config_hash(t.cfg) for t in trials]
    assert trials[0].cfg.optim.learning_rate == 1.0


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("choice('optim.lerning_rate', 1)", "point 1 .*did you mean optim.learning_rate"),
        (f"choice('{RATE}', 1e-3, -1)", "point 2 .*learning_rate=-1.0 must be at least 0"),
        ("choice('model.num_heads', 2, 3)", r"point 2 \(num_heads=3\): model.embed_dim=16 is not"),
        ("choice('train.num_steps', 2.5)", "is a number, not an integer"),
        ("choice('model.embed_dim')", "is an empty space"),
        ("[1, 2]", "returns a list, not a Space"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("product(fixed('a.b', 1), fixed('a.b', 1))", "sets a.b twice"),
    ],
)
@pytest.mark.parametrize("action", ["plan", "run"])
def test_bad_sweeps_exit_2_and_name_the_point(write_experiment, space, words, action, capsys):
    assert main(["sweep", action, f"--config={write_experiment(space)}"]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert re.search(words, error), error


def test_other_mistakes_at_the_door_exit_2(write_experiment, capsys, tmp_path):
    path = write_experiment(f"choice('{RATE}', 1e-3, 2e-3)")
    for arguments, words in (
        (["plna", f"--config={path}"], "did you mean plan?"),
        (["plan"], "needs --config"),
        (["plan", f"--config={ROOT}/experiments/gpt2.py"], "has no function sweep()"),
        (["plan", f"--config={path}", f"--config.{RATE}=1"], "set on the command line"),
        (["report", f"--config={path}", f"--dir={tmp_path}"], "no trial in"),
    ):
        assert main(["sweep", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_what_shares_its_programs_is_what_make_hyper_traces(small_config):
    base = config.typed(small_config())

    def changed(name: str, value):
        """Return the config with a value that it may not have."""
        section, field = name.split(".")
        part = dataclasses.replace(getattr(base, section), **{field: value})
        return dataclasses.replace(base, **{section: part})

    other = {int: lambda x: x + 1, float: lambda x: x / 2 + 0.25, str: lambda x: x + "x"}
    seen = {True: 0, False: 0}
    for name, value in config.fields(base):
        if type(value) not in other:
            continue
        cfg = changed(name, other[type(value)](value))
        traced = not isinstance(value, str) and make_hyper(cfg) != make_hyper(base)
        unseen = name.split(".")[0] in ("sample", "checkpoint", "init") or name in (
            "eval.every_steps", "eval.tasks_every_steps", "train.log_every_steps",
            "train.gc_every_steps", "objective.reward_seconds",
        )  # fmt: skip
        starts = ("init.from_run", "init.from_model")  # whose tokenizer may be the data's
        unseen = unseen and name not in starts
        # Whether there is an average or a KL term is compiled, its number is not.
        if name in ("optim.ema_decay", "objective.kl"):
            longer = changed(name, 0.9)
            assert program_key(base) != program_key(cfg) == program_key(longer)
            continue
        assert (program_key(cfg) == program_key(base)) == (traced or unseen), name
        seen[traced] += 1
    assert seen[True] > 8 < seen[False]


def test_rates_by_path_share_their_programs_where_their_patterns_are_the_same(small_config):
    def key(entries):
        return program_key(small_config(**{"optim.rate_multipliers": repr(entries)}))

    assert key(("embed_=0.5", "q_D=0")) == key(("embed_=2", "q_D=1"))
    assert len({key(()), key(("embed_=1",)), key(("q_D=1",)), key(("embed_=1", "q_D=1"))}) == 4


def test_the_plan_counts_trials_programs_parameters_and_flops(write_experiment, capsys):
    path = write_experiment(
        f"product(choice('model.num_layers', 1, 2), choice('{RATE}', 1e-3, 2e-3))"
    )
    trials = load_trials(path, {})
    assert [len(group) for group in group_trials(trials)] == [2, 2]
    assert main(["sweep", "plan", f"--config={path}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("4 trials in 2 programs, ")
    assert "program 1: 2 trials, 3," in out or "program 1: 2 trials, 4," in out
    assert all(trial.name in out for trial in trials)


def leaves(path) -> dict[str, np.ndarray]:
    """Return the arrays of a run's newest checkpoint by their paths."""
    cfg = complete(rundir.read_config(path))
    job = make_job(cfg, prepare_data(cfg, print), sharding.make_mesh(cfg.mesh.given()))
    wanted = {"params": job.abstract.params, "opt_state": job.abstract.opt_state}
    step, items = checkpoint.restore(path / "checkpoints", wanted)
    assert step == cfg.train.num_steps
    found = jax.tree_util.tree_leaves_with_path(items)
    return {checkpoint.path_name(path): np.asarray(leaf) for path, leaf in found}


def numbers(path) -> list[dict[str, float]]:
    """Return a run's records without how fast it was."""
    drop = ("tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in drop} for r in read_metrics(path)]


SPACE = (
    f"zip_(choice('{RATE}', 1e-3, 1e-2, 1e25), choice('optim.beta2', 0.9, 0.95, 0.9), "
    f"choice('{SEED}', 0, 1, 0), choice('train.num_steps', 6, 5, 6), "
    "choice('train.z_loss', 0.0, 1e-3, 0.0), choice('optim.warmup_steps', 1, 3, 0), "
    "choice('model.logit_multiplier', 1.0, 0.7, 1.0), choice('init.scale', 1.0, 1.5, 1.0), "
    "choice('model.embed_multiplier', 1.0, 3.0, 1.0), "
    "choice('model.attention_multiplier', 1.0, 0.3, 1.0), "
    "choice('optim.rate_multipliers', ('embed_=1',), ('embed_=0.3',), ('embed_=1',)))"
)


@pytest.fixture(scope="module")
def trials(write_experiment):
    """Return three trials that share one program; the last becomes non-finite."""
    found = load_trials(write_experiment(SPACE), {})
    assert len(group_trials(found)) == 1
    return found


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def mapped(trials, tmp_path_factory):
    """Return the folder of these trials run by map, and what was said."""
    folder, lines = tmp_path_factory.mktemp("mapped"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_mesh(monkeypatch)
        run_trials(folder, trials, "", 16, lines.append)
    return folder, [line for line in lines if "/3 " in line]


def test_map_has_the_bits_of_the_runs_alone(trials, mapped, tmp_path, one_device, capsys):
    folder, lines = mapped
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    first, second = (run_path(folder, trial.name) for trial in trials[:2])
    fit(trials[1].cfg, tmp_path / "alone", report=quiet)
    assert numbers(second) == numbers(tmp_path / "alone") != numbers(first)
    ours, theirs = leaves(second), leaves(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name])
    assert read_outcome(folder, trials[1].name)["state"] == "finished"
    parts = {path.name for path in second.iterdir()}
    assert {"config.json", "identity.json", "metrics.jsonl", "checkpoints", "tokenizer"} <= parts
    capsys.readouterr()
    assert main(["eval", str(second)]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == numbers(second)[-1]["validation_loss"]


def test_what_is_done_is_not_done_again(trials, mapped):
    lines = []
    run_trials(mapped[0], trials, "", 16, lines.append)
    assert lines == []


def assert_agrees(trials, mapped, folder) -> None:
    """Compare what trials left with the runs of the first, 1e-4 apart; the third is non-finite."""
    for trial in trials[:2]:
        one, other = (run_path(place, trial.name) for place in (mapped[0], folder))
        assert [sorted(r) for r in numbers(one)] == [sorted(r) for r in numbers(other)]
        for left, right in zip(numbers(one), numbers(other), strict=True):
            np.testing.assert_allclose([*left.values()], [*right.values()], rtol=1e-4)
        assert read_outcome(folder, trial.name)["state"] == "finished"
    outcomes = [read_outcome(place, trials[2].name) for place in (mapped[0], folder)]
    assert [outcome["state"] for outcome in outcomes] == ["non-finite"] * 2
    step = [outcome["message"].split(":")[0] for outcome in outcomes]
    assert step[0] == step[1]


@pytest.mark.slow
def test_vmap_agrees_to_rounding_and_freezes_what_is_not_finite(
    trials, mapped, tmp_path, one_device
):
    run_trials(tmp_path, trials, "vmap", 16, quiet)
    assert_agrees(trials, mapped, tmp_path)
    for trial in trials[:2]:
        ours, theirs = (leaves(run_path(place, trial.name)) for place in (mapped[0], tmp_path))
        for name, leaf in ours.items():
            np.testing.assert_allclose(leaf, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_vmap_that_is_stopped_goes_on(trials, mapped, tmp_path, monkeypatch):
    read, steps = together.Follower.read, {trial.name: [] for trial in trials}

    def stops(self, step, *rest):
        steps[self.run.name].append(step)
        if step == 3 and self.run.name == trials[0].name:
            signal.raise_signal(signal.SIGTERM)
        read(self, step, *rest)

    monkeypatch.setattr(together.Follower, "read", stops)
    with pytest.raises(Stopped, match="saved what was trained together"):
        run_trials(tmp_path, trials, "vmap", 16, quiet)
    assert not any(read_outcome(tmp_path, trial.name) for trial in trials)
    first = [steps[trial.name].copy() for trial in trials]
    assert first[0] == first[1] == [1, 2, 3, 4]
    run_trials(tmp_path, trials, "vmap", 16, quiet)
    assert_agrees(trials, mapped, tmp_path)
    assert [steps[trial.name] for trial in trials] == [
        [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], first[2] * 2,  # which had nothing saved
    ]  # fmt: skip
    assert "resuming from step 4" in (run_path(tmp_path, trials[0].name) / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_vmap_spreads_the_trials_over_the_devices(write_experiment, fsdp):
    trials = load_trials(write_experiment(f"choice('{SEED}', *range(7))"), {})
    trials[0] = trials[0]._replace(cfg=config.with_fields(trials[0].cfg, {"mesh.fsdp": fsdp}))
    job = together.open_group(trials[0].cfg, quiet)
    assert job.mesh.size == fsdp
    jobs = [share_job(job, resolve(trial.cfg, job.data)) for trial in trials]
    stack = together.Stack(job, len(jobs))
    with jax.set_mesh(job.mesh):
        first = [own.init(jax.random.key(own.cfg.train.seed)) for own in jobs]
    (states, frozen), step = stack.place(first, (stack.states, stack.frozen)), stack.make_step()
    batches = together.stacked_batches(jobs, [0] * 7, stack)
    hypers = stack.place([make_hyper(own.cfg) for own in jobs], stack.numbers)
    going = stack.place([np.True_] * 7, stack.numbers)
    found = []
    for number in range(2):
        states, metrics, going = step(states, batches(number), hypers, frozen, going)
        found.append(np.asarray(metrics["loss"])[:7])
    leaf = states.params["embed_VD"]
    assert {shard.device for shard in leaf.addressable_shards} == set(jax.devices())
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert shapes == {(fsdp, leaf.shape[1], leaf.shape[2] // fsdp)}  # one trial, or two halves
    assert len(set(found[1])) == 7
    with jax.set_mesh(job.mesh):
        for index, own in enumerate(jobs):
            state, _ = own.init(jax.random.key(own.cfg.train.seed))
            for number in range(2):
                state, alone = own.train_step(state, own.train_batch(number), make_hyper(own.cfg))
                np.testing.assert_allclose(found[number][index], alone["loss"], rtol=1e-5)
            kept, _ = stack.take((states, frozen), index)
            assert kept.params["embed_VD"].sharding == state.params["embed_VD"].sharding
            np.testing.assert_allclose(
                kept.params["embed_VD"], state.params["embed_VD"], rtol=1e-3, atol=1e-4
            )


def test_where_batches_grow_all_go_on_from_the_same_step(write_experiment, tmp_path):
    path = write_experiment(f"choice('{SEED}', 0, 1)")
    runs = [tmp_path / "a", tmp_path / "b"]
    for run_folder, steps in zip(runs, ((2, 4, 6), (2, 4)), strict=True):
        for step in steps:
            (run_folder / "checkpoints" / str(step)).mkdir(parents=True)
    for ramp, left in (({}, (6, 4)), ({"train.ramp_batch_size": "8", "train.ramp_steps": "2",
                                       "train.batch_size": "16"}, (4, 4))):  # fmt: skip
        cfg = load_trials(path, ramp)[0].cfg
        job = Job(cfg, *[None] * 9)
        together.align([job, job], runs)
        newest = [rundir.saved_steps(run_folder / "checkpoints")[-1] for run_folder in runs]
        assert tuple(newest) == left


def test_devices_that_can_not_be_dealt_out(write_experiment, tmp_path):
    path = write_experiment(f"choice('{SEED}', 0, 1)")
    trials = load_trials(path, {"mesh.fsdp": "3"})
    with pytest.raises(ConfigError, match="8 devices can't be divided among trials of 3"):
        run_trials(tmp_path, trials, "vmap", 16, quiet)


def test_auto_takes_the_faster_mode_and_says_so(trials, tmp_path, monkeypatch):
    lines, cfg = [], trials[0].cfg
    measures = {"map": lambda job, width: width, "vmap": lambda job, width: 1.5}
    monkeypatch.setattr(run, "MEASURES", measures)
    monkeypatch.setattr(run.Sweep, "open", lambda self, cfg, mode: None)
    sweep = run.Sweep(tmp_path, trials, None, None, lines.append, None, {})
    assert run.choose_mode(sweep, cfg, "", 2) == "map"  # the default on a CPU
    assert run.choose_mode(sweep, cfg, "auto", 1) == "map"
    assert lines == []
    assert run.choose_mode(sweep, cfg, "auto", 2) == "vmap"
    assert lines == ["mode vmap: a step of 2 trials takes map 2000.0 ms, vmap 1500.0 ms"]


@pytest.mark.slow
def test_auto_measures_both_modes(trials, tmp_path, one_device):
    lines = []
    run_trials(tmp_path, trials[:2], "auto", 16, lines.append)
    assert sum("a step of 2 trials takes map" in line for line in lines) == 1


def test_a_sweep_without_one_finite_trial_exits_4(trials, tmp_path):
    for trial in trials:
        write_trial(tmp_path, trial, float("nan"), "non-finite")
    with pytest.raises(NonFiniteError, match="every trial"):
        run_trials(tmp_path, trials, "", 16, quiet)
