"""`nanojaxgpt sample` of models that were never trained: prompts, stop strings, end ids."""

import functools
import json

import jax
import pytest

from nanojaxgpt import checkpoint, memory, text_stream
from nanojaxgpt.commands.sample import sample
from nanojaxgpt.config import base_config, override_config, to_json
from nanojaxgpt.data.tokenizers import ByteTokenizer, CharTokenizer, WordTokenizer
from nanojaxgpt.errors import ConfigError, MemoryExceeded
from nanojaxgpt.model.transformer import init_params


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Return a function of a tokenizer that gives a run with a padded vocabulary."""

    def load_params(run, cfg, mesh, step, *_):
        fresh = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
        return 1, jax.tree.map(lambda x: x * 5, fresh)

    def build(tokenizer, seq_len=16):
        small = dict(num_layers=1, embed_dim=16, num_heads=2, seq_len=seq_len)
        small["vocab_size"] = tokenizer.vocab_size + 7
        cfg = override_config(base_config(), {f"model.{k}": str(v) for k, v in small.items()})
        (tmp_path / "tokenizer").mkdir()
        tokenizer.save(tmp_path / "tokenizer")
        (tmp_path / "config.json").write_text(to_json(cfg))
        return tmp_path

    monkeypatch.setattr(checkpoint, "load_params", load_params)
    return build


@pytest.fixture
def sampled(capsys):
    """Return a function that samples, and gives what it prints: standard output, then error."""

    def call(run, *arguments):
        sample([str(run), *arguments])
        return capsys.readouterr()

    return call


def test_a_long_prompt_keeps_its_end(run_of, sampled):
    run, prompt = run_of(CharTokenizer("abcdefgh ")), "fed cab " * 5
    some = functools.partial(sampled, run, "--max_tokens=9", "--num_samples=2")
    out, err = some(f"--prompt={prompt}")
    assert "the prompt has 40 tokens; the model sees the last 16, its context" in err
    assert out.count(prompt) == 2
    cut_out, err = some(f"--prompt={prompt[-16:]}")
    assert not err
    assert cut_out.replace(prompt[-16:], prompt) == out


def test_samples_that_cannot_fit_are_refused_before_any_is_begun(run_of, monkeypatch):
    run, begun = run_of(CharTokenizer("abcdefgh ")), []
    monkeypatch.setattr(text_stream, "TextStream", lambda *_: begun.append(1))
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: 1e6)
    with pytest.raises(MemoryExceeded, match=r"sampling needs at least.*lower sample\.num_samples"):
        sample([str(run), "--prompt=cab", "--num_samples=1000"])
    assert not begun


def test_text_ends_at_stop_strings_and_end_ids(run_of, sampled):
    tokenizer = CharTokenizer("abcdefgh ")
    run = run_of(tokenizer)
    some = functools.partial(sampled, run, "--prompt=cab", "--max_tokens=40")
    free = some().out
    assert len(free) == 44
    stops = (free[20:23], free[10:12])
    cut = free[: min(free.index(stop, 3) for stop in stops)]
    assert some(*(f"--stop={stop}" for stop in stops)).out == cut + "\n"
    assert some("--stop=").out == free
    (end,) = tokenizer.encode(free[7])
    ended = free[: free.index(free[7], 3)]
    assert some(f"--end_ids={end}").out == ended + "\n"
    kept = (run / "samples" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in kept] == [free[:-1], cut, free[:-1], ended]


@pytest.mark.parametrize(
    ("characters", "options", "start"),
    [("abc", [], "a"), ("abc", ["--prompt=b"], "b"), ("ab\n", [], "\n")],
)
def test_the_default_prompt_serves_every_tokenizer(characters, options, start, run_of, sampled):
    out, err = sampled(run_of(CharTokenizer(characters)), "--max_tokens=2", *options)
    assert out.startswith(start)
    assert len(out) == 4
    assert ("the default prompt, '\\n': starting from 'a'" in err) == (start == "a")


@pytest.mark.slow
def test_the_documented_prompt_of_a_task_fits_its_context(run_of, sampled):
    """docs/data.md: model.seq_len=4 for the modular tasks, --prompt="5 + 3 ="."""
    run = run_of(WordTokenizer((*map(str, range(7)), "+", "=")), seq_len=4)
    out, err = sampled(run, "--prompt=5 + 3 =", "--max_tokens=1")
    assert out.startswith("5 + 3 = ")
    assert len(out.split()) == 5
    assert not err
    out, err = sampled(run, "--max_tokens=9")
    assert len(out.split()) == 10
    assert "starting from '0'" in err
    with pytest.raises(ConfigError, match="no end token to start from"):
        sample([str(run), "--prompt="])


def test_an_empty_prompt_starts_a_document(run_of, sampled):
    run = run_of(ByteTokenizer())
    out, err = sampled(run, "--prompt=", "--num_samples=3", "--max_tokens=20", "--temperature=1e30")
    texts = [json.loads(line) for line in (run / "samples" / "samples.jsonl").open()]
    assert not err
    assert out == f"\n{'-' * 40}\n".join(text["text"] for text in texts) + "\n"
    assert len({text["text"] for text in texts}) == 3
    few, _ = sampled(run, "--prompt=", "--num_samples=2", "--max_tokens=20", "--temperature=1e30")
    assert out.startswith(few.removesuffix("\n"))
