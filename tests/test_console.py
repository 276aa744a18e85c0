"""Output that fails, the progress of a run, and its summary."""

import io
import logging
import os
import subprocess
import sys
import termios
import threading
import time

import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt import console, rundir
from nanojaxgpt.__main__ import COMMANDS, main
from nanojaxgpt.console import Progress, duration, guarded_output
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.finish import summary

STEERING = "a\x1b[2J\tb\n\x07\x9bc"  # it would clear a screen


class Full(io.StringIO):
    """A stream that can't be written, and counts the attempts."""

    attempts = 0

    def write(self, text):
        self.attempts += 1
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["stdout", "both"])
def test_work_continues_without_its_output(broken, monkeypatch):
    full, err = Full(), io.StringIO() if broken == "stdout" else Full()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded_output(optional=True):
        print("one")
        print("two", flush=True)
        console.warn("a warning")
    assert (sys.stdout, sys.stderr) == (full, err)
    assert full.attempts == 1
    if broken == "stdout":
        note = "can't write to the output (No space left on device); continuing without it\n"
        assert err.getvalue() == note + "a warning\n"


def test_a_result_that_can_not_be_printed_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(ConfigError, match="output: No space left"), guarded_output(optional=False):
        print("42")


def test_what_has_no_code_in_the_streams_encoding_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    with guarded_output(optional=False):
        print("caf\u00e9 \udcff")
    assert raw.getvalue() == b"caf\\xe9 \\udcff\n"


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a?[2J\tb\n??c"), (False, STEERING)])
def test_a_models_text_does_not_steer_the_terminal(terminal, shown, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert console.printable(STEERING) == shown


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("> /dev/full", 2, "error: can't write to the output: No space left on device\n"),
        ("| true", 0, ""),
    ],
)
def test_a_closed_or_full_output_is_no_bug(redirection, code, words):
    program = f"{sys.executable} -OO -m nanojaxgpt --help {redirection}; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (code, words)


def test_a_file_never_takes_the_number_of_a_closed_stream():
    code = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdout = sys.stderr = None
from nanojaxgpt.console import open_standard_streams
open_standard_streams()
file = open(sys.argv[1], "w")
print("lost")
print("lost", file=sys.stderr)
os.write(2, b"lost")
file.write(str(file.fileno()))
"""
    path = f"/tmp/nanojaxgpt-{os.getpid()}"
    try:
        subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)
        assert int(open(path).read()) > 2  # noqa: SIM115
    finally:
        os.unlink(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return an experiment of 30 steps."""
    own = "cfg.mesh.data, train.num_steps, cfg.checkpoint.every_steps = 1, 30, 10"
    return write_tiny(tmp_path_factory.mktemp("console"), own)


