"""A finished run is extended, a branch begins in the middle of another run, to the same bits."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import write_corpus

from nanojaxgpt import sharding
from nanojaxgpt.branch import branch_state
from nanojaxgpt.config import base_config, override_config, typed
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError
from nanojaxgpt.horizon import LENGTH, length_problem
from nanojaxgpt.hosts.process import stop_signals
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.rundir import own_run
from nanojaxgpt.schedules import SCHEDULES, learning_rate
from nanojaxgpt.step import make_hyper
from nanojaxgpt.training import make_job, share_job, train_job


class Programs:
    """Trains runs in a folder; those of one schedule share what is compiled."""

    def __init__(self, folder) -> None:
        self.folder, self.jobs = folder, {}
        self.mesh = sharding.make_mesh({}, jax.devices()[:1])

    def job(self, **changes: str):
        """Return the job of a small config with these changes, which is not compiled yet."""
        small = {
            "model.num_layers": "1", "model.embed_dim": "16", "model.num_heads": "2",
            "model.seq_len": "16", "model.dropout": "0.1", "data.tokenizer": "chars",
            "data.source": f"text:{self.folder}/corpus.txt", "data.cache_dir": f"{self.folder}/c",
            "train.batch_size": "4", "train.num_steps": "12", "train.log_every_steps": "1",
            "optim.warmup_steps": "2", "optim.final_fraction": "0", "eval.every_steps": "0",
            "eval.num_batches": "1", "checkpoint.every_steps": "4", "checkpoint.keep_last": "9",
        }  # fmt: skip
        cfg = override_config(base_config(), small | changes)
        return make_job(resolve(cfg, data := prepare_data(cfg, str)), data, self.mesh)

    def train(self, name: str, said=None, **changes: str):
        """Return the last state of a run."""
        job = self.job(**changes)
        job = share_job(self.jobs.setdefault(job.cfg.optim.schedule, job), job.cfg)
        run, report = self.folder / name, [].append if said is None else said.append
        with stop_signals() as stop, own_run(run):
            return train_job(job, run, stop, report)

    def losses(self, name: str) -> dict[int, float]:
        return {r["step"]: r["loss"] for r in read_metrics(self.folder / name) if "loss" in r}


CONSTANT = {"optim.schedule": "constant"}
WSD = {"optim.schedule": "wsd", "optim.decay_fraction": "0.34"}  # of 12: after step 8


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return the programs of a folder that has a finished constant run, `trunk`."""
    folder = tmp_path_factory.mktemp("branch")
    text = write_corpus(folder, 3000).read_text()
    (folder / "other.txt").write_text(text[::-1])
    found = Programs(folder)
    found.train("trunk", **CONSTANT)
    return found


