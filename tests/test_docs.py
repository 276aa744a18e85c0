"""Every fenced code block of README.md, CONTRIBUTING.md and docs/*.md is executed; links resolve.

Python blocks of a page run in order in one namespace; each line of a bash block goes to the first
matching entry of `RUNNERS`. Where a command needs what a test can't have, `STOPS` says at which
function it ends and why: its arguments and its config have been checked by then. Commands of other
programs are listed in `OUTSIDE`. A line that matches nothing fails.

A fence with `title="FILE"` is written to FILE. A `text` block directly below a code block is its
output: each line must be found in it, in order, whatever the numbers; "..." stands for anything.
"""

import gzip
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow
import pytest
import zstandard
from conftest import ROOT
from pyarrow import parquet

from nanojaxgpt import optim, sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.arguments import split_overrides
from nanojaxgpt.config import load_config, load_module, sections
from nanojaxgpt.data import sources
from nanojaxgpt.model import block as layers
from nanojaxgpt.model import parameters, transformer

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "text", "yaml", "json"}
README_LINES = 120
SLOW_PAGES = (
    "accelerators", "data", "extend", "finetune", "optimizers", "python", "serving", "sweeps",
    "troubleshooting"
)  # fmt: skip

# Appended to every command that trains an experiment: the smallest model, and as few steps.
SMALL = {
    "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.num_kv_heads": 0,
    "model.head_dim": 0, "model.mlp_dim": 0, "model.seq_len": 16, "model.vocab_size": 0,
    "data.num_workers": 1, "optim.warmup_steps": 1, "mesh.slice": 1, "mesh.data": -1,
    "mesh.fsdp": 1, "mesh.sequence": 1, "mesh.tensor": 1, "train.num_steps": 2,
    "train.batch_size": 8, "train.accumulation_steps": 1, "train.loss_chunks": 1,
    "eval.batch_size": 8, "eval.num_batches": 1, "eval.every_steps": 0,
    "checkpoint.every_steps": 0,
}  # fmt: skip
# Where the command says nothing else: most commands then share their compiled programs.
PLAIN = {
    "model.positions": "learned", "model.norm": "layernorm", "model.mlp": "gelu_tanh",
    "model.bias": True, "model.norm_bias": True, "data.tokenizer": "bytes",
    "optim.schedule": "constant",
}  # fmt: skip
TRAINS = ("train", "sweep", "prepare", "inspect", "coordcheck")


class Reached(BaseException):
    """A command has come to the function at which this test ends it."""


# (what a command line has in it, the functions at which it ends, why)
STOPS: list[tuple[str, tuple[str, ...], str]] = [
    (r"--multihost", ("hosts.joining.joined",), "the other processes are missing"),
    (r"^rehearse", ("rehearse.targets.open_target",), "compiles for minutes"),
    (r"^train.*/(gpt2|gpt3|llama3)\.py", ("training.fit",), "sized for accelerators"),
    (r"init\.state=all", ("rundir.check_start",), "needs a long run, as test_branch.py has"),
    (r"^reproduce", ("papers.reproduce.reproduce",), "trains for minutes"),
    (r"^coordcheck", ("papers.coordcheck.check_coordinates",), "13 s; test_coordcheck.py runs it"),
    (r"^serve", ("server.running.run",), "serves until a signal comes"),
    (r"--slurm=", ("sweep.slurm.submit_workers",), "needs sbatch"),
    (r"--tasks=small", ("evals.tasks.open_benchmark",), "needs data from elsewhere"),
    (r"^lm-eval", ("commands.lm_eval.require_package",), "needs the package lm_eval, and its data"),
    (r"(tfds|hf):|://", ("data.store.prepare", "data.loader.prepare"), "needs data from elsewhere"),
]

# Programs that are not this project's, and what stands in the way of running them.
OUTSIDE = {
    "source .venv/bin/activate": "changes the shell",
    "gcloud ": "needs a cloud account",
    "scancel ": "needs SLURM",
    "tail -f": "does not end",
    "curl ": "needs a server",
    "lm_eval ": "needs a server, or a release of lm-eval that looks for plug-ins",
    "tensorboard ": "does not end",
    "pre-commit ": "needs a git hook; its hooks are the commands of .ci/run",
    "NANOJAXGPT_TEST_PLATFORMS=": "needs a GPU",
    "mkdocs ": ".ci/run builds the site",
    "ruff ": ".ci/run calls it",
    "pyright": ".ci/run calls it",
}


