"""`nanojaxgpt diff`: two runs that were resumed, seeded or configured differently."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import write_tiny

from nanojaxgpt import checkpoint, rundiff, sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.commands.diff import describe_comparison
from nanojaxgpt.config import load_config, override_config, typed
from nanojaxgpt.errors import CheckpointError, ConfigError, RunsDiffer
from nanojaxgpt.hosts.process import stop_signals
from nanojaxgpt.training import open_job, report_nothing, share_job, train_job

SECTIONS = ("config", "code", "packages", "python", "devices", "data", "loss", "validation_loss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder of runs: plain, resumed, and two with a field of their own."""
    folder = tmp_path_factory.mktemp("runs")
    own = """
    train.num_steps, cfg.optim.warmup_steps = 4, 1
    cfg.eval.every_steps, cfg.eval.num_batches, cfg.checkpoint.every_steps = 2, 1, 2
    """
    experiment = str(write_tiny(folder, own))
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: make_mesh({}, jax.devices()[:1]))

        job, said = open_job(typed(load_config(experiment)), report=report_nothing), []

        def train(name, **overrides):
            (folder / name).mkdir(exist_ok=True)
            cfg = override_config(job.cfg, overrides)
            with stop_signals() as stop:
                train_job(share_job(job, cfg), folder / name, stop, said.append)

        train("plain")
        shutil.copytree(folder / "plain", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / "4")
        train("resumed")
        assert "resuming from step 2" in said
        train("seed", **{"train.seed": "1"})
        train("rate", **{"optim.learning_rate": "2e-3"})
    return folder


@pytest.fixture
def compare(runs, capsys):
    """Return a function of two runs and options that gives the exit code and what is printed."""

    def call(left, right, *options):
        code = main(["diff", str(runs / left), str(runs / right), *options])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in options and out else out, err

    return call


@pytest.fixture
def copy(runs, tmp_path):
    """Return a copy of the plain run that a test may damage."""
    shutil.copytree(runs / "plain", tmp_path / "copy")
    return tmp_path / "copy"


def test_a_resumed_run_is_the_same_and_no_array_is_read(compare, monkeypatch):
    monkeypatch.delattr(checkpoint.LeafReader, "read")
    code, out, err = compare("plain", "resumed", "--check")
    assert (code, err) == (0, "")
    same = [line for line in out.splitlines() if ": the same" in line]
    assert len(same) == len(SECTIONS) + 1
    assert "loss: the same, 4 of 4 common steps" in same
    assert same[-1].startswith("checkpoint of step 4: the same in all")


def test_another_seed_differs_in_the_first_loss_and_every_kernel(compare, runs):
    code, found, err = compare("plain", "seed", "--json", "--check")
    assert code == RunsDiffer.exit_code == 1
    assert "differ in config, loss, validation_loss, checkpoint" in err
    assert found["config"]["differing"] == {"train.seed": [0, 1]}
    assert found["differing"] == ["config", "loss", "validation_loss", "checkpoint"]
    first = found["loss"]["first"]
    assert first["step"] == 1
    assert first["difference"] == first["values"][1] - first["values"][0] != 0
    assert (found["loss"]["common"], found["validation_loss"]["common"]) == (4, 2)
    arrays = {row["array"]: row["largest"] for row in found["checkpoint"]["differing"]}
    assert next(iter(arrays)) == "params/embed_VD"
    name = "params/layers/q_DNH"
    left, right = (
        checkpoint.LeafReader(runs / run / "checkpoints" / "4").read(name)
        for run in ("plain", "seed")
    )
    assert arrays[name] == np.abs(left.astype(np.float64) - right).max() > 0
    lines = describe_comparison(found)
    assert "  train.seed  0  1" in lines
    (summary,) = [line for line in lines if line.startswith("checkpoint of step 4: different in")]
    assert f" {len(arrays)} of {found['checkpoint']['arrays']} arrays" in summary


def test_another_learning_rate_first_shows_after_an_update(compare):
    code, found, _ = compare("plain", "rate", "--step=2", "--json")
    assert code == 0
    assert found["config"]["differing"] == {"optim.learning_rate": [0.001, 0.002]}
    assert found["loss"]["first"]["step"] == 2
    assert found["loss"]["differing"] == 3
    assert found["checkpoint"]["step"] == 2


