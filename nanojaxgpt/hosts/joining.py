"""From flags, or what a TPU or SLURM says by itself, to a team of processes that fits together."""

import importlib.metadata
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nanojaxgpt import config, rundir
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import ConfigError, Stopped, UserError
from nanojaxgpt.hosts.lifeline import GRACE_SECONDS, Lifeline, connect
from nanojaxgpt.hosts.team import Members, Team

MIN_FREE_BYTES = 1 << 30  # in the run directory
SEEN_SECONDS = 10.0  # until what one host wrote must be there for the others
BLAME_SECONDS = 3.0  # until the news of a lost host, after what it breaks in the others
HEARTBEAT_SECONDS = 100  # jax's own, which aborts; the lifeline's is the shorter


def place(coordinator: str, num_processes: int, process_id: int, seconds: float) -> tuple:
    """Return (coordinator, num_processes, process_id, local device ids or None) of this process.

    What was not given ("" and -1) comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, else from the cluster that jax finds. Raises ConfigError where it finds none.
    """
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize would abort, not raise

    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        count = int(os.environ.get("JAX_NUM_PROCESSES", -1)) if num_processes < 0 else num_processes
        index = int(os.environ.get("JAX_PROCESS_ID", -1)) if process_id < 0 else process_id
        ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
        devices = list(map(int, ids.split(","))) if ids else None
    except ValueError as error:
        raise ConfigError(f"an environment variable JAX_...: {error}") from error
    if address is None or count < 0 or index < 0:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            address, None if count < 0 else count, None if index < 0 else index,
            devices, None, int(seconds),
        )  # fmt: skip
        address, count, index, devices = found
    if address is None or count is None or index is None:
        raise ConfigError(
            "--multihost: this is neither a TPU pod nor a SLURM step; give "
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=I"
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_id={index} must be from 0 to {count - 1}, of {count} processes"
        )
    return address, count, index, devices


@contextmanager
def joined(
    coordinator: str,
    num_processes: int,
    process_id: int,
    seconds: float,
    explain: Callable[[BaseException], int],
) -> Iterator[Team]:
    """Give the team of this process, with jax.distributed started; all its processes end together.

    `explain` prints an exception and returns its exit code, with which the process then leaves;
    the others say which host it was. Raises ConfigError where not all come within `seconds`.
    """
    import jax

    address, count, index, devices = place(coordinator, num_processes, process_id, seconds)
    line = connect(index, count, address, seconds)
    try:
        team = Members(line)
        line.start()
        # SIGTERM is ours to answer: jax's own service would take its handler away.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            address, count, index, devices,
            initialization_timeout=int(seconds), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
        yield team
        team.gather(None, "to finish")
        line.closing = True
        jax.distributed.shutdown()
    except BaseException as error:
        end(line, error, explain)


def end(line: Lifeline, error: BaseException, explain: Callable[[BaseException], int]) -> NoReturn:
    """Leave with the error's exit code, unless it only follows from the end of another host."""
    deadline = time.monotonic() + BLAME_SECONDS
    while not isinstance(error, UserError | Stopped) and time.monotonic() < deadline:
        if line.ended:
            time.sleep(2 * GRACE_SECONDS)  # its thread says so and ends the process
        time.sleep(0.05)
    code = explain(error)
    said = str(error).split("\n")[0]
    name = "" if isinstance(error, UserError | Stopped) else f"{type(error).__name__}: "
    line.leave(code, f"ended with exit code {code}: {name}{said}")
    os._exit(code)  # jax would wait for the others at the interpreter's end


def facts(cfg: Config) -> dict[str, Any]:
    """Return the facts that must be the same on all hosts."""
    import jax

    versions = {f"package {name}": importlib.metadata.version(name) for name in rundir.PACKAGES}
    fields = {name: repr(value) for name, value in config.fields(cfg)}
    return fields | versions | {
        "Python": platform.python_version(),
        "the code's hash": rundir.code_hash(),
        "devices of a process": jax.local_device_count(),
        "kind of device": jax.local_devices()[0].device_kind,
    }  # fmt: skip


def preflight(team: Team, cfg: Config, run: Path | None = None) -> None:
    """Compare all hosts with process 0 before the first step.

    Config, code, versions, devices, and where there is a run directory, that it is one, and its
    free space. Raises ConfigError on all hosts, with every mismatch of every host.
    """
    if team.count == 1:
        return
    problems = differing_facts(team, facts(cfg))
    if run is not None:
        problems += folder_problems(team, Path(run))
    found = team.gather(problems, "to check its setup")
    if any(found):
        lines = [f"  {team.name(i)}: {p}" for i, told in enumerate(found) for p in told]
        raise ConfigError("the hosts differ:\n" + "\n".join(lines))


def differing_facts(team: Team, mine: dict[str, Any]) -> list[str]:
    """Return what is not as on process 0."""
    first = team.decide(lambda: mine, "to check its setup")
    return [f"{name} is {mine.get(name)}, but {value} on host 0"
            for name, value in first.items() if mine.get(name) != value]  # fmt: skip


def folder_problems(team: Team, run: Path) -> list[str]:
    """Return what keeps this host from writing to the run directory that process 0 writes to."""
    probe, token, failed = run / f".probe-{team.index}", secrets.token_hex(8), ""
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe.write_text(token)
    except OSError as error:
        failed = f"can't write to {run}: {error.strerror}"
    expected = team.decide(lambda: token, "to check its setup")
    problems = [failed] if failed else unseen(run, expected)
    try:
        free = shutil.disk_usage(run).free
        if free < MIN_FREE_BYTES:
            problems.append(f"only {free / 2**20:,.0f} MiB are free in {run}")
    except OSError:
        pass  # told above
    team.gather(None, "to check its setup")  # all have looked
    if not failed:
        probe.unlink(missing_ok=True)
    return problems


def unseen(run: Path, token: str) -> list[str]:
    """Return the fault if process 0's probe is not seen, even after a while (NFS)."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        try:
            if (run / ".probe-0").read_text() == token:
                return []
        except OSError:
            pass
        if time.monotonic() > deadline:
            return [f"does not see what host 0 wrote to {run}: it must be on a shared file system"]
        time.sleep(0.1)
