"""Regular files: what else a path may name, a device or a pipe, may never end, or never answer."""

import errno
import os
import stat
from pathlib import Path


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError where `path` is missing, or is neither a regular file nor a folder."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        problem = "it is a device, a pipe or a socket, not a file"
        raise OSError(errno.EINVAL, problem, os.fspath(path))


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises OSError where `path` is anything else."""
    check_regular(path)
    return path.read_bytes()