def test_fields_and_identities_of_other_versions(compare, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["train"]["z_loss"]  # written before the field existed
    (copy / "config.json").write_text(json.dumps(config))
    identity = json.loads((copy / "identity.json").read_text())
    identity["code"], identity["devices"] = "0" * 16, ["cpu", "cpu"]
    identity["packages"]["jax"] = "0.1"
    del identity["packages"]["numpy"]
    identity["data"]["parts"][0]["tokenizer"] = "1" * 16
    (copy / "identity.json").write_text(json.dumps(identity))
    code, found, _ = compare("plain", copy, "--json", "--check")
    assert code == 0  # neither config, losses nor checkpoints differ
    assert not found["config"]["differing"]
    assert found["packages"]["differing"].keys() == {"packages.jax", "packages.numpy"}
    assert found["data"]["differing"].keys() == {"data.parts.0.tokenizer"}
    _, out, _ = compare("plain", copy)
    lines = [line.split() for line in out.splitlines()]
    assert ["code", found["code"]["differing"]["code"][0], "0" * 16] in lines
    assert ["devices", "1", "x", "cpu", "2", "x", "cpu"] in lines
    assert lines[lines.index(["packages:", "different"]) + 3][-1] == "(none)"


def test_damaged_and_missing_records_are_passed_over(compare, copy):
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{torn", "[1]", *lines[2:], '{"step": 5, "loss": NaN}']))
    (copy / "identity.json").write_text("{")
    code, found, err = compare("plain", copy, "--json", "--check")
    assert code == 0
    assert (found["loss"]["common"], found["loss"]["logged"]) == (3, [4, 4])
    assert "lines of" in err
    assert "identity.json is damaged" in err
    assert found["code"]["problem"].startswith("no readable identity.json in")
    path.unlink()
    shutil.rmtree(copy / "checkpoints")
    code, out, err = compare("plain", copy, "--check")
    assert code == 1
    assert "loss: not compared: no step in common: 4 logged in A, 0 in B" in out
    assert "checkpoint: not compared: no step in common: A has [2, 4], B has []" in out
    assert main(["diff", str(copy), str(copy), "--check"]) == 0


def test_nan_is_the_same_as_nan(compare, copy):
    text = '{"step": 1, "loss": NaN}\n{"step": 2, "loss": NaN}\n'
    (copy / "metrics.jsonl").write_text(text)
    _, found, _ = compare(copy, copy, "--json")
    assert found["loss"]["differing"] == 0
    _, found, _ = compare("plain", copy, "--json")
    assert found["loss"]["differing"] == 2


def test_a_damaged_checkpoint_is_said_to_be_unusable(compare, copy):
    (copy / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    code, out, _ = compare("plain", copy, "--check")
    assert code == 1
    assert "checkpoint of step 4: not compared: unusable:" in out
    code, out, _ = compare("plain", copy, "--check", "--step=2")
    assert code == 0
    assert "checkpoint of step 2: the same" in out


def test_arrays_of_other_shapes_are_listed(compare, copy):
    path = copy / "checkpoints" / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["leaves"]["params/position_TD"]
    meta["leaves"]["params/embed_VD"][1] = [99, 16]
    path.write_text(json.dumps(meta))
    _, out, _ = compare("plain", copy)
    assert "different in 2 of" in out
    assert "float32 [15, 16] against float32 [99, 16]" in out
    assert "float32 [16, 16] against (none)" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plain"], ConfigError.exit_code, "diff needs two run directories"),
        (["plain", "."], ConfigError.exit_code, "is not a run directory: it has no config.json"),
        (["plain", "seed", "rate"], ConfigError.exit_code, "unexpected argument"),
        (["plain", "seed", "--step=0"], ConfigError.exit_code, "--step: 0 must be"),
        (["plain", "seed", "--config.train.seed=1"], ConfigError.exit_code, "no --config"),
        (["plain", "seed", "--step=3"], CheckpointError.exit_code, "available: [2, 4]"),
    ],
)
def test_what_can_not_be_compared_is_refused(arguments, code, words, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["diff", *arguments]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.uint32, np.int8, bool])
def test_largest_difference(dtype, monkeypatch):
    monkeypatch.setattr(rundiff, "CHUNK", 2)
    left, right = np.array([[0, 1, 1], [0, 1, 0]], dtype), np.array([[0, 1, 1], [0, 0, 1]], dtype)
    assert rundiff.largest_difference(left, right) == rundiff.largest_difference(right, left) == 1
    assert rundiff.largest_difference(left, left) == 0
    assert rundiff.largest_difference(left[:0], left[:0]) == 0


def test_largest_difference_of_numbers_that_are_not_finite():
    nan, inf = np.nan, np.inf
    left = np.array([nan, inf, 1, 2], np.float32)
    assert rundiff.largest_difference(left, left) == 0
    assert rundiff.largest_difference(left, np.array([nan, 1, 1, 5], np.float32)) == inf
    assert np.isnan(rundiff.largest_difference(left, np.array([0, inf, 1, 5], np.float32)))
