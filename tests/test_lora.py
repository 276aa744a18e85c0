"""Adapters: nothing at first, trained alone, saved alone, merged; and what is refused."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from conftest import random_tokens, small_model
from safetensors.numpy import save_file
from test_golden_models import copy_golden

from nanojaxgpt import checkpoint, language_model, memory, sharding
from nanojaxgpt.config import override_config, sections, typed, with_fields
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange import peft
from nanojaxgpt.interchange.loading import read_params
from nanojaxgpt.interchange.opening import adopt_model, find_model
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.lora import check_targets, merge_adapters
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.step import make_hyper, make_step
from nanojaxgpt.sweep.plan import program_key
from nanojaxgpt.trainable import check_trainable, merge_params
from nanojaxgpt.training import fit, make_job, start_state

GATED = dict(mlp="swiglu", num_kv_heads=1, mlp_dims=(24, 40), num_layers=3)
TOKENS_BT = random_tokens(2, 16)


def adapted_model(**changes):
    """Return the small model with adapters of rank 3 at all kernels."""
    lora = sections.Lora(rank=3, alpha=6.0)
    return small_model(**{"lora": lora} | changes)


def paths(tree) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {checkpoint.path_name(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def fresh(cfg):
    """Return the parameters of a model from scratch."""
    return jax.jit(lambda: init_params(cfg, jax.random.key(0)))()


def draw_adapters(cfg):
    """Return random adapters of a model."""
    rng, found = np.random.default_rng(0), {stack: {} for stack in cfg.stacks}
    for row in parameters(cfg).values():
        if row.kind == "adapter":
            array = rng.normal(0, 0.2, (row.layers, *row.shape))
            found[row.stack][row.name] = array.astype(np.float32)
    return found


@functools.cache
def random_adapters(cfg):
    """Return the parameters of a model whose adapters do something."""
    return merge_params(draw_adapters(cfg), fresh(cfg.bare))


def forward(cfg, params, **options):
    """Return the logits."""
    model = Transformer(cfg)
    return np.asarray(
        jax.jit(lambda p: model.apply({"params": p}, TOKENS_BT, **options)[0])(params)
    )


@pytest.mark.parametrize("more", [{}, GATED])
def test_new_adapters_leave_every_bit_of_the_base(more):
    cfg = adapted_model(**more)
    base, own = paths(fresh(cfg.bare)), paths(fresh(cfg))
    assert base.keys() < own.keys()
    for path, array in base.items():
        assert array.tobytes() == own[path].tobytes(), path
    table = parameters(cfg)
    assert {path: (row.layers, *row.shape) for path, row in table.items() if row.stack} == {
        path: array.shape for path, array in own.items() if "/" in path
    }
    for path in own.keys() - base.keys():
        first = "_lora_R" not in path
        inputs = np.prod(table[path].shape[:-1])
        assert bool(np.any(own[path])) == first
        if first:  # as PEFT draws them
            assert 0.8 < np.abs(own[path]).max() * np.sqrt(inputs) <= 1
    assert forward(cfg, fresh(cfg)).tobytes() == forward(cfg.bare, fresh(cfg.bare)).tobytes()


@pytest.mark.parametrize(
    "more",
    [
        {},
        GATED,
        dict(lora=sections.Lora(rank=2, alpha=6.0, rank_stabilized=True, targets=("v_D",))),
    ],
)
def test_merged_is_as_unmerged(more):
    cfg = adapted_model(**more)
    params = random_adapters(cfg)
    before, whole = forward(cfg.bare, fresh(cfg.bare)), forward(cfg, params)
    assert np.abs(whole - before).max() > 0.02
    merged = merge_adapters(cfg, params)
    assert paths(merged).keys() == paths(fresh(cfg.bare)).keys()
    np.testing.assert_allclose(forward(cfg.bare, merged), whole, atol=1e-5)


def test_decoding_uses_the_adapters():
    cfg = adapted_model()
    params, model = random_adapters(cfg), Transformer(cfg)
    from nanojaxgpt.attention.cache import Cache
    from nanojaxgpt.model.projection import decoding_params

    shape = (2, cfg.num_kv_heads, 16, cfg.head_dim)
    cache = tuple(Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(2))
    laid_out = decoding_params(cfg, params, 2)
    positions_BT = np.tile(np.arange(16), (2, 1))
    logits_BTV, _ = model.apply({"params": laid_out}, TOKENS_BT, positions_BT, cache=cache)
    np.testing.assert_allclose(logits_BTV, forward(cfg, params), atol=1e-5)


def test_dropout_is_of_the_adapters_alone():
    cfg = adapted_model(lora=sections.Lora(rank=3, dropout=0.5))
    assert (cfg.deterministic, cfg.bare.deterministic) == (False, True)
    draw = functools.partial(forward, cfg, deterministic=False)
    one, other = (draw(random_adapters(cfg), rngs={"dropout": jax.random.key(n)}) for n in (0, 1))
    assert np.abs(one - other).max() > 1e-3
    at_zero = draw(fresh(cfg), rngs={"dropout": jax.random.key(0)})
    assert at_zero.tobytes() == forward(cfg.bare, fresh(cfg.bare)).tobytes()


@pytest.mark.parametrize("targets", [("q_DHN",), (), ("q_DNH", "norm")])
def test_a_target_that_is_no_kernel_is_refused(targets):
    cfg = adapted_model(lora=sections.Lora(rank=3, targets=targets))
    with pytest.raises(ConfigError, match="matches no kernel; the paths: layers/q_DNH, layers/k_"):
        check_targets(cfg)


def test_adapters_must_train():
    table = parameters(adapted_model())
    check_trainable(("_lora_", "norm"), table)
    with pytest.raises(ConfigError, match="freezes the adapter layers/q_lora_DR: put '_lora_' fi"):
        check_trainable(("norm",), table)


def test_what_contradicts_adapters_is_refused(small_config):
    for fields, message in (
        ({}, "lora.rank=2 adapts a model: set init.from_model or init.from_run"),
        ({"lora.targets": "('(',)"}, "lora.targets: '\\(' is not a regular expression"),
        ({"init.from_run": "a", "init.state": "all"}, "set lora.rank=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            small_config(**{"lora.rank": "2"} | fields)


def test_alpha_is_traced(small_config):
    cfg = typed(small_config(**{"lora.rank": "2", "init.from_run": "a"}))
    key = program_key(cfg)
    assert key == program_key(with_fields(cfg, {"lora.alpha": 3.0}))
    assert key != program_key(with_fields(cfg, {"lora.rank": 3}))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Return the folder of a small llama."""
    return copy_golden("llama", tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return the folder of a small GPT-2 that can write the corpus."""
    folder = copy_golden("gpt2", tmp_path_factory.mktemp("golden"))
    (folder / "tokenizer.json").write_bytes(export_characters("abcdefghijklmnopqrstuvwxyz ,\n"))
    return folder


@pytest.fixture
def cfg(small_config, gpt2):
    """Return the config of a run that adapts the small GPT-2 in six steps."""
    return small_config(**{
        "init.from_model": str(gpt2), "data.lossy_tokenizer": "true", "model.vocab_size": "32",
        "lora.rank": "2", "lora.dropout": "0.1", "train.num_steps": "6", "data.tokenizer": "",
        "checkpoint.every_steps": "3", "eval.every_steps": "3", "optim.warmup_steps": "0",
        "optim.learning_rate": "0.01", "mesh.data": "-1",
    })  # fmt: skip


def silent(text: str) -> None:
    """Report nothing."""


def run_losses(run) -> list[float]:
    """Return the losses that a run wrote, of training and of validation."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record.get("loss", record.get("validation_loss")) for record in records]


@pytest.mark.slow
def test_adapters_train_alone_are_saved_alone_and_resume(cfg, gpt2, tmp_path):
    run, said = tmp_path / "run", list[str]()
    state = fit(cfg, run, report=said.append)
    table = parameters(language_model.load(run, report=silent).config)
    own = {path: row for path, row in table.items() if row.kind == "adapter"}
    assert paths(state.params).keys() == own.keys()
    # Two moments of what trains are all the state there is, and the split says so.
    size = sum(row.size for row in own.values())
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in moments) == 2 * 4 * size
    every = sum(row.size for row in table.values())
    assert said[-1 - [line[:4] for line in reversed(said)].index("all ")].split()[1:] == [
        f"{number:,}" for number in (every, size, every - size, 8 * size)
    ]
    saved = checkpoint.saved_leaves(run / "checkpoints" / "6")
    assert {name for name in saved if name.startswith("params/")} == {f"params/{p}" for p in own}
    # The base is as it was, and the run is another model than that.
    model, before = (language_model.load(one, report=silent) for one in (run, gpt2))
    for path, array in paths(before.params).items():
        now = paths(model.params)[path]  # with a row more of the vocabulary, and fewer positions
        count = min(len(array), len(now))
        assert array[:count].tobytes() == now[:count].tobytes(), path
    assert run_losses(run)[-1] < run_losses(run)[0]
    # Stopped after three steps it resumes with the same bits.
    shutil.rmtree(run / "checkpoints" / "6")
    again = fit(cfg, run, report=said.append)
    assert "resuming from step 3" in said
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # Merged it is a run, and a folder of Hugging Face's, of the same logits.
    logits_BTV = model.logits(TOKENS_BT)
    model.save(tmp_path / "merged")
    model.save(tmp_path / "hf", "hf")
    for name in ("merged", "hf"):
        other = language_model.load(tmp_path / name, report=silent)
        assert not other.config.lora.rank
        np.testing.assert_allclose(other.logits(TOKENS_BT), logits_BTV, atol=1e-5)
    # A run that starts from it starts from the merged parameters.
    more = {"init.from_model": "", "init.from_run": str(run), "train.num_steps": "3"}
    changes = {f"model.{name}": str(value) for name, value in model.config.given().items()}
    second = fit(override_config(cfg, changes | more), tmp_path / "second", report=silent)
    after = language_model.load(tmp_path / "second", report=silent)
    kernel = paths(after.params)["layers/q_DNH"]
    np.testing.assert_allclose(kernel, paths(model.merged().params)["layers/q_DNH"], atol=1e-6)
    assert int(second.step) == 3


