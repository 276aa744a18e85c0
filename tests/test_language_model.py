"""The model as Python code uses it: loaded, asked for logits, scores and texts, saved, sharded."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import nanojaxgpt
from nanojaxgpt import language_model
from nanojaxgpt.config import override_config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.training import fit

GREEDY = dict(max_tokens=24, temperature=0.0)
PROMPTS = ["def f(", "class ", "import numpy as"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run whose sizes eight devices divide."""
    folder = tmp_path_factory.mktemp("model")
    lines = [f"def f{n}(x):\n    return x + {n}\n\nclass C{n}:\n    pass\n\n" for n in range(300)]
    (folder / "corpus.txt").write_text("".join(lines))
    fields = {
        "model.num_layers": "2", "model.embed_dim": "32", "model.num_heads": "4",
        "model.num_kv_heads": "2", "model.seq_len": "64", "model.vocab_size": "264",
        "model.positions": "rotary", "data.source": f"text:{folder}/corpus.txt",
        "data.tokenizer": "bytes", "data.cache_dir": f"{folder}/cache",
        "train.num_steps": "40", "train.batch_size": "8", "eval.num_batches": "2",
        "optim.warmup_steps": "2", "optim.learning_rate": "0.01",
    }  # fmt: skip
    fit(override_config(nanojaxgpt.base_config(), fields), folder / "run", report=lambda _: None)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run):
    return nanojaxgpt.load(run)


def test_the_public_names_are_imported_when_they_are_used():
    code = "import sys, nanojaxgpt; print('jax' in sys.modules); print(nanojaxgpt.base_config())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\n")
    for name in nanojaxgpt.__all__:
        assert callable(getattr(nanojaxgpt, name)), name
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        nanojaxgpt.loda  # noqa: B018


def test_logits_are_those_of_the_forward_pass(model):
    ids_BT = np.array([model.encode(PROMPTS[0])])
    expected, _ = Transformer(model.config).apply({"params": model.params}, ids_BT)
    found = model.logits([PROMPTS[0]])
    assert found.dtype == np.float32
    assert found.shape == (1, ids_BT.shape[1], model.tokenizer.vocab_size)
    np.testing.assert_allclose(found, expected[..., : found.shape[-1]], atol=1e-5)
    np.testing.assert_allclose(model.logits(ids_BT), found, atol=1e-5)
    longest = model.logits(PROMPTS)
    np.testing.assert_allclose(longest[0, : found.shape[1]], found[0], atol=1e-5)
    with pytest.raises(ConfigError, match="don't fit a context"):
        model.logits(["x" * (model.config.seq_len + 1)])


def test_scores_add_up_and_see_what_greedy_decoding_gives(model):
    prompt = PROMPTS[0]
    text = model.generate([prompt], **GREEDY)[0]
    score = model.score(prompt, text)
    assert score.greedy
    assert score.tokens == len(model.tokenizer.encode(text))
    whole = model.score("def f1", "(x): return")
    parts = model.score("def f1", "(x)"), model.score("def f1(x)", ": return")
    total = sum(part.log_probability for part in parts)
    np.testing.assert_allclose(whole.log_probability, total, atol=1e-4)
    other = model.score(prompt, text[:-1] + ("a" if text[-1] != "a" else "b"))
    assert not other.greedy
    assert other.log_probability < score.log_probability
    moved = model.score("def ", "f"), model.score("def", " f")
    assert moved[0] == moved[1]
    assert model.score("", "def").tokens == 3
    with pytest.raises(ConfigError, match="can't be scored"):
        model.score("a", "")


def test_generate_is_what_the_command_prints(model, run, capsys):
    from nanojaxgpt.__main__ import main

    text = model.generate([PROMPTS[0]], **GREEDY)[0]
    assert main(["sample", str(run), f"--prompt={PROMPTS[0]}", "--temperature=0",
                 "--max_tokens=24"]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"{PROMPTS[0]}{text}\n"
    streamed = list(model.stream(PROMPTS, **GREEDY))
    assert len(streamed) > 2
    joined = ["".join(parts) for parts in zip(*streamed, strict=True)]
    assert joined == model.generate(PROMPTS, **GREEDY)
    assert joined[0] == text
    assert model.generate([]) == []
    seeded = [model.generate(PROMPTS, max_tokens=9, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_saved_model_is_a_run(model, tmp_path, capsys):
    model.save(tmp_path / "copy")
    again = nanojaxgpt.load(tmp_path / "copy")
    assert capsys.readouterr().err == ""
    assert again.step == model.step
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.generate(PROMPTS, **GREEDY) == model.generate(PROMPTS, **GREEDY)
    with pytest.raises(ConfigError, match="not an empty folder"):
        model.save(tmp_path / "copy")
    with pytest.raises(ConfigError, match="must be one of run"):
        model.save(tmp_path / "other", format="onnx")


def test_evaluate_is_what_the_command_prints(model, run, capsys):
    from nanojaxgpt.__main__ import main

    found = nanojaxgpt.evaluate(model)
    assert main(["eval", str(run)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pytest.approx({"step": model.step, **found}, rel=1e-5)  # on another mesh


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "tensor": 2, "data": 2}, {"data": 8}, {"fsdp": 8}], ids=str
)
def test_tokens_on_a_mesh_are_those_of_one_device(model, run, sizes):
    sharded = language_model.load(run, mesh=sizes)
    leaf = sharded.params["layers"]["up_DF"]
    assert len(leaf.sharding.device_set) == 8
    for prompts in (PROMPTS[:1], PROMPTS):
        assert sharded.generate(prompts, **GREEDY) == model.generate(prompts, **GREEDY)
    np.testing.assert_allclose(sharded.logits(PROMPTS), model.logits(PROMPTS), atol=1e-4)


def test_fit_is_the_public_train():
    assert getattr(nanojaxgpt, "train") is fit  # noqa: B009
