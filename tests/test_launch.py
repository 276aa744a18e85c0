"""The launcher prints what it does, and does it, on stand-ins for gcloud, ssh, sbatch and srun."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from test_hosts import free_address

SPEC = importlib.util.spec_from_file_location("launch", ROOT / "scripts" / "launch.py")
launch = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(launch)

AWKWARD = '--config.sample.prompt=it\'s $HOME; "a" {b}\n#'
TRAIN = ["--config=C.py", "--run=/shared/a run", AWKWARD]

# Each machine is a folder; `--worker=0` or `all` of them run the command side by side.
MACHINES = """#!{python}
import os, subprocess, sys
folder, address = {folder!r}, {address!r}
if "scp" in sys.argv[0] or "scp" in sys.argv:
    sys.exit(0)
if "gcloud" in sys.argv[0]:
    command = next(a for a in sys.argv if a.startswith("--command=")).removeprefix("--command=")
    workers = [0] if "--worker=0" in sys.argv else [0, 1]
else:
    command, workers = sys.argv[-1], [int(sys.argv[1][-1])]
started = []
for i in workers:
    own = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
    started.append(subprocess.Popen(["bash", "-c", command], cwd=f"{{folder}}/host{{i}}",
                                    env=os.environ | (own if len(sys.argv) > 3 else {{}})))
sys.exit(max(p.wait() for p in started))
"""

# Runs the batch script until it is no more queued again, as SLURM would.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID={job} SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
cp "$1" {folder}/batch.sh
while true; do
  rm -f {folder}/requeued
  bash {folder}/batch.sh; echo "$?" >> {folder}/codes
  [ -e {folder}/requeued ] || break
done
"""
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=0 ] || exit 64
shift
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids="$pids $!"; done
code=0
for pid in $pids; do wait $pid; one=$?; [ $one -gt $code ] && code=$one; done
exit $code
"""
SCONTROL = '#!/bin/bash\n[ "$1 $2" = "requeue {job}" ] && touch {folder}/requeued\n'

# Stands for training: stops with 75 at SIGTERM, and by itself the first time.
TRAINING = """#!/bin/bash
printf '%s\\n' "$@" > arguments
trap 'exit 75' TERM
echo started >> "starts$SLURM_PROCID"
[ "$(wc -l < "starts$SLURM_PROCID")" -gt 1 ] || exit 75
[ ! -e endless ] || while true; do sleep 0.05; done
"""


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Return the folder of two machines, and have the programs on PATH reach them."""
    (tmp_path / "bin").mkdir()
    job = os.getpid() % 3000 + 200
    fields = dict(python=sys.executable, folder=str(tmp_path), address=free_address(), job=job)
    texts = dict.fromkeys(("gcloud", "ssh", "scp"), MACHINES.format(**fields))
    texts |= dict(sbatch=SBATCH.format(**fields), srun=SRUN, scontrol=SCONTROL.format(**fields))
    for name, text in texts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for index in range(2):
        install(tmp_path / f"host{index}" / "nanojaxgpt", TRAINING)
    yield tmp_path
    for index in range(2):
        if (tmp_path / f"host{index}" / "nanojaxgpt" / "launch").exists():
            subprocess.run(["bash", "-c", launch.KILL.format(folder="nanojaxgpt")],
                           cwd=tmp_path / f"host{index}")  # fmt: skip


def install(folder, text) -> None:
    """Put a program in the place of nanojaxgpt."""
    program = folder / ".venv" / "bin" / "nanojaxgpt"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(text)
    program.chmod(0o755)


def do(*arguments, train=()) -> int:
    return launch.launch(launch.parse([*arguments, *(["--", *train] if train else [])]))