def test_a_base_that_changed_or_is_gone_is_told(cfg, gpt2, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(gpt2, base)
    cfg = override_config(cfg, {"init.from_model": str(base), "train.num_steps": "3"})
    fit(cfg, run, report=silent)
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"is not what .*run was trained on: its hash was"):
        language_model.load(run, report=silent)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"init.from_model=.*base, the base of .*run: "):
        language_model.load(run, report=silent)


def first_losses(cfg, sizes, run) -> list[float]:
    """Return the losses of three steps on a mesh of these sizes."""
    cfg = adopt_model(typed(cfg), run)
    data = prepare_data(cfg, silent)
    devices = jax.devices()[: math.prod(sizes.values())]
    job = make_job(resolve(cfg, data), data, sharding.make_mesh(sizes, devices))
    with jax.set_mesh(job.mesh):
        (state, frozen), losses = start_state(job, run, silent), []
        for step in range(3):
            batch = job.train_batch(step)
            state, numbers = job.train_step(state, batch, make_hyper(job.cfg), frozen)
            losses.append(float(numbers["loss"]))
    return losses


@pytest.mark.slow
def test_steps_are_the_same_in_parts_and_on_a_mesh(cfg, tmp_path):
    cfg = override_config(cfg, {"lora.dropout": "0.0", "optim.learning_rate": "0.1"})
    alone = first_losses(cfg, {}, tmp_path)
    parts = override_config(cfg, {"train.accumulation_steps": "4"})
    np.testing.assert_allclose(first_losses(parts, {}, tmp_path), alone, rtol=1e-5)
    mesh = {"fsdp": 2, "tensor": 2}
    np.testing.assert_allclose(first_losses(cfg, mesh, tmp_path), alone, rtol=1e-5)
    assert abs(alone[2] - alone[0]) > 0.01


