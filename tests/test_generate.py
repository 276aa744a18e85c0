"""`nanojaxgpt generate`: each row has the answer it has alone, in order, once, after a kill too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from conftest import ROOT, command
from pyarrow import parquet
from test_engine import make_model

from nanojaxgpt.commands.generate import generate
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import Request

OPTIONS = ("--max_tokens=6", "--slots=2", "--temperature=1")
ROWS = [
    {"prompt": "abc", "id": "first"},
    {"prompt": "hello there", "seed": 7, "max_tokens": 9, "alternatives": 1},
    {"prompt": [97, 98], "temperature": 0.0, "note": {"any": [1, None]}},
    {"prompt": "abc", "stop": "e", "logit_bias": {"101": 100}},
    {"prompt": "", "max_tokens": 3},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the run directory of a tiny model."""
    folder = tmp_path_factory.mktemp("model") / "run"
    make_model().save(folder)
    return folder


def write_rows(path: Path, rows: list) -> Path:
    """Write JSON lines; what is text already stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_have_the_answers_that_their_requests_have_alone(run, tmp_path, capsys):
    source, target = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    generate([str(run), str(source), str(target), *OPTIONS])
    assert capsys.readouterr().out == f"{target}: 5 rows, 5 new\n"
    found = read_rows(target)
    for row, answer in zip(ROWS, found, strict=True):
        assert {name: answer[name] for name in row} == row
    requests = [
        Request((97, 98, 99), 6, seed=0),
        Request(tuple(b"hello there"), 9, seed=7, alternatives=1),
        Request((97, 98), 6, temperature=0.0),
        Request((97, 98, 99), 6, seed=3, stop=("e",), logit_bias=((101, 100),)),
        Request((256,), 3, seed=4),
    ]
    with Engine(make_model(), slots=2) as engine:
        alone = [engine.submit(request).result() for request in requests]
    for request, part, answer in zip(requests, alone, found, strict=True):
        assert (answer["text"], answer["finish"]) == (part.text, part.finish)
        assert answer["tokens"] == len(part.ids)
        assert answer["prompt_tokens"] == len(request.ids)
    assert found[3]["text"] == ""
    assert found[1]["scores"] == json.loads(json.dumps([s._asdict() for s in alone[1].scores]))
    assert "scores" not in found[0]


def test_a_draft_model_changes_no_row(run, tmp_path, monkeypatch):
    make_model(num_layers="1").save(tmp_path / "small")
    source, engines = write_rows(tmp_path / "in.jsonl", ROWS), list[Engine]()
    close = Engine.close
    monkeypatch.setattr(
        Engine, "close", lambda *of, **how: engines.append(*of) or close(*of, **how)
    )
    for name, option in (("plain", "--lookahead=4"), ("drafted", f"--draft={tmp_path / 'small'}")):
        generate([str(run), str(source), str(tmp_path / name), *OPTIONS, option])
    assert engines[1].lookahead == 4
    assert engines[1].draft_tokens > engines[0].draft_tokens
    assert read_rows(tmp_path / "drafted") == read_rows(tmp_path / "plain")
    with pytest.raises(ConfigError, match="nowhere is not a run directory"):
        generate([str(run), str(source), str(tmp_path / "no"), "--draft=nowhere"])


def test_an_interrupted_file_goes_on_where_it_stopped(run, tmp_path, capsys):
    source, target = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    call = [str(run), str(source), str(target), *OPTIONS]
    generate(call)
    whole = target.read_bytes()
    lines = whole.splitlines(keepends=True)
    for done, torn in ((0, 9), (2, 0), (3, 1), (4, len(lines[4]) - 1)):
        target.write_bytes(b"".join(lines[:done]) + lines[done][:torn])
        generate(call)
        assert target.read_bytes() == whole
    capsys.readouterr()
    generate(call)
    assert capsys.readouterr().out == f"{target}: 5 rows, 0 new\n"
    write_rows(source, [*ROWS, {"prompt": "more"}])
    generate(call)
    assert target.read_bytes().startswith(whole)
    assert len(read_rows(target)) == 6


def test_a_file_of_other_answers_is_refused(run, tmp_path):
    source, target = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    call = [str(run), str(source), str(target), *OPTIONS]
    generate(call)
    whole = target.read_bytes()
    with pytest.raises(
        ConfigError, match=r"out\.jsonl:1 was written by another model or with other"
    ):
        generate([*call, "--top_k=3"])
    write_rows(source, [ROWS[0], {"prompt": "another"}, *ROWS[2:]])
    with pytest.raises(ConfigError, match=r"out\.jsonl:2 is not the answer to row 2"):
        generate(call)
    write_rows(source, ROWS[:3])
    with pytest.raises(ConfigError, match=r"out\.jsonl:4 is not the answer to row 4"):
        generate(call)
    assert target.read_bytes() == whole
    target.write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl:1 is not a row of answers"):
        generate(call)
    assert target.read_text() == "my notes\n"


def test_a_row_that_is_wrong_has_its_error_and_the_others_their_answers(run, tmp_path):
    rows = [
        {"prompt": "abc"},
        "{oops",
        "[1]",
        {"id": 3},
        {"prompt": "a", "messages": []},
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "max_tokens": "9"},
        {"prompt": "a" * 65},
        {"prompt": [300]},
        {"prompt": 5},
        {"prompt": "a", "logit_bias": [1]},
        {"prompt": "\ud800"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "a", "text": "mine"},
        {"prompt": "abc", "seed": 0},
    ]
    problems = [
        "line 2 is not JSON", "line 3 holds a list, not an object",
        "needs either prompt or messages; it has id", "it has prompt and messages",
        "no option 'temprature'; did you mean temperature?", "temperature=-1", "max_tokens='9'",
        "65 tokens, more than the context of 64", "ids contains 300", "prompt=5 is an integer",
        "logit_bias=[1] must map ids", "surrogate", "has no chat template",
        "a field 'text', which is one of the answer's",
    ]  # fmt: skip
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    call = [str(run), str(source), str(target), *OPTIONS]
    for _ in range(2):  # the second call has nothing to do, and says so again
        with pytest.raises(DataError, match="14 of 16 rows have an error"):
            generate(call)
    found = read_rows(target)
    assert [row["id"] for row in found if "id" in row] == [3]
    for row, problem in zip(found[1:-1], problems, strict=True):
        assert problem in row["error"]
    assert found[0]["text"] == found[-1]["text"]


def test_answers_fit_a_schema_of_the_command_or_of_the_row(run, tmp_path):
    choice = tmp_path / "schema.json"
    choice.write_text('{"enum": ["yes", "no"]}')
    rows = [
        {"prompt": "abc"},
        {"prompt": "abc", "schema": {"const": [1, "é"]}},
        {"prompt": "abc", "schema": '{"const": true}'},
        {"prompt": "abc", "schema": ""},
        {"prompt": "abc", "schema": {"type": "objekt"}},
        {"prompt": "abc", "schema": ["a"]},
    ]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    call = [str(run), str(source), str(target), *OPTIONS, "--max_tokens=9", f"--schema={choice}"]
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 6 rows"):
            generate(call)
    found = read_rows(target)
    assert found[0]["text"] in ('"yes"', '"no"')
    assert [row["text"] for row in found[1:3]] == ['[1,"é"]', "true"]
    assert found[3]["finish"] == "length"
    assert "objekt" in found[4]["error"]
    assert "schema=['a'] is not the text" in found[5]["error"]
    with pytest.raises(ConfigError, match="other options"):
        generate([*call, "--lookahead=2"])  # on which bits depend
    choice.write_text('{"enum": ["yes"]}')
    with pytest.raises(ConfigError, match="other options"):
        generate(call)
    choice.write_text('{"enum": []}')
    call[2] = str(tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match="schema can't be followed"):
        generate(call)


def test_parquet_comes_in_and_goes_out(run, tmp_path):
    rows = [{"prompt": "abc", "id": 1}, {"prompt": "de", "id": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = write_rows(tmp_path / "in.jsonl", rows)
    generate([str(run), str(source), str(tmp_path / "out.jsonl"), *OPTIONS])
    call = [str(run), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"), *OPTIONS]
    generate(call)
    found = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert found == read_rows(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.parquet.jsonl").exists()
    with pytest.raises(ConfigError, match="there already"):
        generate(call)


def test_arguments_are_checked(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    for arguments, error, message in (
        ([], ConfigError, "needs a model and two files"),
        ([source], ConfigError, "needs a model and two files"),
        ([tmp_path / "none", tmp_path / "out"], DataError, "none can't be read: No such file"),
        ([source, source], ConfigError, "the same file"),
        ([source, tmp_path / "no" / "out"], ConfigError, "there is no folder"),
        ([source, tmp_path / "out", "--slots=0"], ConfigError, "must be at least 1"),
        ([source, tmp_path / "out", "--prompt=a"], ConfigError, "no option --prompt"),
        ([source, tmp_path / "out", "--schema=none"], ConfigError, "--schema=none can't be read"),
    ):
        with pytest.raises(error, match=message):
            generate([str(run), *map(str, arguments)])


@pytest.mark.slow
def test_killed_processes_lose_no_row_and_write_none_twice(run, tmp_path):
    rows = [{"prompt": f"row {number}", "id": number} for number in range(400)]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    options = ("--max_tokens=40", "--slots=4", "--temperature=1")
    assert command("generate", run, source, whole, *options).returncode == 0
    arguments = [sys.executable, "-m", "nanojaxgpt", "generate", run, source, target, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed, least = 0, 0
    while killed < 3:
        with subprocess.Popen([*map(str, arguments)], env=environment) as process:
            while process.poll() is None:
                size = target.read_bytes().count(b"\n") if target.exists() else 0
                if size >= least + 40:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL
        killed, least = killed + 1, target.read_bytes().count(b"\n")
        assert 0 < least < len(rows)
    assert command("generate", run, source, target, *options).returncode == 0
    assert target.read_bytes() == whole.read_bytes()