def wait_until(done, seconds=60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printed(capfd, *arguments, train=()) -> str:
    assert do(*arguments, "--dry-run", train=train) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("action", launch.ACTIONS)
def test_dry_run_prints_what_can_be_pasted(action, capfd):
    train = TRAIN if action == "start" else ()
    out = printed(capfd, "tpu", action, "pod", "--zone=z", "--project=p", train=train)
    words = shlex.split(out.split("ssh ", 1)[1])
    assert out.count("gcloud compute tpus tpu-vm ssh pod --zone=z --project=p") == 1
    assert ("--worker=0" if action == "tail" else "--worker=all") in words
    (command,) = [w for w in words if w.startswith("--command=")]
    syntax = ["bash", "-n", "-c", command.removeprefix("--command=")]
    assert subprocess.run(syntax).returncode == 0
    assert ("scp nanojaxgpt.tar pod:nanojaxgpt.tar" in out) == (action == "setup")
    out = printed(capfd, "ssh", action, "me@a,b", train=train)
    assert ("ssh b " in out) == (action != "tail")
    if action == "start":
        assert "--coordinator=a:12321 --num_processes=2 --process_id=1" in out


def test_batch_script(capfd):
    out = printed(
        capfd, "slurm", "start", "job", "--nodes=4", "--gpus=2", "--time=1:00", train=TRAIN
    )
    for line in ("--nodes=4", "--gres=gpu:2", "--time=1:00", "--signal=TERM@120", "--requeue"):
        assert f"#SBATCH {line}\n" in out
    assert "JAX_LOCAL_DEVICE_IDS=0,1\n" in out
    assert not [line for line in out.split("\n") if line.startswith("#SBATCH --gpus")]
    assert subprocess.run(["bash", "-n", "-c", out]).returncode == 0


GKE = ["--compute_type=ct5lp-hightpu-4t", "--image=r/i:1", "--accelerator=t", "--topology=4x4",
       "--claim=s", "--hosts=4"]  # fmt: skip


def test_manifest(capfd):
    out = printed(capfd, "gke", "start", "job", *GKE, train=TRAIN)
    command = next(line for line in out.split("\n") if line.strip().startswith("command:"))
    assert json.loads(command.split(":", 1)[1]) == ["nanojaxgpt", "train", "--multihost", *TRAIN]
    manifest = yaml.safe_load(out)
    assert manifest["metadata"] == {"name": "job"}
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"operator": "NotIn", "values": [75]}
    queued = yaml.safe_load(printed(capfd, "gke", "start", "job", *GKE, "--queue=q", train=TRAIN))
    assert queued["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "q"}
    assert queued == manifest


# Flags of `gcluster job submit`, as cmd/job/submit.go of Cluster Toolkit declares them.
GCLUSTER = {"name", "project", "location", "cluster", "queue", "image", "compute-type", "topology",
            "mount", "restarts", "restart-on-exit-codes", "grace-period", "command",
            "dry-run-out"}  # fmt: skip


def test_cluster_toolkit_gets_the_same_job(capfd):
    out = printed(capfd, "gke", "start", "job", *GKE, "--cluster=c", "--queue=q", train=TRAIN)
    lines = [line.removeprefix("# ") for line in out.split("\n") if line.startswith("# ")]
    gcluster, job, submit, *flags = shlex.split("\n".join(lines))
    assert (gcluster, job, submit) == ("gcluster", "job", "submit")
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert given.keys() == GCLUSTER - {"project", "location"}  # which its own config has
    assert shlex.split(given["command"]) == ["nanojaxgpt", "train", "--multihost", *TRAIN]
    assert given["dry-run-out"] == "job.yaml"
    assert (given["restarts"], given["restart-on-exit-codes"]) == ("0", "75")


def test_workers_of_a_sweep_know_nothing_of_each_other(capfd):
    sweep = ["--config=C.py", "--dir=/shared/s"]
    out = printed(capfd, "tpu", "start", "a,b", "--zone=z", "--sweep", train=sweep)
    assert out.count("gcloud compute tpus tpu-vm ssh") == 2
    assert "ssh a --zone=z --worker=all" in out
    assert "ssh b --zone=z --worker=all" in out
    assert out.count("/nanojaxgpt sweep run --config=C.py --dir=/shared/s") == 2
    out += printed(capfd, "ssh", "start", "a,b", "--sweep", train=sweep)
    out += printed(capfd, "slurm", "start", "job", "--sweep", train=sweep)
    assert out.count("nanojaxgpt sweep run --config=C.py --dir=/shared/s") == 5
    assert "--multihost" not in out
    assert "--coordinator" not in out


def test_what_to_train_must_be_said(capfd):
    with pytest.raises(SystemExit):
        do("ssh", "start", "a,b")
    assert "--config=FILE.py" in capfd.readouterr().err


@pytest.mark.parametrize("target", [("tpu", "pod"), ("ssh", "host0,host1")])
def test_started_again_stopped_and_killed(target, machines, capfd):
    kind, name = target
    folders = [machines / f"host{i}" / "nanojaxgpt" for i in range(2)]
    codes = [folder / "launch" / "code" for folder in folders]
    assert do(kind, "start", name, train=TRAIN) == 0
    wait_until(lambda: all(code.exists() for code in codes))
    for index, folder in enumerate(folders):
        assert (folder / "launch" / "code").read_text() == "0\n"
        assert (folder / "starts").read_text() == "started\n" * 2  # after 75
        words = (folder / "arguments").read_text()
        assert words.startswith("train\n--multihost\n")
        assert words.endswith("\n".join(TRAIN) + "\n")
        assert (f"--process_id={index}\n" in words) == (kind == "ssh")
        (folder / "endless").touch()
    assert do(kind, "status", name) == 0
    assert capfd.readouterr().out.count("ended with exit code 0") == 2
    assert do(kind, "start", name, train=TRAIN) == 0
    wait_until(lambda: all((f / "starts").read_text().count("started") == 3 for f in folders))
    assert do(kind, "start", name, train=TRAIN) == 1
    assert "a run is still active" in capfd.readouterr().err
    assert do(kind, "stop", name) == 0
    assert [code.read_text() for code in codes] == ["75\n"] * 2
    assert do(kind, "start", name, train=TRAIN) == 0
    wait_until(lambda: all((f / "starts").read_text().count("started") == 4 for f in folders))
    assert do(kind, "kill", name) == 0
    capfd.readouterr()
    assert do(kind, "status", name) == 0
    assert capfd.readouterr().out == "ended with exit code 137\n" * 2


def test_slurm_queues_again_after_75(machines):
    folder = machines / "host0" / "nanojaxgpt"
    assert do("slurm", "start", "job", f"--folder={folder}", train=TRAIN) == 0
    assert (machines / "codes").read_text() == "75\n0\n"
    assert (folder / "arguments").read_text().endswith("\n".join(TRAIN) + "\n")


@pytest.fixture
def real(machines, monkeypatch):
    """Return the arguments of a real training on two machines, and its run directory."""
    for index in range(2):
        install(
            machines / f"host{index}" / "nanojaxgpt",
            f'#!/bin/bash\nexec {sys.executable} -m nanojaxgpt "$@"\n',
        )
    (machines / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONUNBUFFERED": "1",
    }.items():
        monkeypatch.setenv(name, value)
    small = {
        "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.seq_len": 16,
        "data.source": f"text:{machines}/corpus.txt", "data.cache_dir": f"{machines}/cache",
        "data.tokenizer": "chars",
        "train.num_steps": 20, "train.batch_size": 4, "train.log_every_steps": 1,
        "eval.num_batches": 2,
    }  # fmt: skip
    changes = [f"--config.{name}={value}" for name, value in small.items()]
    return [f"--config={ROOT}/experiments/quickstart.py", f"--run={machines}/run", *changes]


@pytest.mark.slow
def test_real_training_by_slurm(real, machines):
    folder = machines / "host0" / "nanojaxgpt"
    assert do("slurm", "start", "job", f"--folder={folder}", "--gpus=1", train=real) == 0
    assert (machines / "codes").read_text() == "0\n"
    assert (machines / "run" / "checkpoints" / "20").is_dir()


@pytest.mark.slow
def test_real_training_by_gcloud(real, machines, capfd):
    folders = [machines / f"host{i}" / "nanojaxgpt" / "launch" for i in range(2)]
    metrics = machines / "run" / "metrics.jsonl"
    assert do("tpu", "start", "pod", train=[*real, "--config.train.num_steps=100000"]) == 0
    wait_until(lambda: metrics.exists() and len(metrics.read_text().split("\n")) > 5, 200)
    assert do("tpu", "stop", "pod") == 0
    assert [(folder / "code").read_text() for folder in folders] == ["75\n"] * 2
    assert "saved step" in (folders[0] / "log").read_text()