def test_bytes_on_a_device(cfg, tmp_path):
    """The base in bfloat16 takes half of it, adapters stay float32 and have all the state."""
    cfg = override_config(cfg, {"model.param_dtype": "bfloat16"})
    cfg = adopt_model(typed(cfg), tmp_path)
    job = resolve(cfg, prepare_data(cfg, silent))
    mesh = sharding.make_mesh({"data": -1})
    with jax.set_mesh(mesh):
        step = make_step(job, mesh)
        batch = memory.abstract_batch(job, mesh)
        found = memory.state_memory(job, step.abstract, step.frozen, batch, 1e9)
    table = parameters(job.model).values()
    size = sum(row.size for row in table if row.kind == "adapter")
    rest = sum(row.size for row in table) - size
    assert found.parameters == 4 * size + 2 * rest
    assert (found.gradients, found.optimizer) == (4 * size, 8 * size + 8)


def write_peft(folder, golden, **changes):
    """Write an adapter of rank 2 at all queries of a small llama."""
    folder.mkdir()
    keys = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(golden),
                r=2, lora_alpha=6, target_modules=["q_proj"], bias="none")  # fmt: skip
    arrays = changes.pop("arrays", {})
    (folder / "adapter_config.json").write_text(json.dumps(keys | changes))
    rng = np.random.default_rng(0)
    form = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    for layer in range(2):
        for side in "AB":
            array = rng.normal(0, 0.3, (2, 16) if side == "A" else (16, 2)).astype(np.float32)
            arrays.setdefault(form.format(layer, side), array)
    save_file({name: array for name, array in arrays.items() if array.size},
              folder / "adapter_model.safetensors")  # fmt: skip
    return arrays


