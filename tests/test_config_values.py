"""Wrong values in the files of a Hugging Face folder: refused with file, key, value and kind."""

import json
import math
from typing import Any

import pytest
from test_golden_models import copy_golden

from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.families import FAMILIES
from nanojaxgpt.interchange.huggingface import GENERATION, open_folder
from nanojaxgpt.interchange.values import KINDS, OF_FIELDS

NEVER = [True, False, "768", "x", math.nan, math.inf, -math.inf, -1, 0, [], [2], {}, {"a": 1}]
COUNTS = [*NEVER, 12.5, 768.0, 10**30]
BAD: dict[str, list[Any]] = {
    "vocab_size": [*COUNTS, None], "hidden_size": [*COUNTS, None],
    "intermediate_size": [*COUNTS, None], "num_hidden_layers": [*COUNTS, None],
    "num_attention_heads": [*COUNTS, None], "max_position_embeddings": [*COUNTS, None],
    "num_key_value_heads": COUNTS, "head_dim": COUNTS, "sliding_window": COUNTS,
    "original_max_position_embeddings": [*COUNTS, None],
    "rms_norm_eps": [*NEVER, None], "rope_theta": [*NEVER, None],
    "partial_rotary_factor": [*NEVER, 1.5],
    "attention_multiplier": [*NEVER, None], "logits_scaling": [*NEVER, None],
    "query_pre_attn_scalar": [*NEVER, None], "final_logit_softcapping": NEVER,
    "rope_local_base_freq": [*NEVER, None], "rotary_pct": [*NEVER, 1.5, None],
    "tie_word_embeddings": [0, 1, "true", None, [], {}, math.nan],
    "attention_bias": [0, 1, "true", None, [], {}, math.nan],
    "use_sliding_window": [0, 1, "true", None, [], {}],
    "max_window_layers": [True, "768", math.nan, -1, [], {}, 12.5, None],
    "layer_types": ["full_attention", 3, True, {}, [1, 2], [None]],
    "no_rope_layers": ["x", 3, True, {}, ["1"], [2, 0, 1, 1], [None]],
    "no_rope_layer_interval": [*COUNTS, None],
    "rope_scaling": ["linear", 3, True, [], math.nan],
    "hidden_act": [None, 3, True, [], {}, math.nan],
    "eos_token_id": ["2", 1.5, True, {}, [1, "2"], [None], -2, math.nan],
    "n_embd": [*COUNTS, None], "n_layer": [*COUNTS, None], "n_head": [*COUNTS, None],
    "n_positions": [*COUNTS, None], "n_inner": COUNTS, "layer_norm_epsilon": [*NEVER, None],
}  # fmt: skip
# The keys of each family that are tried; llama's are those that most share.
TRIED = {
    "llama": [*list(BAD)[:9], "rms_norm_eps", "rope_theta", "partial_rotary_factor",
              "original_max_position_embeddings", "tie_word_embeddings", "attention_bias",
              "rope_scaling", "hidden_act", "eos_token_id"],
    "gpt2": ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner",
             "layer_norm_epsilon", "tie_word_embeddings"],
    "mistral": ["sliding_window", "head_dim"],
    "qwen2": ["use_sliding_window", "max_window_layers", "layer_types", "sliding_window"],
    "gemma2": ["query_pre_attn_scalar", "final_logit_softcapping", "head_dim"],
    "gemma3_text": ["rope_local_base_freq", "sliding_window"],
    "smollm3": ["no_rope_layers", "no_rope_layer_interval"],
    "gpt_neox": ["rotary_pct"],
    "granite": ["attention_multiplier", "logits_scaling"],
}  # fmt: skip
TRIED["llama"].remove("sliding_window")


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in TRIED for key in TRIED[name]])
def test_a_wrong_value_is_refused(name, key, tmp_path):
    folder = copy_golden(name, tmp_path)
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    for value in BAD[key]:
        path.write_text(json.dumps(keys | {key: value}))
        with pytest.raises(ConfigError) as caught:
            open_folder(folder)
        said = str(caught.value)
        assert said.startswith(f"{path}: {key}={value!r} must be "), said


@pytest.mark.parametrize(
    ("key", "values"),
    [("factor", ["4", True, math.nan, [], {}, 0, -2]), ("low_freq_factor", ["1", [1.0], None]),
     ("rope_theta", ["10000", math.inf, True, {}]), ("rope_type", [3, [], {}, True]),
     ("original_max_position_embeddings", ["32", math.nan, -4])],
)  # fmt: skip
def test_a_wrong_value_of_the_positions_is_refused(key, values, tmp_path):
    folder = copy_golden("llama", tmp_path)
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    for value in values:
        path.write_text(
            json.dumps(keys | {"rope_parameters": keys["rope_parameters"] | {key: value}})
        )
        with pytest.raises(ConfigError, match=r"config.json: .*(must be|needs|finite|factor)"):
            open_folder(folder)


def test_wrong_ids_in_the_other_file(tmp_path):
    folder = copy_golden("llama", tmp_path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for value in BAD["eos_token_id"]:
            (folder / GENERATION).write_text(json.dumps({key: value}))
            with pytest.raises(ConfigError) as caught:
                open_folder(folder)
            assert str(caught.value).startswith(f"{folder / GENERATION}: {key}={value!r} must be ")


def test_sampling_that_is_no_number_is_left_out(tmp_path):
    folder = copy_golden("llama", tmp_path)
    given = dict(do_sample=True, top_k=math.nan, temperature=math.inf, top_p=0.5, min_p="x")
    (folder / GENERATION).write_text(json.dumps(given))
    assert open_folder(folder).sample == dict(top_p=0.5)


def test_the_command_says_so(tmp_path, capsys):
    folder = copy_golden("llama", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "768"}))
    assert main(["import", str(folder), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {path}: hidden_size='768' must be an integer from 1 to 2,147,483,647\n"
    assert not (tmp_path / "run").exists()


# Where null is accepted here alone: older versions of transformers took it, as the number of heads.
OLDER = {(name, "num_key_value_heads") for name in ("mistral", "gemma2", "gemma3_text")}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_null_is_right_where_transformers_takes_it(name):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    family = FAMILIES[name]
    kinds = {key: found.kind for key, found in family.keys.items()}
    theirs = type(transformers.AutoConfig.for_model(name)).__annotations__
    kinds |= {key: KINDS[key] for key in theirs if key in KINDS}
    for key, kind in kinds.items():
        if key not in theirs or (name, key) in OLDER:
            continue
        try:
            transformers.AutoConfig.for_model(name, **{key: None})
            taken = True
        except Exception:
            taken = False
        assert kind.fits(None) == taken, key


def test_every_kind_has_words():
    for kind in [*KINDS.values(), *OF_FIELDS.values()]:
        assert kind.words[0].islower()
        assert not kind.fits(object())
