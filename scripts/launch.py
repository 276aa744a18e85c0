"""Start, watch and stop one training run on many machines; --dry-run prints the commands instead.

    python scripts/launch.py tpu   start my-pod --zone=us-east5-a -- --config=C.py --run=/shared/r
    python scripts/launch.py ssh   start gpu0,gpu1 -- --config=C.py --run=/shared/r
    python scripts/launch.py slurm start my-job --nodes=4 --gpus=8 -- --config=C.py --run=/shared/r
    python scripts/launch.py gke   start my-job --hosts=4 ... -- --config=C.py --run=/shared/r

What stands after -- goes to `nanojaxgpt train --multihost`, with --sweep to `nanojaxgpt sweep run`,
a worker on each machine. A run that ends with exit code 75 (preempted, its state saved) is
started again. docs/hosts.md tells the whole.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PREEMPTED = 75
GRACE_SECONDS = 120  # to save, before a pod is killed
ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = "nanojaxgpt.tar"
ACTIONS = ("setup", "start", "status", "tail", "stop", "kill")

Command = list[str]

# Each machine keeps launch/: log, group (the process group of the loop), child (of training),
# code (the exit code at the end) and stop (what ends the loop after the next exit).
LOOP = """\
while true; do
  {train} &
  echo $! > launch/child
  wait $!
  code=$?
  if [ "$code" -ne 75 ] || [ -e launch/stop ]; then break; fi
done
echo "$code" > launch/code"""

START = """\
cd {folder} && mkdir -p launch || exit 1
if [ -e launch/group ] && [ ! -e launch/code ] &&
  kill -0 -- -"$(cat launch/group)" 2> /dev/null; then
  echo "a run is still active: stop or kill it first" >&2
  exit 1
fi
rm -f launch/stop launch/code launch/child
nohup setsid bash -c {loop} > launch/log 2>&1 < /dev/null &
echo $! > launch/group"""

STATUS = """\
cd {folder}/launch || exit 1
if [ -e code ]; then echo "ended with exit code $(cat code)"
elif kill -0 -- -"$(cat group)" 2> /dev/null; then echo "running"
else echo "ended without an exit code"; fi"""

STOP = """\
cd {folder}/launch && touch stop && kill -TERM "$(cat child)"
for _ in $(seq 600); do
  [ ! -e code ] || break
  sleep 1
done
cat code"""

KILL = """\
cd {folder}/launch && touch stop
kill -KILL -- -"$(cat group)" 2> /dev/null
[ -e code ] || echo 137 > code"""

SETUP = """\
mkdir -p {folder} && tar -xf {archive} -C {folder} && cd {folder} || exit 1
python3 -m venv .venv && .venv/bin/pip install --quiet -e {package}"""

SBATCH = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:{gpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@{signal_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}.log
# One process has all GPUs of its node; jax would give it only the first. It counts them from 0,
# which --gpus-per-task breaks: that shows each task a part of them under other numbers.
export JAX_LOCAL_DEVICE_IDS={devices}
cd {folder} || exit 1
srun --kill-on-bad-exit=0 {train}
code=$?
if [ "$code" -eq {preempted} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""

# Exit code 75 fails the job, which starts the JobSet again; any other one fails that for good.
JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}{labels}
spec:
  failurePolicy:
    maxRestarts: 1000
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {{operator: NotIn, values: [{preempted}]}}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}
            containers:
            - name: train
              image: {image}
              command: {command}
              resources:
                limits: {{google.com/tpu: {chips}}}
              volumeMounts:
              - {{name: shared, mountPath: /shared}}
            volumes:
            - name: shared
              persistentVolumeClaim: {{claimName: {claim}}}
"""


# Kueue admits a JobSet that names one of its queues; without the label it starts at once.
QUEUE = """
  labels: {{kueue.x-k8s.io/queue-name: {queue}}}"""
PLACE = ("project", "location", "cluster", "queue")  # gcluster keeps those that are left out