@pytest.mark.slow
def test_training_outlives_its_reader_without_docstrings(tiny):
    """As in `train ... | head -1`, under python -OO."""
    run = tiny.parent / "run"
    child = subprocess.Popen(
        [sys.executable, "-OO", "-m", "nanojaxgpt", "train", f"--config={tiny}", f"--run={run}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait(timeout=300) == 0, said
    assert said.count("continuing without it") == 1
    assert "Traceback" not in said
    assert rundir.saved_steps(run / "checkpoints")[-1] == 30


@pytest.mark.parametrize(("given", "code"), [(0, 2), (None, 2), ("text", 2), (7, 7)])
def test_sys_exit_is_never_success(given, code, monkeypatch, capsys):
    leaving = COMMANDS["eval"]._replace(run=lambda arguments: sys.exit(given))
    monkeypatch.setitem(COMMANDS, "eval", leaving)
    assert main(["eval"]) == code
    assert f"error: sys.exit({given!r}) was called by {__file__}:" in capsys.readouterr().err


def test_errors_that_libraries_only_log_are_reported_in_a_line(monkeypatch, capsys):
    def command(name, arguments):
        for _ in range(2):
            logging.getLogger("absl").error("can't delete step %d\nTraceback ...", 7)
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: ...")
        if name == "fails":
            raise ConfigError("the cause")

    monkeypatch.setattr("nanojaxgpt.__main__.run_command", command)
    assert main(["works"]) == 0
    assert capsys.readouterr().err == (
        "WARNING: can't delete step 7 (--verbose shows it in full)\n"
        "WARNING: Task exception was never retrieved (--verbose shows it in full)\n"
    )
    assert main(["fails"]) == 2
    assert capsys.readouterr().err == "error: the cause\n"
    console.LIBRARY_ERRORS.lines.clear()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_verbose(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--verbose" in capsys.readouterr().out


def test_xla_logs_its_errors_alone_unless_verbose():
    code = """
import os
from nanojaxgpt.__main__ import COMMANDS, main
print(main(["--version", *{0}]), os.environ.get("TF_CPP_MIN_LOG_LEVEL"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    for flags, level in (([], "2"), (["--verbose"], "None")):
        program = [sys.executable, "-c", code.replace("{0}", str(flags))]
        found = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert found.stdout.split()[-2:] == ["0", level]


class Terminal(io.StringIO):
    """Text that says it goes to a terminal."""

    def isatty(self):
        return True


VALUES = {"loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1234.5}


def show(out) -> str:
    progress = Progress(1000, 0, out)
    progress.step(1, VALUES | {"mfu": 0.25})
    progress.began = 1e-9
    progress.step(2, VALUES)
    progress.step(3, VALUES)
    progress.say("step 3: saved")
    progress.step(4, VALUES)
    progress.close()
    return out.getvalue()


def test_elsewhere_than_on_a_terminal_each_record_is_a_line():
    text = show(io.StringIO())
    lines = text.splitlines()
    assert "\r" not in text
    assert "\x1b" not in text
    assert len(lines) == 5
    assert lines[0] == "step    1/1000  loss 2.5000  lr 1.00e-03  1,234 tokens/s  MFU 25.0%"
    assert lines[1].endswith(" left")
    assert "MFU" not in lines[1]
    assert lines[3] == "step 3: saved"


@pytest.mark.parametrize(("rows", "screen"), [(0, False), (24, True)])
def test_a_terminal_without_rows_gets_plain_lines(rows, screen):
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (rows, 80))
    with open(terminal, "w") as out:
        assert console.has_screen(out) == screen
        assert (Progress(10, 0, out).bar is not None) == screen
    os.close(master)


def test_on_a_terminal_a_bar_rewrites_itself():
    text = show(Terminal())
    assert text.count("\n") == 2  # what is said, and the end
    before, after = text.split("step 3: saved\n")
    frames = [frame.rstrip() for frame in before.split("\r") if frame.strip()]
    assert frames[0].startswith("step 0/1000 |")
    assert "| loss 2.5000  lr 1.00e-03  1,234 tokens/s  MFU 25.0%" in frames[1]
    assert frames[-1].startswith("step 3/1000 |")
    assert " left" in frames[-1]
    last = after.split("\r")[-1]
    assert last.startswith("step 4/1000 |")
    assert last.endswith("\n")


def test_a_long_compilation_is_reported(monkeypatch):
    monkeypatch.setattr(console, "COMPILE_SECONDS", 0.05)
    out, heard = io.StringIO(), threading.Event()
    progress = Progress(10, 0, out)
    monkeypatch.setattr(progress, "say", lambda text: (out.write(text + "\n"), heard.set()))
    with progress.compiling("the training step"):
        assert heard.wait(10)
    assert out.getvalue() == "compiling the training step ...\ncompiled the training step in 0 s\n"
    monkeypatch.setattr(console, "COMPILE_SECONDS", 60)
    with progress.compiling("nothing"):
        time.sleep(0.01)
    assert "nothing" not in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (2 * 3600 + 7 * 60 + 50, "2 h 07 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_summary_names_losses_checkpoint_and_next_commands(tmp_path):
    run = tmp_path / "my run"
    records = [
        {"step": 1, "loss": 3.0}, {"step": 5, "validation_loss": 2.0},
        {"step": 10, "loss": 2.5}, {"step": 10, "validation_loss": 2.25},
    ]  # fmt: skip
    assert list(summary(run, records, [5, 10])) == [
        "  training loss    2.5000 at step 10",
        "  validation loss  2.2500 at step 10",
        "  best             2.0000 at step 5",
        f"  checkpoint       {run}/checkpoints/10",
        "next:",
        f"  nanojaxgpt eval '{run}'",
        f"  nanojaxgpt sample '{run}' --prompt=TEXT",
    ]
    assert "  best             2.0000 at step 5, not kept as a checkpoint" in list(
        summary(run, records, [10])
    )