def assert_same_bits(found, wanted) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_cooldown_from_a_checkpoint_has_the_bits_of_a_run_that_always_had_it(programs):
    wanted, said = programs.train("whole", **WSD), []
    options = {"init.from_run": f"{programs.folder}/trunk", "init.state": "all"}
    found = programs.train("branch", said, **WSD, **options, **{"init.step": "8"})
    assert_same_bits(found, wanted)
    assert f"branching from {programs.folder}/trunk at step 8" in said
    whole, trunk = programs.losses("whole"), programs.losses("trunk")
    assert programs.losses("branch") == {step: whole[step] for step in (9, 10, 11, 12)}
    assert [step for step in whole if whole[step] != trunk[step]] == [10, 11, 12]
    # Once it has a checkpoint of its own, it resumes from there.
    shutil.rmtree(programs.folder / "branch" / "checkpoints" / "12")
    shutil.copytree(
        programs.folder / "whole/checkpoints/8", programs.folder / "branch/checkpoints/8"
    )
    assert_same_bits(programs.train("branch", **WSD, **options, **{"init.step": "8"}), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_finished_run_goes_on_with_the_bits_of_a_longer_one(schedule, programs):
    options = {"optim.schedule": schedule, "optim.decay_fraction": "0.5"}
    wanted = programs.train(f"{schedule}-long", **options, **{"train.num_steps": "20"})
    name, short, said = f"{schedule}-short", {"train.num_steps": "12"}, []
    programs.train(name, **options, **short)
    long = options | {"train.num_steps": "20"}
    if schedule == "wsd":
        with pytest.raises(ConfigError, match=r"begins after step 6, and step 12 is saved; branch"):
            programs.train(name, **long)
        for step in (8, 12):
            shutil.rmtree(programs.folder / name / "checkpoints" / str(step))
    assert_same_bits(programs.train(name, said, **long), wanted)
    assert "changed since the run began: train.num_steps 12 -> 20" in said
    assert programs.losses(name) == programs.losses(f"{schedule}-long")
    saved = json.loads((programs.folder / name / "config.json").read_text())
    assert saved["train"]["num_steps"] == 20
    with pytest.raises(ConfigError, match=r"step 20 is saved already: set train.num_steps"):
        programs.train(name, **options, **{"train.num_steps": "19"})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_length_can_change_exactly_where_the_rates_so_far_stay_what_they_were(schedule):
    def build(steps: int, fraction: float, final: float):
        cfg = base_config().unlock()
        cfg.train.num_steps, cfg.optim.decay_fraction = steps, fraction
        cfg.optim.schedule, cfg.optim.final_fraction, cfg.optim.warmup_steps = schedule, final, 3
        return cfg

    def rates(cfg) -> list[float]:
        hyper = make_hyper(typed(cfg))
        return [float(learning_rate(schedule, step, hyper)) for step in range(24)]

    settings = list(itertools.product((12, 24), (0.25, 0.5), (0.0, 0.1)))
    settings = settings if schedule == "wsd" else [(12, 0.5, 0.0), (24, 0.5, 0.0)]
    found = {setting: rates(build(*setting)) for setting in settings}
    names = ("train.num_steps", "optim.decay_fraction", "optim.final_fraction")
    allowed = 0
    for old, new in itertools.permutations(settings, 2):
        changed = {name for name, a, b in zip(names, old, new, strict=True) if a != b}
        for step in range(5, old[0] + 1):
            same = found[old][:step] == found[new][:step] and new[0] >= step
            problem = length_problem(build(*old), build(*new), changed, step)
            assert (problem == "") == same, (old, new, step, problem)
            allowed += same
    assert (allowed > 0) == (schedule in LENGTH)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"optim.optimizer": "lion"}, ConfigError, "optim.optimizer: 'adamw' there, 'lion' here"),
        ({"train.seed": "1"}, ConfigError, "train.seed: 0 there, 1 here"),
        ({"train.batch_size": "8"}, ConfigError, "train.batch_size: 4 there, 8 here"),
        (
            {"model.mlp_dim": "32"},
            ConfigError,
            r", but params/layers/down_DF is \['float32', \[1, 16, 64",
        ),
        ({"optim.ema_decay": "0.9"}, ConfigError, r"opt_state/.* is missing there.*ema_decay"),
        ({"model.param_dtype": "bfloat16"}, ConfigError, "but params/.*bfloat16.* here"),
        ({"init.step": "12"}, ConfigError, r"step 12 of .* is not before train.num_steps=12"),
        ({"init.step": "5"}, CheckpointError, r"no checkpoint of step 5 .*\[4, 8, 12\]"),
        ({"data.source": "text:FOLDER/other.txt"}, DataError, "there .*here"),
        ({"init.from_run": "nowhere"}, ConfigError, "nowhere"),
    ],
)
def test_a_branch_that_could_not_go_on_is_refused(changes, error, words, programs):
    options = {"init.from_run": f"{programs.folder}/trunk", "init.state": "all"}
    changes = {k: v.replace("FOLDER", str(programs.folder)) for k, v in changes.items()}

    def branch():
        job = programs.job(**WSD, **(options | {"init.step": "8"} | changes))
        with jax.set_mesh(job.mesh):
            branch_state(job, str)

    with pytest.raises(error, match=f"(?s){words}"):
        branch()


def test_a_branch_needs_a_run(programs):
    with pytest.raises(ConfigError, match=r"init.state=all needs a run .* set init.from_run"):
        programs.job(**{"init.state": "all"})
