"""Every field has a rule; overrides, files and JSON are read exactly or refused by name."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import warnings
from typing import get_origin

import pytest
from conftest import ROOT

from nanojaxgpt import config
from nanojaxgpt.checks import field_problems
from nanojaxgpt.config import (
    base_config,
    check_config,
    differences,
    fields,
    free_on_resume,
    from_json,
    load_config,
    load_experiment,
    load_module,
    override_config,
    sections,
    to_json,
    typed,
    with_fields,
)
from nanojaxgpt.config.sections import Config, field
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import complete
from nanojaxgpt.names import MAXTEXT, NANOGPT, OTHER_NAMES, TRANSFORMERS, unknown_name
from nanojaxgpt.step import make_hyper
from nanojaxgpt.sweep import plan

DEFAULTS = dict(fields(base_config()))
RULES = sections.rules()


def override(**overrides):
    return override_config(base_config(), {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture
def experiment(tmp_path):
    """Return a function that writes the text of an experiment file and gives its path."""

    def write(text, name="small.py"):
        path = tmp_path / name
        path.write_text("from nanojaxgpt.config import base_config\n" + text)
        return str(path)

    return write


@pytest.mark.parametrize("name", RULES)
def test_every_field_says_what_it_may_hold(name):
    rule, default = RULES[name], DEFAULTS[name]
    assert rule.comment
    assert name == name.lower()
    assert "use_" not in name
    assert field_problems(name, default, rule) == []
    assert rule.item in (bool, str) or -1 <= rule.low < rule.high < math.inf
    for choice in rule.choices:
        other = (choice,) if isinstance(default, tuple) else choice
        assert field_problems(name, other, rule) == []


def test_annotations_are_the_types_of_the_defaults():
    assert set(RULES) == set(DEFAULTS)
    for section, kind in sections.kinds(Config).items():
        for declared in dataclasses.fields(kind):
            expected = get_origin(declared.type) or declared.type
            assert type(getattr(getattr(Config(), section), declared.name)) is expected


@dataclasses.dataclass(frozen=True)
class WiderEval(sections.Eval):
    """The section with a field more: its one line."""

    repeats: int = field(2, "times that it is measured", low=1, high=9)


@dataclasses.dataclass(frozen=True)
class WiderModel(sections.Model):
    """The section with two fields more: one line each."""

    mood: str = field("calm", "how it feels", choices=("calm", "eager"), place=True)
    gain: float = field(1.0, "scales nothing", traced=True)


@dataclasses.dataclass(frozen=True)
class WiderConfig(Config):
    """A config whose sections have more fields."""

    model: WiderModel = WiderModel()
    eval: WiderEval = WiderEval()


def test_a_field_is_one_line(monkeypatch):
    hashed = config.config_hash(override_config(base_config(), {"train.num_steps": "7"}))
    monkeypatch.setattr(sections, "Config", WiderConfig)
    cfg = base_config()
    assert (cfg.eval.repeats, cfg.model.mood) == (2, "calm")
    # A new field with a default leaves the names of configs alone.
    assert config.config_hash(override_config(cfg, {"train.num_steps": "7"})) == hashed
    changed = override_config(cfg, {"eval.repeats": "3", "model.mood": "eager"})
    assert config.config_hash(changed) != config.config_hash(cfg)
    assert typed(changed).eval.repeats == 3
    for name, text, words in (
        ("eval.repeats", "0", "eval.repeats=0 must be at least 1"),
        ("eval.repeats", "10", "at most 9"),
        ("model.mood", "calmer", "must be one of calm, eager; did you mean calm?"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            override_config(cfg, {name: text})
    assert free_on_resume("eval.repeats")  # as its section says
    assert not free_on_resume("model.mood")
    assert sections.rules()["model.mood"].place
    page = load_module(str(ROOT / "scripts" / "reference.py")).config_page()
    assert "| `eval.repeats` | `2` | integer, 1 to 9 | yes | times that it is measured |\n" in page
    assert '| `model.mood` | `"calm"` | `calm`, `eager` |  | how it feels |\n' in page
    others = {"model.gain": "2", "eval.repeats": "3", "model.mood": "eager"}
    keys = [plan.program_key(override_config(cfg, {n: text})) for n, text in others.items()]
    assert [key == plan.program_key(cfg) for key in keys] == [True, False, False]


def test_typed_is_the_config_and_hashable():
    cfg = override(model__windows="64,0", optim__learning_rate="1", train__trackers="'wandb',")
    found = typed(cfg)
    assert list(fields(found)) == list(fields(cfg))
    assert found == typed(cfg)
    assert found != typed(base_config()) == Config()
    assert len({found, typed(cfg), Config()}) == 2
    assert (to_json(found), config.config_hash(found)) == (to_json(cfg), config.config_hash(cfg))
    assert differences(base_config(), found) == differences(base_config(), cfg)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.train.seed = 6


def test_typed_takes_an_integer_for_a_number_and_no_other_type():
    cfg = base_config()
    with cfg.ignore_type():
        cfg.optim.learning_rate = 1
    assert type(typed(cfg).optim.learning_rate) is float
    with cfg.ignore_type():
        cfg.optim.learning_rate = "1"
    with pytest.raises(ConfigError, match=r"optim\.learning_rate='1' is a string"):
        typed(cfg)


@pytest.mark.parametrize("make", [Config, base_config])
def test_with_fields_changes_a_copy(make):
    cfg = make()
    found = with_fields(cfg, {"model.remat": "full", "optim.learning_rate": 1})
    assert (found.model.remat, found.optim.learning_rate) == ("full", 1.0)
    assert type(found) is type(cfg)
    assert cfg == make()
    assert with_fields(found, {"model.remat": "none", "optim.learning_rate": 1e-3}) == cfg
    for changes, words in (
        ({"model.n_layer": 2}, "did you mean model.num_layers"),
        ({"model.num_heads": 3}, "not divisible by model.num_heads=3"),
        ({"train.num_steps": 0}, "train.num_steps=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            with_fields(cfg, changes)


def test_a_program_depends_on_what_is_neither_traced_nor_the_hosts():
    def key(name, text):
        return plan.program_key(override_config(base_config(), {name: text}))

    same = {
        "optim.learning_rate": "0.5", "optim.independent_decay": "True", "train.num_steps": "7",
        "train.z_loss": "0.1", "train.seed": "3", "model.embed_multiplier": "2",
        "checkpoint.every_steps": "3", "sample.prompt": "a", "init.scale": "2", "init.step": "1",
        "eval.every_steps": "7", "train.trackers": "'wandb',", "train.log_every_steps": "3",
    }  # fmt: skip
    others = {
        "optim.optimizer": "lion", "optim.decay_pattern": "a", "optim.trainable": "('embed',)",
        "optim.rate_multipliers": "('embed=1',)", "optim.ema_decay": "0.9", "eval.batch_size": "3",
        "init.from_run": "a", "model.dropout": "0.1", "model.remat": "full", "mesh.fsdp": "2",
    }  # fmt: skip
    own = plan.program_key(base_config())
    assert {key(name, text) for name, text in same.items()} == {own}
    keys = {name: key(name, text) for name, text in others.items()}
    assert len({own, *keys.values()}) == 1 + len(others)
    # Of these two a part is traced: another factor, another decay, but the same program.
    assert key("optim.rate_multipliers", "('embed=2',)") == keys["optim.rate_multipliers"]
    assert key("optim.ema_decay", "0.5") == keys["optim.ema_decay"]


def test_what_is_traced_are_the_numbers_that_the_step_takes():
    traced = {name.split(".")[1] for name, rule in RULES.items() if rule.traced}
    assert set(make_hyper(Config())) - traced == {"decay_begin", "rate_multipliers"}
    assert traced <= set(make_hyper(Config()))


def test_what_a_paper_may_set_is_where_the_data_and_the_devices_are():
    places = {name for name, rule in RULES.items() if rule.place}
    assert {name for name in places if not name.startswith("mesh.")} == {
        "data.source", "data.sha256", "data.tfds_dir", "data.manual_dir", "data.cache_dir",
        "data.num_workers", "data.prefetch_batches", "eval.tasks_data",
        "model.attention", "model.attention_blocks", "model.unroll", "model.remat",
    }  # fmt: skip
    assert places >= {"mesh.slice", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"}


def test_what_is_free_on_resume_is_not_what_is_trained():
    free = {name for name in DEFAULTS if free_on_resume(name)}
    assert {name.split(".")[0] for name in free} == {
        "mesh", "eval", "checkpoint", "sample", "train", "data", "model", "objective"
    }  # fmt: skip
    assert {name for name in free if name.startswith(("train", "data", "model"))} == {
        "train.log_every_steps", "train.hang_timeout_seconds", "train.trackers",
        "train.gc_every_steps",
        "data.sha256", "data.cache_dir", "data.tfds_dir", "data.manual_dir",
        "data.num_workers", "data.prefetch_batches", "data.lossy_tokenizer",
        "model.attention", "model.attention_blocks", "model.unroll", "model.remat",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.num_steps", "50", 50),
        ("train.num_steps", "2e3", 2000),
        ("train.num_steps", "3_000", 3000),
        ("train.num_steps", "7.0", 7),
        ("mesh.fsdp", "-1", -1),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("model.tied_head", "False", False),
        ("model.qk_norm", "true", True),
        ("model.bias", "0", False),
        ("model.windows", "(64, 0)", (64, 0)),
        ("model.windows", "64,0", (64, 0)),
        ("model.windows", "[8]", (8,)),
        ("model.windows", "8", (8,)),
        ("model.windows", "8,", (8,)),
        ("data.mixture", "('3 text:a', '1 text:b')", ("3 text:a", "1 text:b")),
        ("model.mlp", "swiglu", "swiglu"),
        ("sample.prompt", "a=b, c", "a=b, c"),
        ("data.cache_dir", "", ""),
    ],
)
def test_override_takes_the_type_of_the_default(name, text, value):
    changes = {"mesh.data": "1"} if name == "mesh.fsdp" else {}
    found = dict(fields(override_config(base_config(), changes | {name: text})))[name]
    assert found == value
    assert type(found) is type(value) is type(DEFAULTS[name])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.num_steps", "ten"),
        ("train.num_steps", ""),
        ("train.num_steps", "1.5"),
        ("train.num_steps", "1e999"),
        ("train.num_steps", "nan"),
        ("train.num_steps", "-5"),
        ("train.num_steps", "0"),
        ("train.num_steps", "1e10"),
        ("optim.learning_rate", "fast"),
        ("optim.learning_rate", "nan"),
        ("optim.learning_rate", "inf"),
        ("optim.learning_rate", "-1e-3"),
        ("optim.beta2", "1.0"),
        ("optim.final_fraction", "1.01"),
        ("model.dropout", "1"),
        ("model.norm_eps", "0"),
        ("model.tied_head", "yes"),
        ("model.windows", "(64,"),
        ("model.windows", "'a'"),
        ("model.windows", "None"),
        ("data.mixture", "3,1"),
        ("model.windows", "1.5"),
        ("model.windows", "True"),
        ("model.windows", "-1"),
        ("model.windows", "{[]: 1}"),
        ("model.windows", "()"),
        ("model.mlp", "SwiGLU"),
        ("optim.schedule", ""),
        ("optim.decay_pattern", "(["),
        ("optim.decay_pattern", "(" * 3000),
        ("optim.decay_pattern", "a{99999999999}"),
        ("optim.rate_multipliers", "('embed_VD=nan',)"),
        ("optim.rate_multipliers", "('embed_VD=-1',)"),
        ("optim.rate_multipliers", "('(=1',)"),
        ("optim.rate_multipliers", "('=1',)"),
        ("train.num_steps", "१"),
        ("train.num_steps", " 5"),
        ("train.seed", "1e-400"),
        ("train.seed", "9" * 5000),
        ("optim.learning_rate", "1e400"),
        ("model.windows", "(" * 3000),
        ("data.source", "text:\0"),
        ("sample.prompt", "\ud800"),
    ],
)
def test_override_refuses_by_name(name, text):
    with pytest.raises(ConfigError, match=re.escape(name)):
        override_config(base_config(), {name: text})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.learning_rat", "optim.learning_rate"),
        ("train.learning_rate", "optim.learning_rate"),
        ("model.n_layers", "model.num_layers"),
        ("optim.lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("block_size", "model.seq_len"),
        ("model.n_layer", "model.num_layers"),
        ("n_embd", "model.embed_dim"),
        ("dropout", "model.dropout"),
        ("dtype", "model.compute_dtype or model.param_dtype"),
        ("seed", "train.seed or sample.seed"),
        ("max_target_length", "model.seq_len"),
        ("optimizer", "optim.optimizer"),
        ("modle.num_heads", "model.num_heads"),
    ],
)
def test_unknown_field_suggests_the_nearest(name, hint):
    with pytest.raises(ConfigError) as caught:
        override_config(base_config(), {name: "1"})
    assert name in str(caught.value)
    assert f"did you mean {hint}" in str(caught.value)


@pytest.mark.parametrize("name", ["zzz.qqqq", "zzz", "", ".", "model", "model.num_layers.deeper"])
def test_unknown_section_is_refused(name):
    with pytest.raises(ConfigError, match="no config field"):
        override_config(base_config(), {name: "1"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("spin=1", "'spin=1' is not one of"),
        ("base=", "not a number"),
        ("base=inf", "must be finite"),
        ("fraction=0.01", "they turn 0 of 32"),
        ("scaling=ntk", "must be one of default, linear"),
        ("factor=8", "factor=... means nothing with scaling=default"),
        ("scaling=linear factor=0.5", "factor at least 1"),
        ("scaling=yarn factor=8", "needs original=TOKENS"),
        ("scaling=yarn original=64 fast=1 slow=2", "fast at least slow"),
        ("scaling=llama3 original=64 low=4", "high must be above low"),
        ("scaling=longrope original=64 short=1,2 long=1", "short needs 16 numbers"),
    ],
)
def test_a_wrong_entry_of_rotary_says_what_is_wrong(entry, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        with_fields(base_config(), {"model.positions": "rotary", "model.rotary": (entry,)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ful", "did you mean full?"),
        ("", "it is empty"),
        ("save=", "'' is not an activation: layer_input, q"),
        ("save=q,key", "'key' is not an activation"),
        ("save=q offload=q", "q is there twice"),
        ("save=q save=k", "save= is there twice"),
        ("keep=q", "'keep=q' is not one of none, full"),
        ("save=gate", "this model has no gate; its activations: layer_input, q, k"),
    ],
)
def test_a_wrong_remat_says_what_is_wrong(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        with_fields(base_config(), {"model.remat": text})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.num_heads": "3"}, "model.num_heads=3"),
        ({"model.num_kv_heads": "3"}, "model.num_kv_heads=3"),
        ({"train.accumulation_steps": "5"}, "train.accumulation_steps=5"),
        ({"train.loss_chunks": "7"}, "train.loss_chunks=7"),
        ({"model.positions": "rotary", "model.head_dim": "5"}, "even head_dim"),
        ({"model.positions": "sinusoidal", "model.embed_dim": "3", "model.num_heads": "1"}, "even"),
        ({"mesh.data": "-1", "mesh.tensor": "-1"}, "only one mesh axis"),
        ({"mesh.data": "0"}, "no devices"),
        ({"train.ramp_batch_size": "8"}, "train.ramp_steps=0"),
        ({"train.ramp_steps": "8"}, "train.ramp_batch_size=0"),
        ({"train.ramp_batch_size": "12", "train.ramp_steps": "9"}, "train.ramp_batch_size=12"),
        ({"train.ramp_batch_size": "32", "train.ramp_steps": "9"}, "train.ramp_batch_size=32"),
        ({"optim.optimizer": "schedule_free"}, "set optim.schedule=constant"),
        (
            {"optim.optimizer": "schedule_free", "optim.schedule": "constant"}
            | {"optim.ema_decay": "0.9"},
            "leave optim.ema_decay at 0",
        ),
        ({"optim.spike_factor": "3"}, "optim.max_skipped_steps"),
        ({"optim.spike_factor": "0.5", "optim.max_skipped_steps": "3"}, "must be above 1"),
        ({"optim.independent_decay": "1", "optim.learning_rate": "0"}, "optim.independent_decay"),
    ],
)
def test_fields_that_do_not_fit_together(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        override_config(base_config(), changes)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("train.num_steps", "ten", "train.num_steps='ten' is not an integer, such as 1000"),
        ("train.num_steps", "1e10", "train.num_steps=10000000000 must be at most 2,147,483,647"),
        ("train.num_steps", "0", "train.num_steps=0 must be at least 1"),
        ("optim.learning_rate", "nan", "optim.learning_rate=nan must be at least 0 and at most"),
        ("model.dropout", "1", "model.dropout=1.0 must be below 1"),
        ("optim.beta2", "0.99999999", "must be below 1, as a float32 too"),
        ("model.norm", "rmsnrm", "one of layernorm, rmsnorm; did you mean rmsnorm?"),
        ("model.tied_head", "yes", "model.tied_head='yes' is not true or false"),
        ("train.seed", "9" * 5000, "(5,002 characters)"),
    ],
)
def test_messages_say_what_is_wrong(name, text, words):
    with pytest.raises(ConfigError) as caught:
        override_config(base_config(), {name: text})
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_projects_lead_to_fields_of_this_one(name):
    other = OTHER_NAMES[name]
    assert set(other.projects) <= {NANOGPT, MAXTEXT, TRANSFORMERS}
    assert {field for field in other.names if field[:2] != "--"} <= set(DEFAULTS)
    if set(other.names) & set(DEFAULTS):
        assert other.names[0] in unknown_name("config field", name, list(DEFAULTS))


def test_patterns_that_python_warns_of_are_compiled_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patterns = {"optim.decay_pattern": "[[a]", "optim.rate_multipliers": "('[[b]=2',)"}
        override_config(base_config(), patterns)


def test_head_dim_frees_the_width_from_the_heads():
    assert override(model__num_heads="3", model__head_dim="16").model.head_dim == 16


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        override(train__num_steps="0", optim__beta1="2", model__norm="none")
    lines = str(caught.value).split("\n")
    assert [line.split("=")[0] for line in lines] == [
        "model.norm", "optim.beta1", "train.num_steps"
    ]  # fmt: skip


def test_override_leaves_its_argument_alone_and_comes_back_locked():
    cfg = base_config()
    changed = override_config(cfg, {"train.seed": "5"})
    assert (cfg.train.seed, changed.train.seed) == (0, 5)
    with pytest.raises(AttributeError):
        changed.train.sed = 6
    with pytest.raises(AttributeError):
        base_config().nothing = 1


def test_check_refuses_a_value_of_another_type():
    cfg = base_config()
    with cfg.ignore_type():
        cfg.train.num_steps = "many"
    with pytest.raises(ConfigError, match=r"train\.num_steps='many' is a str"):
        check_config(cfg)


def test_json_brings_everything_back():
    cfg = override(model__windows="64,0", optim__learning_rate="0.1", sample__prompt="é\n\"'")
    assert cfg != base_config()
    back = from_json(to_json(cfg))
    assert back == typed(cfg)
    assert back.model.windows == (64, 0)
    assert type(back.model.windows) is tuple
    assert config.config_hash(back) == config.config_hash(cfg)
    assert config.config_hash(back) != config.config_hash(base_config())


def test_a_job_fills_in_the_model_and_shows_what_was_given():
    cfg = override(model__vocab_size="64", model__num_heads="2")
    job = complete(cfg)
    model = job.model
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == (2, 64, 512)
    assert model.attention_scale == 64**-0.5
    assert to_json(job) == to_json(cfg)
    assert config.differences(cfg, job) == []
    assert config.config_hash(job) == config.config_hash(cfg)
    wide = with_fields(job, {"model.embed_dim": 256, "model.mlp_dim": 7})
    assert (wide.model.head_dim, wide.model.mlp_dim, wide.model.given()["head_dim"]) == (128, 7, 0)
    assert type(override_config(job, {"train.num_steps": "3"})) is type(job)
    with pytest.raises(ConfigError, match="not divisible by"):
        with_fields(job, {"model.num_heads": 3})
    with pytest.raises(ValueError, match="vocab_size is 0"):
        complete(base_config())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": {"num_layer": 2}}', "did you mean model.num_layers"),
        ('{"nothing": {"at_all": 2}}', "nothing.at_all"),
        ('{"train": {"num_steps": -1}}', "train.num_steps=-1"),
        ('{"train": {"num_steps": "many"}}', "train.num_steps"),
        ('{"train": {"num_steps": null}}', "train.num_steps"),
        ('{"train": {"num_steps": 1.5}}', "train.num_steps"),
        ('{"model": {"bias": 3}}', "model.bias"),
        ('{"model": {"windows": ["a"]}}', "model.windows"),
        ('{"model": {"windows": [[1]]}}', "model.windows"),
        ('{"optim": {"learning_rate": NaN}}', "optim.learning_rate"),
        ('{"optim": {"learning_rate": %s}}' % ("9" * 400), "optim.learning_rate"),
        ('{"train": {"seed": %s}}' % ("9" * 5000), "is not a config"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "config.json"),  # too deep, or of unknown names
        ('{"sample": {"prompt": "\\ud800"}}', "sample.prompt"),
        ('{"model": 3}', "is not a config"),
        ("[]", "is not a config"),
        ("3", "is not a config"),
        ("{", "is not a config"),
        ("", "is not a config"),
    ],
)
def test_json_of_another_shape_is_refused(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        from_json(text, "a/config.json")
    assert "a/config.json" in str(caught.value)


def test_json_of_an_older_version_takes_the_defaults_of_new_fields():
    old = json.loads(to_json(base_config()))
    del old["model"]["qk_norm"]
    assert from_json(json.dumps(old)) == Config()


def test_differences_name_field_old_and_new():
    new = override(optim__learning_rate="0.5", model__windows="8")
    found = differences(base_config(), new)
    assert found == [("model.windows", (0,), (8,)), ("optim.learning_rate", 1e-3, 0.5)]
    assert differences(new, new) == []


def test_experiment_with_variant_and_overrides(experiment):
    path = experiment(
        "def get_config(variant='a'):\n"
        "    cfg = base_config()\n"
        "    cfg.train.seed = {'a': 1, 'b': 2}[variant]\n"
        "    return cfg\n"
    )
    assert load_config(path + ":b").train.seed == 2
    assert load_config(path + ":b", {"train.seed": "9"}).train.seed == 9
    with pytest.raises(ConfigError, match=re.escape(f"{path}:4")) as caught:
        load_config(path + ":c")
    assert "KeyError: c" in str(caught.value)


def test_missing_file_suggests_another(experiment, tmp_path):
    path = experiment("", "quickstart.py")
    with pytest.raises(ConfigError, match="did you mean") as caught:
        load_experiment(str(tmp_path / "quikstart.py"))
    assert path in str(caught.value)
    with pytest.raises(ConfigError, match="no experiment file"):
        load_experiment(str(tmp_path / "no" / "such" / "folder.py"))
    with pytest.raises(ConfigError, match="no experiment file"):
        load_experiment(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cfg = base_config()\n", "has no function get_config"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("def get_config(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("def get_config():\n    return 3\n", "ConfigDict"),
        ("def get_config():\n    pass\n", "ConfigDict"),
    ],
)
def test_file_that_is_no_experiment(text, words, experiment):
    path = experiment(text)
    with pytest.raises(ConfigError, match=re.escape(path)) as caught:
        load_config(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cfg.model.num_layer = 2", "num_layer"),
        ("cfg.model.num_layers = 'two'", "num_layers"),
        ("cfg.model.num_layers = int('two')", "two"),
        ("cfg['nothing']", "nothing"),
        ("undefined", "undefined"),
        ("1 / 0", "division by zero"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_error_inside_get_config_names_its_line(line, words, relative, experiment, monkeypatch):
    path = experiment(f"def get_config():\n    cfg = base_config()\n    {line}\n    return cfg\n")
    if relative:
        folder, _, path = path.rpartition("/")
        monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=re.escape(f"{path}:4: ")) as caught:
        load_experiment(path)
    assert words in str(caught.value)
    assert "Other fields" not in str(caught.value)


FAILS = "class Mute(BaseException):\n    def __str__(self): raise ValueError\n"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys; sys.exit(0)", ":4: get_config() calls sys.exit"),
        ("quit()", "get_config() calls sys.exit"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise Mute", "Mute"),
        ("raise Exception('a\\nb')", "Exception: a b"),
        ("cfg.model.num_layers = 10**5000", "model.num_layers=<int> must be at most"),
        ("cfg.unlock(); del cfg.model; cfg.model = 3", "the section 'model' is an integer"),
        ("cfg.unlock(); cfg.model = 3", "'model'"),
        ("cfg.unlock(); del cfg.model", "missing: model.attention"),
        ("cfg.unlock(); del cfg.model['num_layers']", "missing: model.num_layers;"),
        ("cfg.unlock(); cfg.model.block_size = 3", "did you mean model.seq_len"),
        ("cfg.unlock(); cfg.model.num_layers = {'a': 1}", "'num_layers'"),
        ("cfg = type(cfg)()", "more; start from base_config()"),
        ("cfg = None", "get_config returns None"),
    ],
)
def test_whatever_an_experiment_does_is_one_line(body, words, experiment):
    path = experiment(
        f"def get_config():\n    cfg = base_config()\n    {body}\n    return cfg\n{FAILS}"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", f"{FAILS}raise Mute", "x = '\0'"])
def test_an_import_that_ends_the_process_is_an_error(body, experiment):
    with pytest.raises(ConfigError, match=r"small.py"):
        load_config(experiment(body))


def test_ctrl_c_in_an_experiment_is_still_ctrl_c(experiment):
    with pytest.raises(KeyboardInterrupt):
        load_config(experiment("raise KeyboardInterrupt\n"))


NASTY = ("nan", "-1", "1e400", "१", " 5", "9" * 5000, "(" * 3000, "('(=1',)", "²", "\0", "\ud800")


@pytest.mark.parametrize("name", DEFAULTS)
def test_nothing_else_than_config_error_comes_of_any_text(name):
    for text in NASTY:
        try:
            override_config(base_config(), {name: text})
            problem = ""
        except ConfigError as error:
            problem = str(error)
        assert len(problem) < 1000
        assert name in problem or isinstance(DEFAULTS[name], str | tuple) or name[:5] == "mesh."


def test_variant_where_there_is_none(experiment):
    path = experiment("def get_config():\n    return base_config()\n")
    assert load_experiment(path) == base_config()
    with pytest.raises(ConfigError, match="no variants"):
        load_experiment(path + ":large")


def test_config_and_experiments_import_no_jax():
    code = (
        "import sys, nanojaxgpt.config as c; c.load_config(sys.argv[1])\n"
        "assert 'ml_collections' in sys.modules\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'flax', 'orbax')])"
    )
    for path in sorted((ROOT / "experiments").glob("*.py")):
        found = subprocess.run(
            [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout == "[]\n"
