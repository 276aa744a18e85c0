"""What the tests share: eight CPU devices, a small corpus, a small config, the command line."""

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

# Tests compile much and compute little: LLVM's optimizations would take over half of their time.
# Eight devices on two busy cores may meet late: XLA would abort after 40 s.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# What one process has compiled, the other workers, all child processes and the next run read;
# pytest --cache-clear deletes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = Path(__file__).parents[1] / ".pytest_cache" / "d" / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

from nanojaxgpt.config import base_config, override_config, sections
from nanojaxgpt.data import shards
from nanojaxgpt.hosts import process
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.sweep.claims import run_path
from nanojaxgpt.sweep.plan import Trial

# A GPU takes part only where it is asked for: NANOJAXGPT_TEST_PLATFORMS=cuda,cpu.
jax.config.update("jax_platforms", os.environ.get("NANOJAXGPT_TEST_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

pytest.register_assert_rewrite("in_browser")
ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("NANOJAXGPT_SHARED", ROOT.parent / "shared"))


def small_model(**changes) -> ModelConfig:
    """Return a model config of 2 layers, 16 wide, with `changes`."""
    small = dict(num_layers=2, embed_dim=16, num_heads=2, seq_len=16, vocab_size=31)
    return ModelConfig(**(base_config().model.to_dict() | small | changes))


def data_config(**changes) -> sections.Data:
    """Return the default data config with `changes`."""
    return sections.Data(**(base_config().data.to_dict() | changes))


def random_tokens(*shape: int, vocab_size: int = 31, seed: int = 0) -> np.ndarray:
    """Return random token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def assert_batches_equal(left, right) -> None:
    """Compare two batches field by field, dtypes too."""
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def byte_level_tokenizer(texts: list[str], control: list[str], size: int, **marks: int):
    """Return a JsonTokenizer trained on texts, with these control tokens as its first ids."""
    import tokenizers

    from nanojaxgpt.data.tokenizers import JsonTokenizer

    model = tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=control, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(texts * 9, trainer)
    return JsonTokenizer("hf", {"huggingface.json": model.to_str().encode()}, "the test's", marks)


def write_corpus(folder: Path, num_words: int) -> Path:
    """Write a text of random words; return its path."""
    names = ["ash ", "beech ", "cedar\n", "elm ", "fir, "]
    path = folder / "corpus.txt"
    path.write_text("".join(np.random.default_rng(0).choice(names, num_words)))
    return path


def write_tiny(folder: Path, own: str, more: str = "", num_words: int = 5000) -> Path:
    """Write a corpus and an experiment that trains on it in a second; return its path.

    `own` are lines of its `get_config()`, which know cfg, model and train; `more` comes after.
    """
    path, corpus = folder / "tiny.py", write_corpus(folder, num_words)
    shared = f"""from nanojaxgpt.config import base_config
from nanojaxgpt.sweep.space import *

def get_config():
    cfg = base_config()
    model, train = cfg.model, cfg.train
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 1, 16, 2, 16
    cfg.data.source, cfg.data.tokenizer = "text:{corpus}", "chars"
    cfg.data.cache_dir = "{folder}/cache"
    train.batch_size, train.log_every_steps = 8, 1
"""
    own = textwrap.indent(textwrap.dedent(own).strip(), "    ")
    path.write_text(f"{shared}{own}\n    return cfg\n\n{more}")
    return path


def write_tfds(folder: Path, name: str, features: dict, **splits: list) -> None:
    """Let TensorFlow Datasets write version 1.1.0 of a dataset into `folder`, in this order."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="an extra")
    with tfds.core.registered.skip_registration():

        class Made(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.1.0")

            def _info(self):
                kinds = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=kinds, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: enumerate(records) for split, records in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

    Made.name = name
    tfds.disable_progress_bar()
    Made(data_dir=folder, file_format="array_record").download_and_prepare()


def write_trial(folder: Path, trial: Trial, loss: float, state: str = "finished") -> None:
    """Write what a trial leaves, without training it."""
    path = run_path(folder, trial.name)
    path.mkdir(parents=True)
    records = [{"step": 1, "loss": 9.0}, {"step": 6, "validation_loss": loss}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "trial.json").write_text(json.dumps({"state": state, "seconds": 1.5, "message": ""}))


@pytest.fixture(autouse=True)
def no_threads_left(monkeypatch) -> None:
    """Let a command that a test runs here decide for itself alone how this process ends."""
    monkeypatch.setattr(process, "_left_threads", [])


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Return a text file of 20,000 random words."""
    return write_corpus(tmp_path, 20_000)


@pytest.fixture
def ten_documents(tmp_path) -> str:
    """Return a source of ten documents, each longer than the one before."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"é document {number}\n" * (number + 1))
    return f"text:{folder}"


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Close a shard as soon as it has 100 bytes of text."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)


@pytest.fixture
def small_config(corpus, tmp_path):
    """Return a function of dotted overrides that gives a checked config which trains in seconds."""

    def build(**overrides: str):
        small = {
            "model.num_layers": "2", "model.embed_dim": "16", "model.num_heads": "2",
            "model.seq_len": "16", "data.source": f"text:{corpus}", "data.tokenizer": "chars",
            "data.cache_dir": str(tmp_path / "cache"), "mesh.data": "1", "train.num_steps": "20",
            "train.batch_size": "8", "train.log_every_steps": "1", "eval.every_steps": "10",
            "eval.num_batches": "2", "checkpoint.every_steps": "5", "optim.warmup_steps": "5",
        }  # fmt: skip
        return override_config(base_config(), small | overrides)

    return build


def command(
    *arguments: object, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m nanojaxgpt` with these arguments in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "nanojaxgpt", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip


@contextmanager
def allocates_at_most(limit: int):
    """Check that Python and NumPy never hold more than `limit` new bytes at once inside."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= limit
