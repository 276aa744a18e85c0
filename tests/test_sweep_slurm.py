"""SLURM arrays by submitit, on stand-ins for sbatch, srun, scontrol that start real processes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.sweep.claims import read_outcome, run_path
from nanojaxgpt.sweep.plan import load_trials
from nanojaxgpt.sweep.slurm import Worker, submit_workers

NUM_STEPS = 40

# Starts each task of the array apart from us, and again for as long as it is queued again.
SBATCH = """#!/bin/bash
cp "$1" {folder}/batch.sh
last=$(grep -oP 'array=0-\\K[0-9]+' "$1")
for i in $(seq 0 "${{last:-0}}"); do
  (
    export SLURM_JOB_ID=7$i
    [ -z "$last" ] || export SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=$i
    export SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
    while true; do
      rm -f {folder}/requeued7$i
      bash {folder}/batch.sh; echo "$i $?" >> {folder}/codes
      [ -e {folder}/requeued7$i ] || break
    done
  ) > /dev/null 2>&1 &
done
echo "Submitted batch job 70"
"""
SRUN = """#!/bin/bash
[ "$1 $2" = "--unbuffered --output" ] || exit 64
shift 3
echo $$ > {folder}/pid$SLURM_JOB_ID
{instead}
exec "$@" >> {folder}/log$SLURM_JOB_ID 2>&1
"""
SCONTROL = '#!/bin/bash\n[ "$1" = requeue ] && touch {folder}/requeued$2\n'


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Return a function that puts a cluster on PATH, whose tasks do something instead."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)

    def put(instead="") -> None:
        (tmp_path / "bin").mkdir()
        for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
            path = tmp_path / "bin" / name
            path.write_text(text.format(folder=tmp_path, instead=instead))
            path.chmod(0o755)

    return put


@pytest.fixture
def experiment(tmp_path):
    """Return the path of an experiment with a sweep of four trials."""
    own = f"train.num_steps = {NUM_STEPS}\ncfg.eval.num_batches = 2"
    return write_tiny(tmp_path, own, 'def sweep():\n    return choice("train.seed", *range(4))\n')


def ends(folder, count, seconds=60) -> list[str]:
    """Return the exit codes of the tasks as soon as there are so many."""
    deadline, path = time.monotonic() + seconds, folder / "codes"
    while not path.exists() or len(path.read_text().split("\n")) <= count:
        assert time.monotonic() < deadline, [p.read_text() for p in folder.glob("log*")]
        time.sleep(0.05)
    return sorted(path.read_text().split("\n")[:-1])


def test_dry_run_prints_the_batch_script(experiment, tmp_path, capsys):
    arguments = [f"--config={experiment}", f"--dir={tmp_path}/s", "--slurm=3", "--dry_run"]
    options = "--slurm_options=partition=gpu,time=90,gpus_per_node=1"
    assert main(["sweep", "run", *arguments, options]) == 0
    out = capsys.readouterr().out
    for line in ("array=0-2%3", "partition=gpu", "time=90", "gpus-per-node=1", "signal=TERM@120",
                 "requeue", "open-mode=append", "job-name=s"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in out
    assert subprocess.run(["bash", "-n", "-c", out]).returncode == 0
    own = f"sweep run --config={experiment} --dir={tmp_path}/s --slurm=3 "
    assert f"# each of 3: nanojaxgpt {own}" in out
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slurm=2", "--slurm_options=partiton=gpu"], "did you mean partition?"),
        (["--slurm=2", "--slurm_options=command=x"], "no option command"),
        (["--slurm_options=time=1"], "need --slurm=WORKERS"),
        (["--dry_run"], "need --slurm=WORKERS"),
        (["--slurm=-1"], "at least"),
        (["--slurm=2"], "srun is not installed"),
    ],
)
def test_what_slurm_can_not_do_exits_2(experiment, arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["sweep", "run", f"--config={experiment}", f"--dir={tmp_path}/s", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit.slurm", None)
    with pytest.raises(ConfigError, match=r"pip install 'nanojaxgpt\[slurm\]'"):
        submit_workers([], 2, "", tmp_path, True)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_worker_ends_with_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    Worker(["--version"])()
    with pytest.raises(SystemExit) as end:
        Worker(["sweep", "fly"])()
    assert end.value.code == 2


@pytest.mark.parametrize("workers", [1, 3])  # submitit makes no array of one
def test_tasks_run_and_are_queued_again_after_75(cluster, tmp_path, workers):
    once = f"{tmp_path}/begun$SLURM_JOB_ID"
    cluster(f"[ -e {once} ] || {{ touch {once}; exit 75; }}")
    (line,) = submit_workers(["--version"], workers, "time=5", tmp_path / "s" / "slurm", False)
    assert line.startswith(f"job 70: {workers} worker")
    found = ends(tmp_path, 2 * workers)
    assert found == sorted(f"{i} {code}" for i in range(workers) for code in (75, 0))
    assert re.search(r"^\d+\.\d+", (tmp_path / "log70").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_worker_that_is_preempted_saves_and_goes_on(
    experiment, cluster, tmp_path, capsys, monkeypatch
):
    cluster()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    folder = tmp_path / "s"
    arguments = [f"--config={experiment}", f"--dir={folder}", "--slurm=2"]
    assert main(["sweep", "run", *arguments]) == 0
    assert "job 70: 2 workers" in capsys.readouterr().out
    deadline = time.monotonic() + 300
    while sum(len(read_metrics(path)) for path in folder.glob("trials/*")) < 10:
        assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.glob("log*")]
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid70").read_text()), signal.SIGTERM)
    assert ends(tmp_path, 3, 400) == ["0 0", "0 75", "1 0"]
    assert "rerun the same command" in (tmp_path / "log70").read_text()
    trials = load_trials(str(experiment), {})
    assert len(trials) == 4
    for trial in trials:
        assert read_outcome(folder, trial.name)["state"] == "finished"
        steps = [r["step"] for r in read_metrics(run_path(folder, trial.name)) if "loss" in r]
        assert steps == [*range(1, NUM_STEPS + 1)]
    said = re.findall(
        r"^\d/4 (\w+) finished", "".join(p.read_text() for p in tmp_path.glob("log*")), re.MULTILINE
    )
    assert sorted(said) == sorted(trial.name for trial in trials)
