"""A model of another format in every command: opened, checked, trained, exported, talked with."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, write_corpus
from safetensors.numpy import load_file

import nanojaxgpt
from nanojaxgpt import rundir
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.training import fit

LETTERS = "abcdefghijklmnopqrstuvwxy, \n|"  # the last one ends a text
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}, {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a, {% endif %}"
)


@pytest.fixture(autouse=True)
def small_heap(monkeypatch):
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """Return a Hugging Face folder of a tiny Llama, with a tokenizer and a chat template."""
    copied = shutil.copytree(ROOT / "tests" / "golden" / "llama", tmp_path / "llama")
    (copied / "tokenizer.json").write_bytes(export_characters(LETTERS))
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    text = (copied / "config.json").read_text().replace('"eos_token_id": 0', '"eos_token_id": 28')
    (copied / "config.json").write_text(text)
    return copied


@pytest.fixture
def experiment(folder, tmp_path):
    """Return a function that gives a config which starts from the folder, with changes."""
    corpus = write_corpus(tmp_path, 3000)
    fields = {
        "init.from_model": str(folder), "data.source": f"text:{corpus}", "model.seq_len": "32",
        "model.vocab_size": "32", "data.cache_dir": f"{tmp_path}/cache", "train.num_steps": "4",
        "train.batch_size": "8", "train.log_every_steps": "1", "eval.num_batches": "2",
        "optim.warmup_steps": "1", "mesh.data": "1", "data.lossy_tokenizer": "True",
    }  # fmt: skip
    return lambda **changes: override_config(base_config(), fields | changes)


def devices(monkeypatch, count: int) -> None:
    every = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: every[:count])


def test_what_is_saved_is_the_model_that_was_loaded(folder, tmp_path):
    model = nanojaxgpt.load(folder)
    ids_BT = np.arange(40)[None] * 7 % 28
    wanted = model.logits(ids_BT)
    assert np.isfinite(wanted).all()
    for form in ("run", "hf", "gguf"):
        if form == "gguf":
            with pytest.raises(ConfigError, match="splits texts in a way"):
                model.save(tmp_path / "m.gguf", format=form)
            continue
        model.save(tmp_path / form, format=form)
        back = nanojaxgpt.load(tmp_path / form)
        assert np.array_equal(back.logits(ids_BT), wanted)
        assert back.chat_template == TEMPLATE
        assert back.generate(["a, b"], max_tokens=9, temperature=0.0) == model.generate(
            ["a, b"], max_tokens=9, temperature=0.0
        )
        with pytest.raises(ConfigError, match="not an empty folder"):
            model.save(tmp_path / form, format=form)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_every_command_takes_a_folder(folder, tmp_path, capsys):
    corpus = write_corpus(tmp_path, 500)
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "llama: 2 layers" in said
    assert "template    " in said
    assert "by chance 3.3" in said
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", str(folder), str(run)]) == 0
    assert main(["export", str(run), str(out), "--dtype=bfloat16"]) == 0
    stored = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"bfloat16"}
    assert "from `llama`" in (out / "README.md").read_text()
    capsys.readouterr()
    accept = [f"--data=text:{corpus}", "--config.data.lossy_tokenizer=True"]
    assert main(["eval", str(folder), *accept]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run), *accept]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["sample", str(folder), "--prompt=a, b", "--max_tokens=5", "--temperature=0"]) == 0
    shown = capsys.readouterr().out
    assert main(["sample", str(run), "--prompt=a, b", "--max_tokens=5", "--temperature=0"]) == 0
    assert capsys.readouterr().out == shown
    assert not (folder / "samples").exists()


def test_a_conversation_in_the_terminal(folder, tmp_path, capsys, monkeypatch):
    typed = ["hello", "\udcff", "/retry", "again", "/undo", "/nope", "/temperature warm", "/undo",
             "/undo", f"/save {tmp_path}/talk.json", "/system brief", "hi", "/quit",
             "more"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed) + "\n"))
    assert main(["chat", str(folder), "--max_tokens=6", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 4
    assert out.splitlines()[0] == out.splitlines()[1]  # the same answer, greedily
    assert "no command /nope" in err
    assert "not valid UTF-8" in err
    assert "temperature" in err
    assert "no message to take back" in err
    assert json.loads((tmp_path / "talk.json").read_text()) == []


def test_a_base_model_continues_what_is_typed(folder, capsys, monkeypatch):
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("a, b\n"))
    assert main(["chat", str(folder), "--max_tokens=6", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    model = nanojaxgpt.load(folder)
    assert out == model.generate(["a, b"], max_tokens=6, temperature=0.0)[0] + "\n"
    assert "no chat template" in err
    with pytest.raises(ConfigError, match="no chat template"):
        _ = model.template


@pytest.mark.slow
def test_a_run_starts_from_a_model_on_one_device_and_on_a_mesh(
    folder, experiment, tmp_path, monkeypatch
):
    devices(monkeypatch, 4)
    mesh = {"mesh.data": "2", "mesh.fsdp": "2"}
    fit(experiment(**mesh), tmp_path / "mesh", report=lambda _: None)
    devices(monkeypatch, 1)
    fit(experiment(), tmp_path / "one", report=lambda _: None)
    scratch = {"init.from_model": "", "model.vocab_size": "0"}
    fit(experiment(**scratch), tmp_path / "scratch", report=lambda _: None)
    losses = {name: [r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r]
              for name in ("mesh", "one", "scratch")}  # fmt: skip
    np.testing.assert_allclose(losses["mesh"], losses["one"], rtol=1e-4)
    assert abs(losses["one"][0] - losses["scratch"][0]) > 0.1
    shutil.rmtree(folder)  # a run that was begun has all that it needs
    fit(experiment(**{"train.num_steps": "4"}), tmp_path / "one", report=lambda _: None)
    model = nanojaxgpt.load(tmp_path / "one")
    assert model.chat_template == TEMPLATE
    model.save(tmp_path / "out", format="hf")
    back = nanojaxgpt.load(tmp_path / "out")
    assert back.config.vocab_size == 32
    ids_BT = np.arange(30)[None] % 28
    assert np.array_equal(back.logits(ids_BT), model.logits(ids_BT))


REFUSED = {
    "model.num_layers": ("3", "model.num_layers=3, but it has 2"),
    "model.norm_eps": ("0.5", r"model.norm_eps=0.5, but it has"),
    "model.seq_len": ("4096", r"model.seq_len=4096, but its context has \d+ tokens"),
    "model.vocab_size": ("30", "model.vocab_size=30, but it has 31"),
    "init.from_run": ("runs/x", "init.from_run and init.from_model"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_model_has_otherwise_is_refused(field, experiment, tmp_path):
    value, said = REFUSED[field]
    with pytest.raises(ConfigError, match=said):
        fit(experiment(**{field: value}), tmp_path / "run", report=lambda _: None)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_longer_context_needs_a_scaling_that_is_named(folder, experiment, tmp_path, monkeypatch):
    devices(monkeypatch, 1)
    longer = {"model.seq_len": "512", "model.rotary": "('scaling=linear factor=4',)",
              "train.num_steps": "1", "train.batch_size": "1"}  # fmt: skip
    fit(experiment(**longer), tmp_path / "run", report=lambda _: None)
    assert rundir.read_config(tmp_path / "run").model.rotary == ("scaling=linear factor=4",)


def test_what_is_no_model_is_named(folder, tmp_path, capsys):
    pickle = tmp_path / "model.pt"
    pickle.write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    for name, code, said in (
        (pickle, 2, "can run code"), (tmp_path / "notes.txt", 2, "is not a model"),
        (tmp_path / "none", 2, "not a run directory"), ("hf:no/such@model", 2, "no/such"),
    ):  # fmt: skip
        assert main(["check", str(name)]) == code
        assert said in capsys.readouterr().err
    assert main(["export", str(folder), "/dev/null"]) == 2
    assert main(["export", str(folder), str(tmp_path / "it.gguf")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert main(["sample", str(folder)]) == 5
    assert "has no model.safetensors" in capsys.readouterr().err
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert main(["sample", str(folder)]) == 5
    assert "pickle" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    assert main(["chat", str(folder)]) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": None}, {"vocab_size": 0}, {"hidden_act": []}, {"hidden_act": {}},
        {"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_other_kinds_is_refused(change, folder, capsys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["check", str(folder)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_chat_without_input_or_without_tokens_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", str(folder)]) == 0
    (folder / "chat_template.jinja").write_text("{% if false %}x{% endif %}")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(folder)]) == 0
    assert "gives no token" in capsys.readouterr().err


def test_a_harmful_template_is_refused_before_anything_is_typed(folder, capsys, monkeypatch):
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__base__ }}")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(folder)]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "unsafe" in err
