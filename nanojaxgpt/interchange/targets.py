"""What import and export write: whole or not at all, by one process at a time."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanojaxgpt.errors import CheckpointError, ConfigError, why
from nanojaxgpt.rundir import identify


@contextmanager
def new_target(target: Path) -> Iterator[Path]:
    """Give the hidden path, of a file or folder, that becomes `target` when all went well.

    Otherwise nothing stays, and what a killed process left at this path is removed. Raises
    ConfigError where there is something at `target`, or another process is writing it,
    CheckpointError where it can't be written.
    """
    target = Path(target).absolute()
    partial, lock = (target.with_name(f".{target.name}.{end}") for end in ("partial", "lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with own_target(lock, target):
            check_free(target)
            remove(partial)
            try:
                yield partial
                partial.rename(target)
            finally:
                remove(partial)
    except OSError as error:
        raise CheckpointError(f"can't write {target}: {why(error, target.parent)}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `folder`; see `new_target`."""
    with new_target(folder) as partial:
        partial.mkdir()
        yield partial


def check_free(target: Path) -> None:
    """Raise ConfigError where there is something at `target` but an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        kind = "is not an empty folder" if target.is_dir() else "exists"
        raise ConfigError(f"{target} {kind}: choose another name")


@contextmanager
def own_target(path: Path, target: Path) -> Iterator[None]:
    """Hold the lock at `path`, which ends with its process, and remove the file afterwards.

    Raises ConfigError where another process has it.
    """
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {target}") from None
        if identify(path) != identify(lock.fileno()):  # it was removed before this process had it
            raise ConfigError(f"another process is writing {target}")
        try:
            yield
        finally:
            path.unlink()


def remove(path: Path) -> None:
    """Remove a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
