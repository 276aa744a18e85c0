"""Real processes train as one, and whatever befalls one of them ends all of them.

`python -m pytest tests/test_multihost.py -m slow -s` prints the table of docs/hosts.md.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, write_tiny
from test_hosts import free_address

from nanojaxgpt import checkpoint, rundir, sharding
from nanojaxgpt.data.loader import prepare_data
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import complete
from nanojaxgpt.training import make_job

NUM_STEPS = 12
# float32 sums over another number of devices round otherwise, as in test_meshes.
LOSS_BOUND = 2e-5

# A process in which something happens at step 5, where FAULT and the process's number say so.
FAULTY = """
import os, sys, time
from nanojaxgpt import loop, training
from nanojaxgpt.__main__ import main
between = loop.Loop.between
def fault(self, step, state):
    if step == 5 and self.team.index == 1:
        if os.environ["FAULT"] == "raise":
            raise RuntimeError("something broke")
        time.sleep(1000)
    between(self, step, state)
if os.environ.get("FAULT"):
    loop.Loop.between = fault
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts process `index` of `count`, with 4 devices among them."""
    folder = tmp_path_factory.mktemp("multihost")
    write_tiny(
        folder,
        f"""
        cfg.mesh.data, cfg.mesh.fsdp = 2, 2
        train.num_steps = {NUM_STEPS}
        cfg.optim.warmup_steps = 5
        cfg.eval.every_steps, cfg.eval.num_batches = 6, 2
        cfg.checkpoint.every_steps = 6
        """,
    )
    started = []

    def begin(run, index=0, count=1, address="", *arguments, fault="", name="train"):
        own = [f"--config={folder}/tiny.py"] if name == "train" else []
        command = [sys.executable, "-c", FAULTY, name, f"--run={run}", *own]
        if count > 1:
            command += ["--multihost", f"--coordinator={address}"]
            command += [f"--num_processes={count}", f"--process_id={index}"]
        environment = os.environ | {
            "FAULT": fault,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(4 // count),
        }
        process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def start_team(start, run, *arguments, count=2, **options) -> list[subprocess.Popen]:
    address = free_address()
    return [start(run, i, count, address, *arguments, **options) for i in range(count)]


def finish(*processes) -> list[str]:
    """Return the output of processes that must end well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def losses(run) -> np.ndarray:
    """Return the loss of every step, then the validation losses."""
    records = read_metrics(run)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, NUM_STEPS + 1))
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert len(validation) == NUM_STEPS // 6
    return np.array([r["loss"] for r in records if "loss" in r] + validation)


