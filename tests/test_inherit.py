"""What starts from another run's parameters reads text with that run's tokenizer, or is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from nanojaxgpt import finish, rundir, training
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import override_config, typed
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.tokenizers import load_tokenizer, train_tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.opening import adopt_model
from nanojaxgpt.rundir import load_run
from nanojaxgpt.sweep.plan import program_key


@pytest.fixture
def parent(tmp_path, small_config):
    """Return the directory of a run that has a config and a tokenizer of five letters."""
    run = tmp_path / "parent"
    (run / "tokenizer").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(small_config().to_dict()))
    train_tokenizer("chars", ["abcde"], 0).save(run / "tokenizer")
    return run


@pytest.fixture
def child(tmp_path, small_config, parent):
    """Return a function that gives the config of a run which starts from `parent`."""

    def build(text="eddabc" * 50, spec="", /, **changes):
        (tmp_path / "other.txt").write_text(text)
        given = {"data.source": f"text:{tmp_path}/other.txt", "data.tokenizer": spec}
        return small_config(**given | {"init.from_run": str(parent)} | changes)

    return build


def quiet(cfg, run=None):
    return prepare_data(cfg, lambda _: None, run)


def test_unset_tokenizer_is_inherited(child, parent):
    data = quiet(child("edd" * 100))
    assert data.tokenizer.content_hash() == load_tokenizer(parent / "tokenizer").content_hash()
    read = data.train(16)[0].rows
    assert data.tokenizer.vocab_size == 5  # the corpus has two letters
    assert read.count


def test_unset_tokenizer_without_a_parent_is_bytes(child):
    cfg = child(**{"init.from_run": ""})
    data = quiet(cfg)
    assert data.tokenizer.kind == "bytes"
    assert resolve(cfg, data).data.tokenizer == "bytes"  # as the configs of older runs say
    assert resolve(typed(cfg), data) == typed(resolve(cfg, data))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("chars", "fghij" * 100),  # of the same size
        ("chars", "abcd" * 100),
        ("bytes", "abcde" * 100),
        ("sentencepiece", "abcde abc " * 100),
    ],
)
def test_another_tokenizer_is_refused(spec, text, child, parent, tmp_path):
    with pytest.raises(ConfigError, match=r"different tokenizer.*in init.*leave data\.tokenizer"):
        quiet(child(text, spec, **{"data.tokenizer_vocab_size": "270"}))
    assert not list((tmp_path / "cache").rglob("*.tokens"))  # nothing was tokenized in vain


def test_the_same_tokenizer_by_name_is_accepted(child):
    assert quiet(child("edcba" * 100, "chars")).tokenizer.characters == "abcde"


def test_text_that_an_inherited_tokenizer_lacks_is_refused(child):
    with pytest.raises(DataError, match=r"character 'z' \(U\+007A\)"):
        quiet(child("abz" * 100))


def test_task_must_have_the_parents_words(child, parent):
    cfg = child(**{"data.source": "task:modular_addition,p=11"})
    with pytest.raises(ConfigError, match=r"task:modular_addition,p=11 .*different tokenizer"):
        quiet(cfg)
    first = override_config(cfg, {"init.from_run": ""})
    quiet(first).tokenizer.save(parent / "tokenizer")
    assert quiet(cfg).tokenizer.kind == "words"
    assert resolve(cfg, quiet(cfg)).data.tokenizer == "bytes"  # as the configs of older runs say


def test_parent_that_is_not_a_run_is_a_config_error(child, parent):
    (parent / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"parent"):
        quiet(child())
    shutil.rmtree(parent)
    with pytest.raises(ConfigError, match=r"parent"):
        quiet(child())


def test_parent_without_a_tokenizer_is_a_data_error(child, parent):
    shutil.rmtree(parent / "tokenizer")
    with pytest.raises(DataError, match=r"no tokenizer in .*parent/tokenizer"):
        quiet(child())


def test_the_parents_tokenizer_is_compared_with_its_identity(child, parent):
    identity, own = parent / "identity.json", load_tokenizer(parent / "tokenizer").content_hash()
    for data in (dict(parts=[dict(tokenizer="0" * 16)]), dict(tokenizer="0" * 16)):
        identity.write_text(json.dumps(dict(data=data)))
        with pytest.raises(
            DataError, match=rf"hash is {own}, but identity\.json has 0{{16}}; rest"
        ):
            quiet(child("abcde" * 60))
    identity.write_text(json.dumps(dict(data=dict(parts=[dict(tokenizer=own)]))))
    assert quiet(child("abcde" * 60)).tokenizer.content_hash() == own
    for content in (b"[", b'{"data": 3}', b"{}", None):
        identity.unlink()
        identity.write_bytes(content) if content else os.mkfifo(identity)
        said = []
        prepare_data(child("abcde" * 60), said.append)
        assert [line for line in said if "identity.json" in line] == [
            f"WARNING: {identity} is damaged, so the tokenizer can't be compared with the run's"
        ]
    cfg = json.loads((parent / "config.json").read_text())
    cfg["model"]["vocab_size"] = 4
    (parent / "config.json").write_text(json.dumps(cfg))
    with pytest.raises(DataError, match=r"has 5 tokens, but .* model\.vocab_size=4"):
        quiet(child("abcde" * 60))


def test_trials_of_other_parents_share_no_data(child):
    assert program_key(child()) != program_key(child(**{"init.from_run": "other"}))
    assert program_key(child()) == program_key(child(**{"init.step": "5"}))


def test_run_keeps_what_it_inherited(child, parent, tmp_path, monkeypatch, capsys):
    """A run that was begun is opened again without its parent, by `fit` and by every command."""
    run, cfg = tmp_path / "run", child(**{"mesh.data": "-1"})
    opened = []

    def begin(job, run, *_):
        opened.append(job.data.identity)
        training.begin_run(job, run, lambda _: None)

    monkeypatch.setattr(training, "train_job", begin)
    monkeypatch.setattr(finish, "end_run", lambda *_: None)
    training.fit(cfg, run, report=lambda _: None)
    kept = load_tokenizer(run / "tokenizer")
    assert kept.content_hash() == load_tokenizer(parent / "tokenizer").content_hash()
    assert load_run(run).data.tokenizer == ""
    shutil.rmtree(parent)
    training.fit(cfg, run, report=lambda _: None)
    assert opened[0] == opened[1]
    for command in ("inspect", "prepare"):
        assert main([command, str(run)]) == 0
    assert "'e'" in capsys.readouterr().out


def test_the_vocabulary_of_a_run_does_not_grow(parent, small_config):
    """Its checkpoint has rows for its own tokens; a model of another format is given zeros."""
    run = {"init.from_model": str(parent)}
    known = rundir.read_config(parent).model.vocab_size
    cfg = typed(small_config(**run | {"model.vocab_size": str(known + 1)}))
    with pytest.raises(ConfigError, match=rf"vocab_size={known + 1}, but it has {known}"):
        adopt_model(cfg, Path("new"))
