"""In: a command and how many processes of it to run side by side. Out: their common end."""

import os
import subprocess
import sys
from pathlib import Path

from nanojaxgpt.errors import INTERNAL, Stopped
from nanojaxgpt.hosts.process import stop_signals


def launch_workers(command: list[str], workers: int) -> None:
    """Run as many processes of one command side by side; each on its own GPUs, where there are any.

    Raises Stopped after a signal, which the workers get too; exits as the first that fails.
    """
    with stop_signals() as stop:
        processes: list[subprocess.Popen] = []
        try:
            for index in range(workers):
                environment = os.environ | own_devices(index, workers)
                # A group of its own: of Ctrl-C it hears once, from here.
                processes.append(subprocess.Popen(command, env=environment, process_group=0))
            codes = [process.wait() for process in processes]
        except Stopped:
            for process in processes:
                process.send_signal(stop.signal)
            for process in processes:
                process.wait()
            raise
    if failed := [code for code in codes if code]:
        sys.exit(failed[0] if failed[0] > 0 else INTERNAL)


def own_devices(index: int, workers: int) -> dict[str, str]:
    """Return the environment that gives one of the workers its share of the GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else nvidia_devices()
    mine = devices[index::workers] or devices[index % len(devices) :][:1] if devices else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}


def nvidia_devices() -> list[str]:
    """Return the numbers of this machine's NVIDIA GPUs."""
    names = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*")]
    return sorted((name for name in names if name.isdigit()), key=int)