def train_command(args: argparse.Namespace, *flags: str) -> Command:
    """Return what trains on one machine, as one of many or as a worker of a sweep."""
    words = ["sweep", "run"] if args.sweep else ["train", "--multihost", *flags]
    return [args.program, *words, *args.train]


def script(args: argparse.Namespace, *flags: str) -> str:
    """Return what one machine runs for an action."""
    folder = shlex.quote(args.folder)
    if args.action == "setup":
        package = shlex.quote(f".[{args.extra}]")
        return SETUP.format(folder=folder, archive=ARCHIVE, package=package)
    if args.action == "tail":
        return f"tail -n 20 -f {folder}/launch/log"
    loop = LOOP.format(train=shlex.join(train_command(args, *flags)))
    text = {"start": START, "status": STATUS, "stop": STOP, "kill": KILL}[args.action]
    return text.format(folder=folder, loop=shlex.quote(loop))


def tpu(args: argparse.Namespace) -> list[list[Command]]:
    """Return gcloud's commands, in stages, for all workers of a TPU VM, or of each of a list."""
    place = [f"--{key}={value}" for key in ("zone", "project") if (value := getattr(args, key))]
    place.append("--worker=0" if args.action == "tail" else "--worker=all")
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    names = args.name.split(",")
    stages = [[[*gcloud, "ssh", name, *place, f"--command={script(args)}"] for name in names]]
    if args.action == "setup":
        stages.insert(0, [[*gcloud, "scp", ARCHIVE, f"{n}:{ARCHIVE}", *place] for n in names])
    return stages


def ssh(args: argparse.Namespace) -> list[list[Command]]:
    """Return ssh's commands, in stages, for each machine of a list; the first coordinates."""
    hosts = args.name.split(",")
    coordinator = f"{hosts[0].rpartition('@')[2]}:{args.port}"

    def command(index: int) -> Command:
        own = f"--num_processes={len(hosts)}", f"--process_id={index}"
        return ["ssh", hosts[index], script(args, f"--coordinator={coordinator}", *own)]

    stages = [[command(i) for i in range(1 if args.action == "tail" else len(hosts))]]
    if args.action == "setup":
        stages.insert(0, [["scp", ARCHIVE, f"{host}:{ARCHIVE}"] for host in hosts])
    return stages


def slurm(args: argparse.Namespace) -> str:
    """Return the batch script of a job that is queued again when it ends with 75."""
    quoted = {key: shlex.quote(value) for key, value in vars(args).items() if type(value) is str}
    settings = (
        vars(args)
        | quoted
        | {
            "train": shlex.join(train_command(args)),
            "devices": ",".join(map(str, range(args.gpus))),
            "preempted": PREEMPTED,
        }
    )
    return SBATCH.format(**settings)


def gke(args: argparse.Namespace) -> str:
    """Return the JobSet's manifest, after the line that has Cluster Toolkit make one of its own."""
    words = ["gcluster", "job", "submit", f"--name={args.name}"]
    words += [f"--{key}={value}" for key in PLACE if (value := getattr(args, key))]
    words += [
        f"--image={args.image}", f"--compute-type={args.compute_type}",
        f"--topology={args.topology}", f"--mount={args.claim};/shared;rw",
        "--restarts=0", f"--restart-on-exit-codes={PREEMPTED}", f"--grace-period={GRACE_SECONDS}s",
        f"--command={shlex.join(train_command(args))}", f"--dry-run-out={args.name}.yaml",
    ]  # fmt: skip
    settings = vars(args) | {"command": train_command(args)}
    quoted = {key: json.dumps(value) for key, value in settings.items()}  # JSON is YAML too
    quoted["labels"] = QUEUE.format(**quoted) if args.queue else ""
    line = shlex.join(words).replace("\n", "\n# ")
    return f"# {line}\n" + JOBSET.format(**quoted, preempted=PREEMPTED, grace=GRACE_SECONDS)