class Block(NamedTuple):
    """A fenced code block; `output` where it is directly below another block."""

    line: int
    language: str
    title: str
    code: str
    output: bool


def read_blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    blocks, fence, begin, end = [], None, 0, -1
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if fence is None:
            fence, begin = line.strip().removeprefix("```"), number
            continue
        indent = len(lines[begin]) - len(lines[begin].lstrip())
        code = "".join(text[indent:] + "\n" for text in lines[begin + 1 : number])
        language, _, rest = fence.partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        between = lines[end + 1 : begin] if end >= 0 else ["first"]
        blocks.append(Block(begin + 1, language, title[1] if title else "", code, not any(between)))
        fence, end = None, number
    assert fence is None, f"{path}: the block from line {begin + 1} on has no end"
    return blocks


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """Return a folder with the files that the pages name, and a tiny runs/quickstart."""
    folder = tmp_path_factory.mktemp("docs")
    words = np.random.default_rng(0).choice(["ash", "beech", "cedar", "elm", "fir\n"], 6000)
    text = " ".join(words)
    (folder / "notes").mkdir()
    for index in range(6):
        (folder / "notes" / f"{index}.txt").write_text(text[index * 4000 : (index + 1) * 4000])
    shutil.copy(folder / "notes" / "0.txt", folder / "notes" / "a.md")
    for name in ("book.txt", "poems.txt", "a.txt", "b.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(text.replace("fir\n", "fir\n\n"))
    records = [{"text": line, "body": line, "a": {"b": line}} for line in text.split("\n") if line]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for name in ("posts.jsonl", "b.jsonl"):
        (folder / name).write_text(lines)
    (folder / "c4").mkdir()
    (folder / "c4" / "0.json.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "wiki.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    (folder / "fineweb").mkdir()
    parquet.write_table(pyarrow.table({"text": text.split("\n")}), folder / "fineweb" / "0.parquet")
    messages = pyarrow.table({"message": [{"content": line} for line in text.split("\n")]})
    parquet.write_table(messages, folder / "chats.parquet")
    shutil.copy(ROOT / "experiments" / "quickstart.py", folder / "mine.py")
    for name in ("experiments", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        train = ["train", "--config=experiments/quickstart.py", "--run=runs/quickstart"]
        steps = {"train.num_steps": 4, "eval.every_steps": 2, "checkpoint.every_steps": 2}
        small = flags(PLAIN | SMALL | steps | {"data.source": "text:notes"})
        assert call([*train, *small]) == (0, "")
    return folder


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in `folder`, with its own cache and one device; what a page changes is undone."""
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    make_mesh, one = sharding.make_mesh, jax.devices()[:1]
    patch.setattr(sharding, "make_mesh", lambda sizes, devices=one: make_mesh(sizes, devices))
    patch.setattr(transformer, "Block", transformer.Block)
    for module in (layers, parameters):
        patch.setattr(module, "layer_rows", module.layer_rows)
    for module, name in ((optim, "OPTIMIZERS"), (sources, "SOURCES")):
        patch.setattr(module, name, dict(getattr(module, name)))
    for rule in sections.rules().values():
        patch.setattr(rule, "choices", rule.choices)


@pytest.fixture
def desk(example, tmp_path, monkeypatch) -> Iterator[Path]:
    """Yield a copy of `example`, which is the working directory."""
    folder = tmp_path / "desk"
    shutil.copytree(example, folder, symlinks=True)
    enter(monkeypatch, folder)
    yield folder
    parameters.parameters.cache_clear()  # a page may have changed the layers


def flags(settings: dict[str, Any]) -> list[str]:
    """Return the overrides that set these config fields."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def call(arguments: list[str]) -> tuple[int, str]:
    """Run the command line here; return its exit code, and its errors where it failed."""
    errors = StringIO()
    with redirect_stderr(errors):
        code = main(arguments)
    return code, errors.getvalue() if code else ""


def run_nanojaxgpt(words: list[str]) -> None:
    """Run one command with the page's config checked as it stands, then made small."""
    line = shlex.join(words)
    stops = [stop for stop in STOPS if re.search(stop[0], line.replace("'", ""))]
    others, overrides = split_overrides(words)
    configs = [word.partition("=")[2] for word in others if word.startswith("--config=")]
    if configs:
        load_config(configs[0], overrides)  # as the page has it
    arguments = list(words)
    if words[0] in TRAINS and not stops and configs:
        plain = {name: value for name, value in PLAIN.items() if name not in overrides}
        if configs[0].startswith("experiments/") and "data.mixture" not in overrides:
            plain |= {} if "data.source" in overrides else {"data.source": "text:notes"}
        arguments += flags(plain | SMALL)
    elif words[0] == "sample":
        arguments.append("--max_tokens=4")

    def reach(*_: Any, **__: Any) -> None:
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        for _, targets, _ in stops:
            for target in targets:
                patch.setattr(f"nanojaxgpt.{target}", reach)
        try:
            code, errors = call(arguments)
        except Reached:
            return
    assert not stops, f"{line} was to end at {stops[0][1]}"
    assert code == 0, f"nanojaxgpt {line}: exit {code}\n{errors}"


def load_script(name: str) -> ModuleType:
    """Import a file of scripts/."""
    return load_module(str(ROOT / "scripts" / f"{name}.py"))


def run_launch(words: list[str]) -> None:
    """Print what the launcher would do; check the config that it hands on."""
    own = words[: words.index("--")] if "--" in words else words
    launch = load_script("launch")
    assert launch.launch(launch.parse([*own, "--dry-run", *words[len(own) :]])) == 0
    others, overrides = split_overrides(words[len(own) + 1 :])
    for word in others:
        if word.startswith("--config=experiments/"):
            load_config(word.partition("=")[2], overrides)


def run_pip(words: list[str]) -> None:
    """Check that the extras exist; nothing is installed."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        for name in extra.split(","):
            assert name in setup["options.extras_require"], f"no extra {name}"


def run_code(words: list[str]) -> None:
    """Run `python -c CODE`; a download is only compiled."""
    code = compile(words[0], "python -c", "exec")
    if "download" not in words[0]:
        exec(code, {})


def run_file(words: list[str]) -> None:
    """Check that a script or a test file exists, and that bash can read it; they take minutes."""
    path = ROOT / next(word for word in words if "/" in word).split("::")[0]
    assert path.is_file(), path
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)


def run_reference(words: list[str]) -> None:
    """Compare the generated pages; they are not written."""
    assert load_script("reference").main(["--check"]) == 0


def run_picture(words: list[str]) -> None:
    """Compare the picture of the layers; it is not written."""
    assert load_script("draw_architecture").main(["--check"]) == 0


def run_nothing(words: list[str]) -> None:
    """Run nothing: OUTSIDE has the reason."""


RUNNERS: list[tuple[str, Callable[[list[str]], None]]] = [
    ("nanojaxgpt", run_nanojaxgpt),
    ("python -m nanojaxgpt", run_nanojaxgpt),
    ("python scripts/launch.py", run_launch),
    ("python scripts/reference.py", run_reference),
    ("python scripts/draw_architecture.py", run_picture),
    ("pip install", run_pip),
    ("python -c", run_code),
    ("python -m pytest", run_file),
    ("python scripts/bench_", run_file),
    ("python scripts/profile_step.py", run_file),
    ("python scripts/check_gpu.py", run_file),
    ("bash scripts/", run_file),
    *((command, run_nothing) for command in OUTSIDE),
]
ARGUMENTS_ONLY = (run_nanojaxgpt, run_launch, run_code)


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a bash block, up to a pipe."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words[: words.index("|")] if "|" in words else words


def run_bash(block: Block) -> None:
    """Run a bash block line by line."""
    for words in commands(block):
        line = shlex.join(words)
        found = [(name, run) for name, run in RUNNERS if f"{line} ".startswith(name)]
        assert found, f"nothing runs {line!r}: extend RUNNERS, or OUTSIDE with the reason"
        name, run = found[0]
        run(words[len(name.split()) :] if run in ARGUMENTS_ONLY else words)


def run_python(path: Path, block: Block, names: dict[str, Any]) -> None:
    """Run a python block; its functions that experiments declare are called as well."""
    lines = "\n" * block.line + block.code  # so that tracebacks name the page's line
    exec(compile(lines, str(path), "exec"), names)
    for function in ("get_config", "sweep", "get_paper"):
        if f"def {function}()" in block.code:
            names[function]()


def check_output(block: Block, output: str, place: str) -> None:
    """Compare a text block with what was printed: the lines in order, whatever the numbers."""
    left = [" ".join(line.split()) for line in output.splitlines()]
    for line in filter(None, map(str.strip, block.code.splitlines())):
        number = r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?"
        parts = re.split(r"[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?", " ".join(line.split()))
        pattern = re.compile(number.join(re.escape(p).replace(r"\.\.\.", ".*") for p in parts))
        found = [index for index, text in enumerate(left) if pattern.fullmatch(text)]
        assert found, f"{place}: {line!r} is not in the output:\n{output}"
        left = left[found[0] + 1 :]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW_PAGES)) for path in PAGES],
    ids=lambda path: path.stem,
)
def test_code_blocks_run(path: Path, desk: Path):
    names: dict[str, Any] = {"__name__": "page"}
    output = ""
    for block in read_blocks(path):
        place = f"{path.name}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: a fence names one of {LANGUAGES}"
        if block.title:
            (desk / block.title).parent.mkdir(parents=True, exist_ok=True)
            (desk / block.title).write_text(block.code)
        printed = StringIO()
        try:
            with redirect_stdout(printed):
                if block.language == "python":
                    run_python(path, block, names)
                elif block.language == "bash":
                    run_bash(block)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from error
        if block.language == "text" and block.output:
            check_output(block, output, place)
        output = printed.getvalue()


def test_every_exception_is_needed():
    blocks = [block for path in PAGES for block in read_blocks(path) if block.language == "bash"]
    lines = [" ".join(words) + " " for block in blocks for words in commands(block)]
    ours = [line.removeprefix("nanojaxgpt ") for line in lines if line.startswith("nanojaxgpt")]
    assert not [stop for stop, _, _ in STOPS if not any(re.search(stop, line) for line in ours)]
    assert not [name for name in OUTSIDE if not any(line.startswith(name) for line in lines)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", t) for t in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_resolve():
    pages = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("report.md"))]
    count, broken = 0, []
    for page in pages:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?://", target):
                continue
            count += 1
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
    assert count > 20


def test_pages_that_messages_name_exist():
    missing = {
        name
        for path in [*(ROOT / "nanojaxgpt").rglob("*.py"), *(ROOT / "scripts").glob("*")]
        if path.is_file()
        for name in re.findall(r"docs/\w+\.md", path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_site_lists_every_page():
    listed = re.findall(r"\b(\w+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_map_shows_every_module():
    names = {path.name for path in (ROOT / "nanojaxgpt").glob("*.py")} - {"__init__.py"}
    names |= {f"{path.parent.name}/" for path in (ROOT / "nanojaxgpt").glob("*/__init__.py")}
    shown = re.findall(r"\w+\.py|\w+/", (ROOT / "docs" / "architecture.md").read_text())
    assert not names - set(shown)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_generated_pages_are_up_to_date():
    reference = load_script("reference")
    written = {path.name for path in reference.pages()}
    assert written == {"attention.md", "config.md", "migrate.md"}
    assert reference.main(["--check"]) == 0


def test_reference_notices_a_change_and_help_writes_nothing(tmp_path, monkeypatch):
    reference = load_script("reference")
    page = tmp_path / "config.md"
    page.write_text("old")
    monkeypatch.setattr(reference, "pages", lambda: {page: "new"})
    with pytest.raises(SystemExit):
        reference.main(["--help"])
    assert reference.main(["--check"]) == 1
    assert page.read_text() == "old"
    assert reference.main([]) == 0
    assert page.read_text() == "new"


@pytest.mark.parametrize(
    ("shown", "printed", "agrees"),
    [
        ("loss 3.50 after 2 steps", "x\nloss 1.23e-04 after 40 steps\ny", True),
        ("loss 3.50", "lost 3.50", False),
        ("a ... z", "a b c z", True),
        ("first\nsecond", "second\nfirst", False),
    ],
)
def test_output_check_sees_differences(shown: str, printed: str, agrees: bool):
    block = Block(1, "text", "", shown, True)
    if agrees:
        check_output(block, printed, "")
    else:
        with pytest.raises(AssertionError, match="not in the output"):
            check_output(block, printed, "")


def test_the_picture_of_the_layers_is_up_to_date():
    assert load_script("draw_architecture").main(["--check"]) == 0
