"""The run directory, which every command takes as RUN: its config, its identity, its lock."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt import config, console, horizon
from nanojaxgpt.checks import show
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError, UserError, why
from nanojaxgpt.regular import read_regular

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy")
STEP = re.compile("0|[1-9][0-9]{0,9}")  # the name of a checkpoint's folder


def load_run(run: Path) -> ConfigDict:
    """Return `read_config` of a run as experiments take it, to change it. Raises ConfigError."""
    return config.editable(read_config(run))


def read_config(run: Path) -> Config:
    """Return the resolved config of an existing run. Raises ConfigError."""
    path = Path(run) / "config.json"
    try:
        if path.is_file():
            text = path.read_bytes().decode(errors="replace")
            return config.from_json(text, str(path))
        near = sorted(str(p.parent) for p in Path(run).parent.glob("*/config.json"))[:5]
    except OSError as error:
        raise ConfigError(f"can't read {show(str(path))}: {error.strerror}") from error
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"{run} is not a run directory: it has no config.json{hint}")


def check_folder(name: str, folder: Path) -> None:
    """Raise ConfigError, naming the field or option, where `folder` can't be made or is a file."""
    try:
        for path in (folder, *folder.parents):
            if path.is_dir():
                return
            if path.exists():
                raise ConfigError(f"{name}={folder}: {path} is a file, not a folder")
    except OSError as error:
        raise ConfigError(f"{name}={show(str(folder))}: {error.strerror}") from error


def check_file(name: str, path: Path) -> None:
    """Raise ConfigError, naming the option, where a file can't be written at `path`."""
    try:
        if path.is_dir():
            raise ConfigError(f"{name}={path} is a folder; name a file")
        if not path.parent.is_dir():
            raise ConfigError(f"{name}={path}: there is no folder {path.parent}")
    except OSError as error:
        raise ConfigError(f"{name}={show(str(path))}: {error.strerror}") from error


def check_start(cfg: Config, run: Path) -> None:
    """Raise ConfigError where init.from_run is not a run directory, unless `run` just resumes."""
    if any((Path(run) / "checkpoints").glob("[0-9]*")):
        return
    if cfg.init.step and not cfg.init.from_run:
        raise ConfigError(
            f"init.step={cfg.init.step} is a checkpoint of init.from_run, which is not set: "
            "set init.from_run, or leave init.step at 0"
        )
    if cfg.init.from_run:
        try:
            read_config(Path(cfg.init.from_run))
        except ConfigError as error:
            raise ConfigError(f"init.from_run: {error}") from None


def saved_steps(folder: Path) -> list[int]:
    """Return the steps whose checkpoints in `folder` are complete, oldest first.

    The folder is asked, not a live Orbax manager, which also names saves that failed.
    """
    paths = Path(folder).glob("*")
    return sorted(int(p.name) for p in paths if STEP.fullmatch(p.name) and p.is_dir())


def enter_run(run: Path, cfg: Config, step: int | None = None) -> list[tuple[str, Any, Any]]:
    """Write `cfg` as the run's config, or check that it matches the run that is there.

    Returns the differences that are allowed: fields that are `config.free_on_resume` and, for a
    run whose newest checkpoint is that of `step` (0: none), its length where the schedule allows
    it. Raises ConfigError with the differences that are not.
    """
    changes = []
    if (Path(run) / "config.json").exists():
        old = read_config(run)
        changes = config.differences(old, cfg)
        held = {name for name, *_ in changes if not config.free_on_resume(name)}
        problem = "its length can't change here"
        if step is not None:
            problem = horizon.length_problem(old, cfg, held, step)
        if held and problem:
            lines = [f"  {name}: {old!r} there, {new!r} here" for name, old, new in changes]
            raise ConfigError(
                f"{run} was started with another config:\n" + "\n".join(lines) + f"\n{problem};\n"
                f"choose another --run, or start from its parameters with "
                f"--config.init.from_run={run}"
            )
    write_text(Path(run) / "config.json", config.to_json(cfg))
    return changes


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Make the run directory and hold its lock. Raises ConfigError where it can't be had."""
    with writing(run, ConfigError):
        Path(run).mkdir(parents=True, exist_ok=True)
        lock = open(Path(run) / "lock", "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {run}") from None
        yield


@contextmanager
def writing(run: Path, kind: type[UserError]) -> Iterator[None]:
    """Raise `kind`, naming the file, where the context can't write to the run directory."""
    try:
        yield
    except OSError as error:
        path = str(error.filename2 or error.filename or run)  # of a rename the target
        name = "" if path == str(run) else f"{path.removeprefix(f'{run}/')}: "
        raise kind(f"can't write to the run directory {run}: {name}{why(error, run)}") from error


def identify(path: Path | int) -> tuple[int, int] | None:
    """Return the identity of a file or directory, which another of its name lacks; None if missing.

    `path` may be the descriptor of an open file.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def check_present(run: Path, identity: tuple[int, int] | None) -> None:
    """Raise CheckpointError where the run directory is no more the one of this `identity`."""
    if identify(run) != identity:
        raise CheckpointError(
            f"the run directory {run} was deleted or moved during training: nothing can be saved "
            "there; move it back, or start again"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def code_hash() -> str:
    """Return 16 hex digits that name the source of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_identity(
    run: Path,
    cfg: Config,
    data: dict,
    devices: list[str],
    report: Callable[[str], None],
    base: Mapping[str, Any],
) -> None:
    """Write `identity.json` (hashes, versions, devices); report what changed since the last time.

    `data` is the token store's identity, `base` that of the parameters that adapters belong to.
    Raises DataError where the data is not what the run has been trained on.
    """
    identity = {
        "config": config.config_hash(cfg),
        "code": code_hash(),
        "data": data,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "devices": devices,
        "command": sys.argv,
    }
    if base:
        identity["base"] = dict(base)
    old = check_identity(run, data, report)
    write_text(Path(run) / "identity.json", json.dumps(identity, indent=2) + "\n")
    for key in ("code", "packages", "python", "devices"):
        if key in old and old[key] != identity[key]:
            report(f"changed since the run began: {key}: {old[key]} -> {identity[key]}")


def check_identity(
    run: Path, data: dict, report: Callable[[str], None] = console.warn
) -> dict[str, Any]:
    """Return the run's identity as written before. Raises DataError where its data was not `data`.

    {} where there is none; where it can't be read, so that nothing is compared, `report` says so.
    """
    old = read_identity(run, "the corpus", report)
    if old and old["data"] != data and old["data"].keys() != {"tokenizer"}:  # not trained here
        raise DataError(
            f"the corpus or its tokenizer is not what {run} was trained on:\n"
            f"  there {old['data']}\n  here  {data}\n"
            "restore the old corpus, or choose another --run"
        )
    return old


def read_identity(
    run: Path, subject: str, report: Callable[[str], object] = console.warn
) -> dict[str, Any]:
    """Return the run's identity.json, or {} where it is missing or damaged.

    Then `report` is told that `subject` can't be compared, unless the run has only begun.
    """
    path = Path(run) / "identity.json"
    skipped = f"so {subject} can't be compared with the run's"
    try:
        old = json.loads(read_regular(path))
        if isinstance(old["data"], dict):
            return old
    except FileNotFoundError:
        if saved_steps(Path(run) / "checkpoints"):
            report(f"WARNING: {path} is missing, {skipped}")
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    report(f"WARNING: {path} is damaged, {skipped}")
    return {}
