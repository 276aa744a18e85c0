"""Every mistake on the command line gets one message on stderr and its exit code."""

import fcntl
import hashlib
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, command, write_tiny

from nanojaxgpt import __version__, checkpoint, config, rundir, sharding
from nanojaxgpt.__main__ import COMMANDS, main
from nanojaxgpt.arguments import split_overrides
from nanojaxgpt.data.tokenizers import train_tokenizer
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import complete

USAGE, DATA, NON_FINITE, CHECKPOINT = 2, 3, 4, 5


@pytest.fixture(autouse=True)
def own_allocator(monkeypatch):
    """Keep the settings of this process's allocator."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a corpus and an experiment that trains in a second."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny(
        folder,
        """
        train.num_steps = 4
        cfg.eval.every_steps, cfg.eval.num_batches = 2, 2
        cfg.checkpoint.every_steps = 2
        """,
        num_words=2000,
    )
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Return the directory of a run that was trained to its end in a process of its own."""
    found = command("train", f"--config={folder}/tiny.py", f"--run={folder}/run")
    assert found.returncode == 0, found.stderr
    assert "step 4/4" in found.stdout
    return folder / "run"


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command in this process and gives its message on stderr."""

    def run_main(code, *arguments):
        assert main(list(map(str, arguments))) == code
        err = capsys.readouterr().err
        assert err.count("error: ") == 1, err
        assert "Traceback" not in err
        return err.partition("error: ")[2]

    return run_main


def hashes(folder) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy(run, target):
    """Return a copy of a run, so that a test can harm it."""
    subprocess.run(["cp", "-r", run, target], check=True)
    return target


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    for name in COMMANDS:
        assert f"\n  {name} " in out


def test_no_command_is_a_mistake_with_the_same_help(capsys):
    assert main([]) == USAGE
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert ("--dir" if name == "reproduce" else "--run") in out
    assert COMMANDS[name].run.__doc__.split("\n")[0] in " ".join(out.split())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == __version__ + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "no command trian; did you mean train?"),
        (["samples", "x"], "did you mean sample?"),
        (["zzz"], "no command zzz"),
        (["train", "--cofnig=x.py"], "no option --cofnig; did you mean --config?"),
        (["sample", "RUN", "--promt=x"], "no option --promt; did you mean --prompt?"),
        (["sample", "RUN", "--temp=1"], "no option --temp"),
        (["train"], "train needs --config=FILE.py"),
        (["eval"], "eval needs a model: nanojaxgpt eval MODEL"),
        (["sample"], "sample needs a model: nanojaxgpt sample MODEL"),
        (["sample", "RUN", "--prompt"], "--prompt"),
        (["eval", "RUN", "--step=newest"], "--step: 'newest' is not an integer"),
        (["eval", "RUN", "--step=²"], "--step: '²' is not an integer"),
        (["train", "--config.train.seed"], "--config.train.seed has no value"),
        (["train", "--learning_rate=1e-3"], "mean --config.optim.learning_rate=1e-3?"),
        (["train", "--block-size", "64"], "did you mean --config.model.seq_len=VALUE?"),
        (["train", "--batch_size=4"], "--config.train.batch_size=4 or --config.eval.batch_size=4"),
        (["train", "--out_dir=x"], "did you mean --run=x?"),
        (["sample", "RUN", "--max_new_tokens=5"], "did you mean --max_tokens?"),
        (["train", "mine.py"], "write nanojaxgpt train --config=mine.py"),
        (["train", "mine.py:big"], "write nanojaxgpt train --config=mine.py:big"),
        (["eval", "mine.py"], "nanojaxgpt train --config=mine.py, then nanojaxgpt eval runs/mine"),
        (["train", "a", "b"], "unexpected argument 'b'"),
        (["train", "\udcff"], "'\\udcff' is not valid UTF-8"),
        (["train", "--join_seconds=nan"], "--join_seconds: nan must be at least 1"),
        (["train", "--num_processes=0"], "--num_processes: 0 must be at least 1"),
        (["inspect", "--step=1" + "0" * 21], "must be at most 2,147,483,647"),
        (["inspect", "--rows=-1"], "--rows: -1 must be at least 0"),
        (["coordcheck", "--steps=-1"], "--steps: -1 must be at least 0"),
        (["coordcheck", "--widths=64,-1"], "--widths: -1 must be at least 1"),
        (["coordcheck", "--widths=64,x"], "--widths: 'x' is not an integer"),
        (["reproduce", "--seeds=-1"], "--seeds: -1 must be at least 0"),
        (["sweep", "run", "--width=0"], "--width: 0 must be at least 1"),
        (["eval", "RUN", "--step=" + "9" * 5000], "--step: '999"),
        (["train", "--config=" + "a" * 300 + ".py"], "File name too long"),
        (["train", "a" * 300], "File name too long"),
        (["train", "--config=README.md"], "its name must end in .py"),
    ],
)
def test_usage(arguments, words, refused):
    assert words in refused(USAGE, *arguments)


def test_overrides_take_an_equals_sign_or_a_space():
    found = split_overrides(["--config=e.py", "--config.a.b=x=y", "RUN", "--config.c.d", "-1"])
    assert found == (["--config=e.py", "RUN"], {"a.b": "x=y", "c.d": "-1"})
    with pytest.raises(ConfigError, match="no value"):
        split_overrides(["--config.c.d"])


@pytest.mark.parametrize(
    "order",
    [
        ["--config={}", "--run=R", "--config.train.seed=7"],
        ["--config.train.seed=7", "--run=R", "--config={}"],
        ["--run", "R", "--config.train.seed", "7", "--config", "{}"],
        ["R", "--config={}", "--config.train.seed", "7"],
        ["--config={}", "--config.train.seed=7", "R"],
    ],
)
def test_flags_come_in_any_order(order, folder, monkeypatch):
    from nanojaxgpt import training

    calls = []
    monkeypatch.setattr(training, "fit", lambda *arguments: calls.append(arguments))
    assert main(["train", *[text.format(folder / "tiny.py") for text in order]]) == 0
    ((cfg, path),) = calls
    assert (cfg.train.seed, cfg.model.embed_dim, str(path)) == (7, 16, "R")


def test_run_has_the_name_of_its_experiment(folder, monkeypatch):
    from nanojaxgpt import training

    calls = []
    monkeypatch.setattr(training, "fit", lambda cfg, path: calls.append(str(path)))
    assert main(["train", f"--config={folder}/tiny.py"]) == 0
    assert main(["train", f"--config={ROOT}/experiments/gpt2.py:medium"]) == 0
    assert calls == ["runs/tiny", "runs/gpt2-medium"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rat=1", "did you mean optim.learning_rate"),
        ("train.num_steps=ten", "train.num_steps='ten' is not an integer"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan"),
        ("optim.learning_rate=-1", "optim.learning_rate=-1.0 must be at least 0"),
        ("model.num_heads=3", "model.num_heads=3"),
        ("model.windows='a'", "model.windows"),
        ("data.source=stdlb", "data.source"),
        ("data.tokenizer=byte", "data.tokenizer"),
        ("mesh.data=3", "needs 3 devices"),
        ("mesh.tensor=16", "needs 16 devices, not 8"),
        ("optim.decay_pattern=nothing", "optim.decay_pattern"),
        ("model.vocab_size=3", "model.vocab_size=3"),
        ("train.batch_size=12", "train.batch_size=12"),
        ("eval.batch_size=12", "eval.batch_size=12"),
    ],
)
def test_config_is_refused(override, words, folder, tmp_path, refused):
    err = refused(
        USAGE, "train", f"--config={folder}/tiny.py", f"--run={tmp_path}/new",
        f"--config.{override}",
    )  # fmt: skip
    assert words in err
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("data.source=text:/dev/zero", DATA, "is a device, a pipe or a socket"),
        ("data.source=notes/", USAGE, "did you mean data.source=text:notes/?"),
        ("data.source=task:modular_addition,train_fraction=nan", USAGE, "is not a number"),
        ("data.source=task:modular_division,p=1000000000000000003", USAGE, "less than 1,048,576"),
        ("data.cache_dir=/dev/null/x", USAGE, "/dev/null is a file, not a folder"),
        ("init.step=5", USAGE, "init.step=5 is a checkpoint of init.from_run, which is not set"),
        ("init.from_run=nowhere", USAGE, "init.from_run: nowhere is not a run directory"),
    ],
)
def test_what_is_missing_is_told_before_jax_starts(
    override, code, words, folder, tmp_path, refused, monkeypatch
):
    monkeypatch.setitem(sys.modules, "nanojaxgpt.training", None)  # whose import would raise
    assert words in refused(
        code, "train", f"--config={folder}/tiny.py", f"--run={tmp_path}/new", f"--config.{override}"
    )


def test_wrong_key_is_answered_before_jax_is_imported(folder):
    code = (
        "import sys; from nanojaxgpt.__main__ import main\n"
        f"code = main(['train', '--config={folder}/tiny.py', '--config.train.sed=1'])\n"
        "print(code, 'jax' in sys.modules)\n"
    )
    began = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - began
    print(f"answered in {seconds:.2f} s")
    assert found.stdout == "2 False\n"
    assert "did you mean train.seed" in found.stderr
    assert seconds < 10  # half a second when nothing else runs; importing jax takes seconds


def test_a_process_ends_with_the_exit_code(folder, tmp_path):
    found = command("trian")
    assert (found.returncode, found.stdout) == (USAGE, "")
    assert found.stderr == "error: no command trian; did you mean train?\n"
    found = command(
        "train", f"--config={folder}/tiny.py", f"--run={tmp_path}/run", "--config.mesh.data=3",
        XLA_FLAGS="--xla_force_host_platform_device_count=3",
    )  # fmt: skip
    assert found.returncode == USAGE
    assert "train.batch_size=8 is not divisible by 3 devices" in found.stderr
    assert "the next that is: 9" in found.stderr


def test_run_directory_that_can_not_be_written(folder, tmp_path, refused):
    (tmp_path / "file").write_text("here already")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        err = refused(USAGE, "train", f"--config={folder}/tiny.py", f"--run={path}")
        assert f"--run={path}: {tmp_path}/file is a file, not a folder" in err
    assert (tmp_path / "file").read_text() == "here already"


def test_run_of_another_config_is_left_as_it_is(folder, run, refused):
    before = hashes(run)
    err = refused(
        USAGE, "train", f"--config={folder}/tiny.py", f"--run={run}",
        "--config.optim.learning_rate=0.5", "--config.mesh.fsdp=2", "--config.mesh.data=4",
    )  # fmt: skip
    assert "optim.learning_rate: 0.001 there, 0.5 here" in err
    assert f"--config.init.from_run={run}" in err
    assert len(before) > 10
    assert hashes(run) == before


def test_one_process_trains_in_a_run(folder, run, refused):
    with open(run / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = hashes(run)
        err = refused(USAGE, "train", f"--config={folder}/tiny.py", f"--run={run}")
        assert f"another process is training in {run}" in err
        assert hashes(run) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file, folder or glob"),
        (b"", "is empty"),
        (b"good line\nbad \xff\xfe line\n", "line 2"),
        (b"too short to train on\n", "use more data"),
    ],
)
def test_unusable_text(content, words, folder, tmp_path, refused):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    err = refused(
        DATA, "train", f"--config={folder}/tiny.py", f"--run={tmp_path}/run",
        f"--config.data.source=text:{path}", f"--config.data.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    assert words in err


def test_changed_corpus_is_noticed(folder, run, tmp_path, refused):
    run = copy(run, tmp_path / "run")
    identity = json.loads((run / "identity.json").read_text())
    identity["data"]["tokens"] = "0" * 64
    (run / "identity.json").write_text(json.dumps(identity))
    for arguments in (["train", run], ["eval", run]):
        assert "is not what" in refused(DATA, *arguments)


def test_eval_prints_json(run, capsys):
    assert main(["eval", str(run)]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    wanted = [r for r in read_metrics(run) if "validation_loss" in r][-1]
    assert found["step"] == wanted["step"] == 4
    assert found["loss"] == pytest.approx(wanted["validation_loss"], rel=1e-5)
    assert main(["eval", f"--run={run}", "--step=2.0"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


@pytest.mark.parametrize("packing", ["wrap", "pack"])
def test_eval_of_another_source(run, tmp_path, capsys, refused, packing):
    all_of_it = ["--config.eval.num_batches=0", f"--config.data.packing={packing}"]
    assert main(["eval", str(run), *all_of_it]) == 0
    held_out = json.loads(capsys.readouterr().out)
    text = (run.parent / "corpus.txt").read_text()
    tail = tmp_path / "tail.txt"
    tail.write_text(text[int(len(text) * 0.9) :])
    assert main(["eval", str(run), f"--data=text:{tail}", all_of_it[1]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == held_out | {"source": f"text:{tail}"}
    assert found["tokens"] == len(tail.read_text()) - 1
    tail.write_text("ash, \t")
    for source, code, words in (
        (f"text:{tail}", DATA, "'\\t' (U+0009) is not among"),
        ("text:absent.txt", DATA, "no file, folder or glob absent.txt"),
        ("task:copy", DATA, "does not have the words of the run's tokenizer"),
        ("csv:absent", USAGE, "no kind 'csv'"),
        ("text:http://127.0.0.1:1/a.txt", DATA, "can't be downloaded"),
    ):
        assert words in refused(code, "eval", run, f"--data={source}")
    tail.write_text("a")
    assert "shorter than two tokens" in refused(DATA, "eval", run, f"--data=text:{tail}")


def test_another_tokenizer_than_the_run_was_trained_with_is_refused(folder, run, tmp_path, refused):
    run, corpus = copy(run, tmp_path / "run"), f"--data=text:{folder}/corpus.txt"
    own = (folder / "corpus.txt").read_text()
    for text in (own.replace("a", "z"), own + "z"):  # of the same size, and larger
        train_tokenizer("chars", [text], 0).save(run / "tokenizer")
        for arguments in (["eval", run, corpus], ["sample", run, "--prompt=elm"]):
            err = refused(DATA, *arguments)
            assert "tokenizer is not the tokenizer that" in err
            assert "restore the tokenizer" in err
    (run / "identity.json").write_text("[")
    err = refused(DATA, "sample", run)
    size = len(set(own))
    assert f"has {size + 1} tokens, but the model of" in err
    assert f"model.vocab_size={size};" in err


def test_sample_prints_text_and_keeps_it(run, tmp_path, capsys):
    run = copy(run, tmp_path / "run")
    assert main(["sample", str(run), "--prompt=elm", "--max_tokens=5", "--num_samples=2"]) == 0
    out, _ = capsys.readouterr()
    lines = (run / "samples" / "samples.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [sample["prompt"] for sample in kept] == ["elm", "elm"]
    assert all(len(sample["text"]) == 8 and sample["text"].startswith("elm") for sample in kept)
    assert out.startswith(kept[0]["text"])
    assert out.endswith(kept[1]["text"] + "\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt="], USAGE, "no end token to start from"),
        (["--prompt=Z"], DATA, "'Z'"),
        (["--top_p=2"], USAGE, "sample.top_p=2.0"),
        (["--seed=x"], USAGE, "sample.seed='x'"),
        (["--end_ids=99"], USAGE, "sample.end_ids contains 99"),
        (["--config.sample.stop=('',)"], USAGE, "sample.stop contains an empty string"),
        (["--step=3"], CHECKPOINT, "no checkpoint of step 3"),
    ],
)
def test_sample_refuses(arguments, code, words, run, refused):
    before = hashes(run)
    assert words in refused(code, "sample", run, *arguments)
    assert hashes(run) == before


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"sweep", "reproduce", "diff"}))
def test_not_a_run_directory(name, tmp_path, run, refused):
    for path in (tmp_path / "nowhere", tmp_path):
        assert "is not a run directory" in refused(USAGE, name, path)
    assert str(run) in refused(USAGE, name, run.with_name("runn"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["eval", "sample"])
def test_run_without_a_checkpoint(name, run, tmp_path, refused):
    run = copy(run, tmp_path / "run")
    subprocess.run(["rm", "-r", run / "checkpoints"], check=True)
    assert "has no checkpoint yet" in refused(CHECKPOINT, name, run)


@pytest.mark.parametrize("name", ["train", "eval", "sample"])  # the others read none
def test_run_whose_checkpoints_are_all_corrupted(name, run, tmp_path, refused):
    run = copy(run, tmp_path / "run")
    harmed = 0
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            path.write_bytes(data)
            harmed += 1
    assert harmed
    before = hashes(run / "checkpoints")
    assert "is usable" in refused(CHECKPOINT, name, run)
    assert hashes(run / "checkpoints") == before


def test_a_loss_that_is_no_number(folder, tmp_path):
    run = tmp_path / "run"
    found = command(
        "train", f"--config={folder}/tiny.py", f"--run={run}", "--config.train.num_steps=50",
        "--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0",
        "--config.checkpoint.every_steps=1", "--config.optim.warmup_steps=0",
    )  # fmt: skip
    assert found.returncode == NON_FINITE, found.stderr
    assert "Traceback" not in found.stderr
    assert "Lower optim.learning_rate" in found.stderr
    steps = rundir.saved_steps(run / "checkpoints")
    assert steps
    assert f"step {steps[-1]} is saved" in found.stderr
    model_cfg = complete(rundir.read_config(run)).model
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    for step in steps:
        _, params = checkpoint.load_params(run, model_cfg, mesh, step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert all(np.isfinite(r["loss"]) for r in read_metrics(run) if "loss" in r)


def test_names_that_only_look_like_steps_are_no_checkpoints(tmp_path):
    for name in ("2", "10", "²", "१", "007", "-1", "9" * 200, "5.tmp"):
        (tmp_path / name).mkdir()
    assert rundir.saved_steps(tmp_path) == [2, 10]


def test_run_whose_config_is_no_text(run, tmp_path, refused):
    run = copy(run, tmp_path / "run")
    (run / "config.json").write_bytes(b"\xff{")
    assert "config.json is not a config" in refused(USAGE, "eval", run)


def test_config_of_a_run_is_read_back(run):
    cfg = rundir.read_config(run)
    assert cfg.model.vocab_size > 0
    assert config.from_json((run / "config.json").read_text()) == cfg
