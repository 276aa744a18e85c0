"""The errors a user can meet, each with its exit code; anything else is a bug and exits 70."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path

OK = 0
INTERNAL = 70
PREEMPTED = 75  # EX_TEMPFAIL: start me again to resume
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def out_of_space(error: BaseException | None) -> bool:
    """Return whether a full disk or quota is behind an error, whatever a library made of it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def why(error: BaseException, folder: Path) -> str:
    """Return in one line why writing to `folder` failed: that its disk is full, before the rest."""
    if out_of_space(error):
        with suppress(OSError):
            free = shutil.disk_usage(folder).free
            return f"no space left on the device ({free:,} bytes free); free some and rerun"
        return "no space left on the device"
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.split("\n")[0][:300] or type(error).__name__


class UserError(Exception):
    """A problem that the user can fix: its text says what is wrong and what to do."""

    exit_code = INTERNAL


class RunsDiffer(UserError):
    """Two runs differ where `diff --check` was to find them the same."""

    exit_code = 1


class ConfigError(UserError):
    """Usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """A corpus, a tokenizer or a token store that can't be used as it is."""

    exit_code = 3


class NonFiniteError(UserError):
    """The loss or the gradient is no longer finite, or spikes more often in a row than it may."""

    exit_code = 4


class CheckpointError(UserError):
    """No checkpoint of the run can be restored, or none can be written."""

    exit_code = 5


class MemoryExceeded(UserError):
    """The training state, a batch or what a step computes does not fit the device's memory."""

    exit_code = 6


class Stopped(BaseException):
    """A signal asked for the end: SIGTERM or SIGHUP (exit 75, start me again), Ctrl-C (130).

    Like KeyboardInterrupt it is not an Exception: a signal handler raises it in the middle of
    anything, where code that catches errors (of an unreadable checkpoint, say) must not swallow it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Answered(SystemExit):
    """--help was printed: there is nothing more to do. Any other SystemExit is somebody else's."""