def test_an_adapter_of_peft_is_a_model(golden, tmp_path):
    arrays = write_peft(tmp_path / "peft", golden)
    model = language_model.load(tmp_path / "peft", report=silent)
    base = language_model.load(golden, report=silent)
    down, up = (arrays[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"]
                for side in "AB")  # fmt: skip
    moved = paths(model.params)["layers/q_DNH"] - paths(base.params)["layers/q_DNH"]
    np.testing.assert_allclose(moved[1].reshape(16, -1), 3 * (up @ down).T, atol=1e-6)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), "use_dora=True is not supported"),
        (dict(bias="all"), "bias='all' is not supported, only 'none'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save="),
        (dict(task_type="SEQ_CLS"), "task_type='SEQ_CLS' is not supported"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(never_seen=1), "never_seen=1 is not supported"),
        (dict(base_model_name_or_path=""), "it needs peft_type=LORA and base_model_name_or_path"),
        (dict(r=4), r"lora_A of .*q_proj is \[2, 16\], but by .* it is \[4, 16\]"),
        (dict(arrays={f"{Q0}.lora_B.weight": np.zeros((20, 2), np.float32)}), r"\[20, 2\], but by"),
        (dict(arrays={f"{Q0}.lora_B.weight": np.zeros(0)}), "lora_B of .* is missing"),
        (dict(arrays={f"{Q0[:-6]}r_proj.lora_B.weight": np.zeros((2, 2))}), "is F64"),
        (dict(arrays={f"{Q0[:-6]}r_proj.lora_B.weight": np.zeros((2, 2), np.float32)}),
         "adapts .*r_proj, which .* doesn't have as a linear layer"),
        (dict(arrays={f"{Q0}.lora_magnitude_vector": np.zeros(2, np.float32)}),
         "lora_magnitude_vector is not supported"),
    ],
)  # fmt: skip
def test_what_peft_can_say_and_we_cannot_is_refused(changes, message, golden, tmp_path):
    write_peft(tmp_path / "peft", golden, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        find_model(tmp_path / "peft")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_adapters_go_out_and_come_back(name, tmp_path):
    """Those of fused kernels as one, whose rank is that of all."""
    folder = copy_golden(name, tmp_path)
    source = find_model(folder)
    for number, targets in enumerate((("layers",), ("[qv]_D",))):
        lora = sections.Lora(rank=2, alpha=6.0, targets=targets, rank_stabilized=bool(number))
        cfg = ModelConfig(**source.config.given(), lora=lora)
        mesh = sharding.make_mesh({}, jax.devices()[:1])
        params = merge_params(read_params(source, cfg.bare, mesh), draw_adapters(cfg))
        peft.write_adapter(tmp_path / str(number), cfg, params, str(folder), name)
        back = read_params(find_model(tmp_path / str(number)), cfg.bare, mesh)
        for path, array in paths(merge_adapters(cfg, params)).items():
            np.testing.assert_allclose(paths(back)[path], array, atol=1e-6, err_msg=path)
