"""Every experiment loads, checks, and has the number of parameters that it declares."""

from pathlib import Path

import pytest
from conftest import ROOT, SHARED, data_config

from nanojaxgpt.config import check_config, load_config, load_module
from nanojaxgpt.data.loader import open_task
from nanojaxgpt.data.tasks import task_rows
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import count_params
from nanojaxgpt.papers.paper import load_paper
from nanojaxgpt.sweep.plan import load_trials

FILES = sorted((ROOT / "experiments").glob("*.py"))
RECIPES = sorted((ROOT / "experiments" / "finetune").glob("*.py"))
PAPERS = sorted((ROOT / "experiments" / "papers").glob("*.py"))
CASES = [
    (path, variant)
    for path in FILES
    for variant in getattr(load_module(str(path)), "NUM_PARAMS", {"": 0})
]
VOCABULARY = {"shakespeare_char": 65, "quickstart": 2048}  # of their corpora, by their tokenizers


@pytest.mark.parametrize(("path", "variant"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_it_has_the_parameters_it_declares(path: Path, variant: str):
    cfg = load_config(f"{path}:{variant}" if variant else str(path)).unlock()
    check_config(cfg)
    cfg.model.vocab_size = cfg.model.vocab_size or VOCABULARY[path.stem]
    declared = getattr(load_module(str(path)), "NUM_PARAMS", {}).get(variant)
    assert declared in (None, count_params(ModelConfig(**cfg.model)))


@pytest.mark.parametrize("path", [*FILES, *RECIPES], ids=lambda path: path.stem)
def test_its_docstring_holds_its_command(path: Path):
    name = path.relative_to(ROOT / "experiments")
    assert f"--config=experiments/{name}" in load_module(str(path)).__doc__


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_paper_is_complete(path: Path):
    paper = load_paper(str(path))  # checks claims, criteria and the arms' configs
    assert f"reproduce experiments/papers/{path.name}" in load_module(str(path)).__doc__
    declared = getattr(load_module(str(path)), "NUM_PARAMS", {})
    assert paper.needs == "" or declared.keys() == {arm.name for arm in paper.arms}
    for arm in paper.arms:
        cfg = arm.config.copy_and_resolve_references().unlock()
        cfg.model.vocab_size = cfg.model.vocab_size or 65
        found = count_params(ModelConfig(**cfg.model))
        assert found == declared.get(arm.name, found)
        if cfg.data.source.startswith("task:"):
            task_rows(open_task(cfg.data.source)[1], cfg.model.seq_len)


@pytest.mark.parametrize(("path", "variant"), CASES, ids=lambda v: getattr(v, "stem", v))
def test_every_point_of_its_sweep_fits_the_config(path: Path, variant: str):
    if not hasattr(load_module(str(path)), "sweep"):
        pytest.skip("it declares no sweep")
    assert len(load_trials(f"{path}:{variant}" if variant else str(path), {})) > 1


def test_a_variant_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="tiny"):
        load_config(f"{ROOT}/experiments/gpt2.py:tiny")


def test_shakespeare_is_nanogpts_split(tmp_path):
    text = SHARED / "data" / "tinyshakespeare.txt"
    if not text.exists():
        pytest.skip(f"needs Tiny Shakespeare at {text}")
    from nanojaxgpt.data.store import prepare

    data = data_config(source=f"text:{text}", tokenizer="chars")
    store = prepare(data, tmp_path, report=lambda _: None).parts[0].store
    assert store.tokenizer.vocab_size == 65
    assert store.split(0.1) == ((0, 1_003_854), (1_003_854, 1_115_394))
    paper = load_paper(str(ROOT / "experiments" / "papers" / "shakespeare_char_cpu.py"))
    assert store.identity()["tokens"] == paper.tokens
