"""The terminal: output that may fail, the progress of a run."""

import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from nanojaxgpt.errors import (
    INTERNAL,
    INTERRUPTED,
    OK,
    Answered,
    CheckpointError,
    ConfigError,
    Stopped,
    UserError,
    out_of_space,
    why,
)

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line ends
REPORTED_LINES = 5  # of the errors that libraries logged
Item = TypeVar("Item")
COMPILE_SECONDS = 1.0  # a compilation that takes longer is reported


def warn(text: str) -> None:
    """Print to the error stream, so that the output holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def explain(error: BaseException) -> int:
    """Print what ended a command, as far as it needs words; return the exit code."""
    match error:
        case UserError():
            warn(f"error: {error}")
            return error.exit_code
        case Stopped():
            warn(str(error))
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():  # the reader, `head` say, has seen enough
            return OK
        case Answered():
            raise error
        case SystemExit(code=code):
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if "site-packages" not in frame.filename]
            place = (own or frames)[-1]
            warn(f"error: sys.exit({code!r}) was called by {place.filename}:{place.lineno}")
            return code if isinstance(code, int) and code else ConfigError.exit_code
        case OSError() if out_of_space(error):
            warn(f"error: {error.filename or 'a file'}: {why(error, Path.cwd())}")
            return CheckpointError.exit_code
        case Exception():
            traceback.print_exception(error)
            return INTERNAL
    raise error


class Output:
    """A text stream that calls `failed` at the first write that fails; later writes are dropped."""

    def __init__(self, stream: TextIO, failed: Callable[[Exception], None]) -> None:
        self.stream, self.failed, self.dropping = stream, failed, False
        with suppress(AttributeError, ValueError):  # a test's or a notebook's stream may lack it
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        if self.dropping:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.dropping = True
            self._discard()
            self.failed(error)

    def _discard(self) -> None:
        """Send what the stream still holds to nowhere: the interpreter flushes it as it ends."""
        with suppress(OSError, ValueError):
            if self.stream.fileno() in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


def open_standard_streams() -> None:
    """Open stdin, stdout and stderr on the null device where the process was started without.

    Else the next file that is opened, a run's metrics say, would take their number, and receive
    what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


@contextmanager
def guarded_output(optional: bool) -> Iterator[None]:
    """Guard stdout and stderr while the context lasts.

    With `optional`, output that can't be written is dropped with a note on stderr. Else a closed
    pipe raises BrokenPipeError, and another failure ConfigError.
    """

    def note(error: Exception) -> None:
        warn(f"can't write to the output ({reason(error)}); continuing without it")

    def refuse(error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise ConfigError(f"can't write to the output: {reason(error)}") from error

    def ignore(error: Exception) -> None:
        pass

    out = Output(sys.stdout, note if optional else refuse)
    with redirect_stdout(out), redirect_stderr(Output(sys.stderr, ignore)):  # type: ignore
        yield


class LibraryErrors(logging.Handler):
    """Keeps the first lines of what libraries log as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first line of a record."""
        self.lines += record.getMessage().strip().split("\n")[:1]

    def unraisable(self, error: Any) -> None:
        """Drop what event loops raise once they are closed, as a sys.unraisablehook."""
        frames = traceback.extract_tb(error.exc_traceback)
        if not frames or "asyncio" not in frames[-1].filename:
            sys.__unraisablehook__(error)

    def report(self) -> None:
        """Print what was kept, once."""
        for line in list(dict.fromkeys(self.lines))[:REPORTED_LINES]:
            warn(f"WARNING: {line[:200]} (--verbose shows it in full)")
        self.lines.clear()


LIBRARY_ERRORS = LibraryErrors()


def quiet_libraries() -> None:
    """Keep what XLA, Orbax and asyncio log from the terminal; call it before jax is imported.

    A failed save logs hundreds of lines, some after its exception was raised. Where a command
    ends well, LIBRARY_ERRORS has what was logged only.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of XLA, which reads it once: errors only
    for logger in map(logging.getLogger, ("absl", "asyncio")):
        logger.addHandler(LIBRARY_ERRORS)  # once, however often
        logger.propagate = False
    sys.unraisablehook = LIBRARY_ERRORS.unraisable
    warnings.filterwarnings("ignore", module=r"(jax|jaxlib|orbax|flax|tensorstore)\b")


def reason(error: Exception) -> str:
    """Return the message of an exception, without its number and file."""
    return getattr(error, "strerror", None) or str(error)


def has_screen(out: TextIO) -> bool:
    """Return whether a stream is a terminal that a bar shows on; some report a height of 0."""
    if not out.isatty():
        return False
    try:
        return os.get_terminal_size(out.fileno()).lines > 0
    except (OSError, ValueError):  # no file behind it
        return True


def printable(text: str) -> str:
    """Return text for standard output: on a terminal, control characters but \\n and \\t as "?".

    A model may have learned, or been made, to write the sequences that steer a terminal.
    """
    return CONTROLS.sub("?", text) if sys.stdout.isatty() else text


class Progress:
    """The steps of a run: a bar on a terminal; elsewhere a plain line for each record."""

    def __init__(self, num_steps: int, start_step: int, out: TextIO | None = None) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self.out = out or sys.stdout
        self.began = 0.0  # set after the first step: compilation does not count
        self.bar = None
        if has_screen(self.out) and start_step < num_steps:
            from tqdm import tqdm

            self.bar = tqdm(
                total=num_steps, initial=start_step, file=self.out, dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar:20}| {desc}",
            )  # fmt: skip

    def advance(self, step: int) -> None:
        """Show that a step was done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a training record."""
        left = ""
        if self.began and step > self.start_step + 1:
            per_step = (time.monotonic() - self.began) / (step - self.start_step - 1)
            left = f"  {duration(per_step * (self.num_steps - step))} left"
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        text = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s{mfu}{left}"
        )
        if self.bar is None:
            self.say(f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}  {text}")
        else:
            self.advance(step)
            self.bar.set_description_str(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.bar is None:
            print(text, file=self.out, flush=True)
        else:
            self.bar.write(text, file=self.out)

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Report that something is compiled while the context lasts, if that takes long."""
        timer = threading.Timer(COMPILE_SECONDS, self.say, [f"compiling {what} ..."])
        timer.daemon = True
        began = time.monotonic()
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        seconds = time.monotonic() - began
        if seconds > COMPILE_SECONDS:
            self.say(f"compiled {what} in {duration(seconds)}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def with_bar(items: Iterable[Item], what: str, total: int = 0) -> Iterator[Item]:
    """Yield the items; on a terminal a bar shows how far they are. Plain text says nothing."""
    if not has_screen(sys.stderr):
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc=what, total=total or None, leave=False, dynamic_ncols=True)


def duration(seconds: float) -> str:
    """Return seconds as text: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