def run_stages(stages: list[list[Command]]) -> int:
    """Run the commands of each stage side by side; return the largest exit code so far."""
    code = 0
    for stage in stages:
        started = [subprocess.Popen(command) for command in stage]
        code = max([code, *(abs(process.wait()) for process in started)])
        if code:
            break
    return code


def launch(args: argparse.Namespace) -> int:
    """Do what the arguments say, or print it; return the exit code."""
    if args.target == "gke":
        print(gke(args), end="")
        return 0
    if args.target == "slurm":
        text = slurm(args)
        if args.dry_run:
            print(text, end="")
            return 0
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(text)
            file.flush()
            return subprocess.run(["sbatch", file.name]).returncode
    make: Callable[[argparse.Namespace], list[list[Command]]] = {"tpu": tpu, "ssh": ssh}[
        args.target
    ]
    stages = make(args)
    if args.action == "setup":
        archive = ["git", "-C", str(ROOT), "archive", "HEAD", f"--output={Path.cwd() / ARCHIVE}"]
        stages.insert(0, [archive])
    if args.dry_run:
        print("\n".join(shlex.join(command) for stage in stages for command in stage))
        return 0
    return run_stages(stages)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the arguments; `train` holds what stands after --."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    targets = parser.add_subparsers(dest="target", required=True)
    for target in ("tpu", "ssh", "slurm", "gke"):
        one = targets.add_parser(target)
        actions = ACTIONS if target in ("tpu", "ssh") else ("start",)
        one.add_argument("action", choices=actions)
        one.add_argument(
            "name", help="HOST,HOST,..." if target == "ssh" else "name of the pod or job"
        )
        one.add_argument("--dry-run", action="store_true", help="print the commands")
        one.add_argument("--sweep", action="store_true", help="start sweep workers instead")
        one.add_argument(
            "--folder", default="nanojaxgpt", help="folder of the package on the remote machine"
        )
        one.add_argument(
            "--program", default="nanojaxgpt" if target == "gke" else ".venv/bin/nanojaxgpt"
        )
        if target in ("tpu", "ssh"):
            extra = "tpu" if target == "tpu" else "cuda13"
            one.add_argument("--extra", default=extra, help="extra to install")
    tpu, ssh, slurm, gke = targets.choices.values()
    for name in ("zone", "project"):
        tpu.add_argument(f"--{name}", default="")
    ssh.add_argument(
        "--port", type=int, default=12321, help="port of the first host; 100 below is used too"
    )
    slurm.add_argument("--nodes", type=int, default=1)
    slurm.add_argument("--gpus", type=int, default=8, help="GPUs per node")
    slurm.add_argument("--time", default="24:00:00")
    slurm.add_argument(
        "--signal_seconds", type=int, default=120, help="between SIGTERM and the time limit"
    )
    gke.add_argument("--hosts", type=int, required=True)
    gke.add_argument("--chips", type=int, default=4, help="chips per host")
    gke.add_argument("--queue", default="", help="Kueue's queue, if the cluster has Kueue")
    for name in ("project", "location", "cluster"):
        gke.add_argument(f"--{name}", default="", help="for gcluster; default: its own config")
    for name, example in (
        ("compute_type", "ct5lp-hightpu-4t"), ("image", "REGISTRY/nanojaxgpt"),
        ("accelerator", "tpu-v5-lite-podslice"), ("topology", "4x4"), ("claim", "shared"),
    ):  # fmt: skip
        gke.add_argument(f"--{name}", required=True, help=f"as in {example}")
    args = parser.parse_args(arguments[:split])
    args.train = arguments[split + 1 :]
    if args.action == "start" and not args.train:
        parser.error("give the arguments of train after --, as in -- --config=FILE.py --run=RUN")
    return args


if __name__ == "__main__":
    sys.exit(launch(parse(sys.argv[1:])))
