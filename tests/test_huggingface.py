"""Folders that transformers wrote come in, ours go out: the same logits, texts and bits."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from conftest import random_tokens
from test_families import CASES, OTHERS, their_model, torch, transformers
from test_golden_models import NEW_KEYS, OLD_KEYS, import_folder

from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.interchange.huggingface import open_folder, write_folder
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import Sampling, generate

pytestmark = pytest.mark.slow

LENGTH, CONTEXT, NEW = 300, 512, 12
NAMES = [name for name in CASES if name not in OTHERS and name != "phi3_short"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOUND = 1e-4  # of the largest logit
# What transformers says of its own model too: the context of this test is not factor x original.
OF_THE_CASE = (
    "The explicitly set RoPE scaling factor",
    "This model config has set a `rope_parameters['original_max_position_embeddings']`",
)


class Loaded(NamedTuple):
    """A model of transformers, its folder, and what was imported of it."""

    theirs: Any
    folder: Path
    source: Pretrained
    params: Any
    tokens_BT: np.ndarray


def their_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Return the logits that transformers computes."""
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def our_logits(source: Pretrained, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Return the logits that we compute."""
    model = Transformer(source.config)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, tokens_BT)[0])(params))


def assert_close(one_BTV: np.ndarray, other_BTV: np.ndarray) -> None:
    """Compare logits, relative to their scale."""
    assert np.isfinite(other_BTV).all()
    assert np.abs(one_BTV - other_BTV).max() < BOUND * np.abs(other_BTV).max()


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, tmp_path_factory) -> Loaded:
    """Return a random model with a longer context than the case has, saved and imported."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    key = "n_positions" if case.kind == "gpt2" else "max_position_embeddings"
    theirs = their_model(case, **{key: CONTEXT})
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(export_characters(LETTERS))
    source, params = import_folder(folder)
    return Loaded(theirs, folder, source, params, random_tokens(1, LENGTH))


def bits(params: Any) -> dict[str, bytes]:
    """Return the bits of each parameter by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a folder's file."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_logits_are_those_of_transformers(loaded):
    ours_BTV = our_logits(loaded.source, loaded.params, loaded.tokens_BT)
    assert_close(ours_BTV, their_logits(loaded.theirs, loaded.tokens_BT))


def test_greedy_texts_are_those_of_transformers(loaded):
    ids_1T = torch.tensor(loaded.tokens_BT[:, :100], dtype=torch.long)
    theirs_T = loaded.theirs.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=NEW,
        eos_token_id=None, pad_token_id=0,
    )[0, 100:].numpy()  # fmt: skip
    source = loaded.source
    ours_BT = generate(
        Transformer(source.config), loaded.params, loaded.tokens_BT[:, :100], np.array([100]),
        jax.random.key(0), max_tokens=NEW, how=Sampling(temperature=0.0),
    )  # fmt: skip
    assert np.asarray(ours_BT)[0].tolist() == theirs_T.tolist()


def test_transformers_loads_what_is_written(loaded, tmp_path, caplog):
    folder, source = tmp_path / "out", loaded.source
    write_folder(folder, source.config, loaded.params, source.tokenizer, "", {}, "float32", "card",
                 model_type=source.family)  # fmt: skip
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager"
        )
    assert not any(report.values()), report
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if not text.startswith(OF_THE_CASE)] == []
    ours_BTV = our_logits(source, loaded.params, loaded.tokens_BT)
    assert_close(their_logits(theirs.eval(), loaded.tokens_BT), ours_BTV)
    before, after = stored(loaded.folder), stored(folder)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    again, params = import_folder(folder)
    assert again.config == source.config
    assert bits(params) == bits(loaded.params)


def test_older_keys_say_the_same(loaded, tmp_path):
    """For us, and for transformers, which reads both."""
    folder, source = tmp_path / "out", loaded.source
    write_folder(folder, source.config, loaded.params, source.tokenizer, "", {}, "float32", "card",
                 model_type=source.family)  # fmt: skip
    whole = json.loads((folder / "config.json").read_text())
    for left_out in (NEW_KEYS | {"layer_types"}, OLD_KEYS):
        if "layer_types" in whole and "sliding_window_pattern" not in whole:
            left_out = left_out - {"layer_types"}  # by the older keys another pattern
        keys = {name: value for name, value in whole.items() if name not in left_out}
        (folder / "config.json").write_text(json.dumps(keys))
        assert open_folder(folder).config == source.config
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        )
        ours_BTV = our_logits(source, loaded.params, loaded.tokens_BT)
        assert_close(their_logits(theirs.eval(), loaded.tokens_BT), ours_BTV)