def params(run) -> dict[str, np.ndarray]:
    """Return the parameters of the last checkpoint by their paths."""
    cfg = complete(rundir.read_config(run))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    job = make_job(cfg, prepare_data(cfg, print), mesh)
    _, items = checkpoint.restore(run / "checkpoints", {"params": job.abstract.params}, NUM_STEPS)
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {checkpoint.path_name(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(run, expected) -> None:
    """Compare losses and parameters, to rounding."""
    found, wanted = losses(run), losses(expected)
    assert wanted[0] - wanted[NUM_STEPS - 1] > 0.01  # it learns
    np.testing.assert_allclose(found, wanted, atol=LOSS_BOUND)
    found, wanted = params(run), params(expected)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=2e-4, err_msg=name)


def wait_for(run, step, processes) -> None:
    """Wait until `step` is in the metrics."""
    while max((r["step"] for r in read_metrics(run)), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """Return the run directory of one process that was left alone."""
    run = tmp_path_factory.mktemp("one") / "run"
    finish(start(run))
    return run


@pytest.mark.slow
def test_two_processes_stopped_by_one_go_on_as_one_process(start, one, tmp_path):
    run = tmp_path / "run"
    processes = start_team(start, run)
    wait_for(run, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    (saved,) = {line for text in outputs for line in text.split("\n") if "saved step" in line}
    step = int(saved.split()[2])
    assert 3 <= step < NUM_STEPS
    assert rundir.saved_steps(run / "checkpoints")[-1] == step
    assert "step  1/" in outputs[0]
    assert "step  1/" not in outputs[1]  # process 0 alone reports
    (output,) = finish(start(run))
    assert f"resuming from step {step}" in output
    assert_same(run, one)


@pytest.mark.slow
def test_one_process_goes_on_as_two(start, one, tmp_path):
    run = tmp_path / "run"
    process = start(run)
    wait_for(run, 3, [process])
    process.send_signal(signal.SIGTERM)
    assert "saved step" in process.communicate(timeout=300)[0]
    assert "resuming from step" in finish(*start_team(start, run))[0]
    assert_same(run, one)


@pytest.mark.slow
def test_four_processes_with_axes_across_them_go_on_as_two(start, tmp_path):
    """fsdp and tensor both span processes of one device; 16 ids, so that tensor divides them."""
    shape = ["--config.model.vocab_size=16", "--config.mesh.data=1", "--config.mesh.tensor=2"]
    finish(start(tmp_path / "alone", 0, 1, "", *shape))
    run = tmp_path / "run"
    processes = start_team(start, run, *shape, count=4)
    wait_for(run, 3, processes)
    processes[2].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [75] * 4, outputs
    assert "resuming from step" in finish(*start_team(start, run, *shape))[0]
    assert_same(run, tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_left_alone_give_the_losses_of_one(start, one, tmp_path):
    finish(*start_team(start, tmp_path / "run"))
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_on_all_hosts(start, one, tmp_path):
    run = tmp_path / "run"
    finish(*start_team(start, run))
    for path in (run / "checkpoints" / str(NUM_STEPS) / "params").rglob("*"):
        if path.is_file() and "d" in path.parts[-2:-1]:
            path.write_bytes(b"\0" * path.stat().st_size)
    outputs = finish(*start_team(start, run))
    assert f"{NUM_STEPS} is unusable" in outputs[0]
    assert "resuming from step 6" in outputs[0]
    assert_same(run, one)


def write_benchmarks(folder) -> list[str]:
    """Write tasks in the corpus's letters; return the options that name them."""
    words = ["ash", "elm", "fir", "beech", "cedar"]
    rows = [
        {"query": f"{words[n % 5]} {words[n % 4]} ", "choices": [words[n % 3], "fir, ash"],
         "gold": n % 2, "text": f"{words[n % 5]} {words[n % 3]}"}
        for n in range(15)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"file": "rows.jsonl"}
    described = {
        "trees": {"kind": "multiple_choice", "context": "{query}", "choices": "{choices}",
                  "gold": "{gold}", "metric": "acc_norm"} | shared,
        "words": {"kind": "cloze", "context": "{query}", "continuation": "{text}",
                  "metric": "perplexity"} | shared,
        "said": {"kind": "generate", "context": "{query}", "references": ["{text}"],
                 "max_tokens": 6, "delimiter": "", "metrics": {"exact_match": {}, "chrf": {}},
                 "metric": "chrf"} | shared,
        "all": ["trees", "words", "said"],
    }  # fmt: skip
    (folder / "own.json").write_text(json.dumps(described))
    return [f"--tasks={folder}/own.json:all", f"--data={folder}"]


def answers(cache) -> dict[str, list]:
    """Return all answers that are kept, by request; each was written once."""
    (path,) = (cache / "evals").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(dict(rows)) == len(rows) > 30
    return dict(rows)


@pytest.mark.slow
def test_benchmarks_of_two_processes_are_those_of_one(start, tmp_path):
    named = write_benchmarks(tmp_path)
    while_training = [
        f"--config.eval.tasks=('{tmp_path}/own.json:all',)", "--config.eval.tasks_every_steps=6",
        f"--config.eval.tasks_data={tmp_path}",
    ]  # fmt: skip
    run = tmp_path / "run"
    finish(start(tmp_path / "alone", 0, 1, "", *while_training))
    finish(*start_team(start, run, *while_training))
    found, wanted = (
        [{k: v for k, v in r.items() if k.startswith("task_")} for r in read_metrics(path)]
        for path in (run, tmp_path / "alone")
    )
    found, wanted = list(filter(None, found)), list(filter(None, wanted))
    assert len(found) == len(wanted) == NUM_STEPS // 6
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == 3
        assert one == pytest.approx(other, rel=1e-4)

    def asked(count, cache, name, *arguments):
        options = [*named, f"--json={tmp_path}/{name}.json", *arguments]
        options.append(f"--config.data.cache_dir={tmp_path}/{cache}")
        begun = (start_team(start, run, *options, name="eval") if count > 1
                 else [start(run, 0, 1, "", *options, name="eval")])  # fmt: skip
        said = finish(*begun)
        assert all("trees" not in text for text in said[1:])  # process 0 alone reports
        return said[0], json.loads((tmp_path / f"{name}.json").read_text())["tasks"]

    _, alone = asked(1, "cache", "alone")
    _, both = asked(2, "other", "both")
    again, kept = asked(2, "other", "again")
    one, other = answers(tmp_path / "cache"), answers(tmp_path / "other")
    assert f"{len(other)} of them answered before" in again
    assert "shapes compiled: 0" in again
    assert kept == both
    assert one.keys() == other.keys()
    for key, answer in one.items():
        if isinstance(answer, str):
            assert answer == other[key]
        else:
            assert other[key] == [pytest.approx(answer[0], abs=LOSS_BOUND), *answer[1:]]
    for name, task in alone.items():
        for metric, values in task.pop("metrics").items():
            rel = 0 if metric.startswith("acc") else 1e-4
            assert both[name]["metrics"][metric] == pytest.approx(values, rel=rel)
        assert task.items() <= both[name].items()


@pytest.mark.slow
def test_benchmarks_of_other_files_or_options_are_refused(start, one, tmp_path):
    named, other = write_benchmarks(tmp_path), tmp_path / "other"
    other.mkdir()
    rows = (tmp_path / "rows.jsonl").read_text()
    (other / "rows.jsonl").write_text(rows.replace("cedar", "elm"))
    for differs, code, problem in [
        ("--limit=3", 2, ": the options are not those of host 0 ("),
        (f"--data={other}", 3, " are not the same on host 1 ("),
    ]:
        address = free_address()
        processes = [
            start(one, i, 2, address, *named, "--fresh", *([differs] * i), name="eval")
            for i in range(2)
        ]
        ends = end_of(processes, time.monotonic())
        assert [end[0] for end in ends] == [code, code], ends
        assert all(problem in line for *_, line in ends), ends


def end_of(processes, began) -> list[tuple[int, float, str]]:
    """Return exit code, seconds until then and last line of each."""
    found = {}
    while len(found) < len(processes) and time.monotonic() - began < 120:
        for index, process in enumerate(processes):
            if index not in found and process.poll() is not None:
                found[index] = process.returncode, time.monotonic() - began
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    lines = [process.communicate(timeout=60)[0].strip().split("\n")[-1] for process in processes]
    return [(*found.get(i, (process.returncode, 120.0)), lines[i])
            for i, process in enumerate(processes)]  # fmt: skip


def row(fault, ends) -> None:
    """Print a row of the table in docs/hosts.md."""
    cells = [f"{code} | {seconds:.1f} s" for code, seconds, _ in ends]
    print(f"\n| {fault} | {' | '.join(cells)} |")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "number", "who"),
    [
        ("SIGTERM on host 1", signal.SIGTERM, 1),
        ("SIGTERM on host 0", signal.SIGTERM, 0),
        ("SIGKILL of host 1", signal.SIGKILL, 1),
        ("SIGKILL of host 0, the coordinator", signal.SIGKILL, 0),
        ("SIGSTOP of host 1", signal.SIGSTOP, 1),
    ],
)
def test_a_signal_to_one_host_ends_all(fault, number, who, start, tmp_path):
    run = tmp_path / "run"
    endless = ("--config.train.num_steps=1000000", "--config.checkpoint.every_steps=100")
    processes = start_team(start, run, *endless)
    wait_for(run, 10, processes)
    began = time.monotonic()
    processes[who].send_signal(number)
    if number == signal.SIGSTOP:
        ends = end_of(processes[1 - who : 2 - who], began)
        processes[who].send_signal(signal.SIGCONT)
        ends.insert(who, end_of([processes[who]], began)[0])
    else:
        ends = end_of(processes, began)
    row(fault, ends)
    other, line = ends[1 - who][0], ends[1 - who][2]
    if number == signal.SIGTERM:
        assert [code for code, *_ in ends] == [75, 75]
        assert len({line for *_, line in ends}) == 1
        step = int(line.split()[2])
        assert rundir.saved_steps(run / "checkpoints")[-1] == step
    else:
        # When the coordinator dies, jax's own abort (SIGABRT) may come first.
        assert other == 70 or (who == 0 and other == -signal.SIGABRT)
        assert who == 0 or line.startswith("host 1 (")
    assert ends[1 - who][1] < 60


@pytest.mark.slow
def test_an_exception_on_one_host_ends_all(start, tmp_path):
    processes = start_team(start, tmp_path / "run", fault="raise")
    wait_for(tmp_path / "run", 3, processes)
    ends = end_of(processes, time.monotonic())
    row("an exception on host 1", ends)
    assert [code for code, *_ in ends] == [70, 70]
    assert ends[1][2] == "RuntimeError: something broke"
    assert ends[0][2].startswith("host 1 (")
    assert ends[0][2].endswith("RuntimeError: something broke")


@pytest.mark.slow
def test_a_stuck_host_is_noticed(start, tmp_path):
    timeout = "--config.train.hang_timeout_seconds=8"
    processes = start_team(start, tmp_path / "run", timeout, fault="hang")
    wait_for(tmp_path / "run", 3, processes)
    ends = end_of(processes, time.monotonic())
    row("host 1 hangs, train.hang_timeout_seconds=8", ends)
    assert [code for code, *_ in ends] == [70, 70]
    assert any("no step ended in" in line for *_, line in ends)


@pytest.mark.slow
def test_a_host_that_never_joins_is_named(start, tmp_path):
    began = time.monotonic()
    process = start(tmp_path / "run", 0, 2, free_address(), "--join_seconds=5")
    ends = end_of([process], began)
    row("host 1 never joins, --join_seconds=5", ends)
    assert ends[0][0] == 2
    assert ends[0][2] == "error: no answer from process 1 of 2 in 5 s"


@pytest.mark.slow
def test_hosts_of_different_configs_are_refused(start, tmp_path):
    address, began = free_address(), time.monotonic()
    seeds = ["--config.train.seed=7", "--config.train.seed=8"]
    processes = [start(tmp_path / "run", i, 2, address, seeds[i]) for i in range(2)]
    ends = end_of(processes, began)
    row("other configs (from the start)", ends)
    assert [code for code, *_ in ends] == [2, 2]
    assert all("host 1" in line and "train.seed is 8, but 7 on host 0" in line
               for *_, line in ends)  # fmt: skip
    assert not (tmp_path / "run" / "config.json").exists()
