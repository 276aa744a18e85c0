"""Adapters against the package peft: the same logits in both directions, the same training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens
from test_families import CASES, Case, their_model, torch
from test_huggingface import LETTERS, assert_close, their_logits
from test_lora import draw_adapters, forward

from nanojaxgpt.config import with_fields
from nanojaxgpt.config.sections import Lora
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.data.tokenizer_json import export_characters
from nanojaxgpt.interchange import peft as ours
from nanojaxgpt.interchange.loading import read_params
from nanojaxgpt.interchange.opening import config_of, find_model
from nanojaxgpt.model.config import ModelConfig, complete
from nanojaxgpt.model.lora import add_adapters
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import language
from nanojaxgpt.sharding import make_mesh
from nanojaxgpt.step import first_state, make_hyper, make_train_step
from nanojaxgpt.trainable import merge_params

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

TOKENS_BT = random_tokens(2, 16)
# The tensors with adapters that peft names itself; those of "layers" are all of them.
THEIR_TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}
NAMES = list(THEIR_TARGETS)


def save_base(name: str, folder) -> None:
    """Write a random model of transformers."""
    case = Case("phi3") if name == "phi3" else CASES[name]
    their_model(case).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(export_characters(LETTERS))


def adapted(source, **lora) -> tuple[ModelConfig, dict]:
    """Return the model of a folder with adapters, and its parameters without them."""
    cfg = ModelConfig(**source.config.given(), lora=Lora(**lora))
    return cfg, read_params(source, cfg.bare, make_mesh({}, jax.devices()[:1]))


def with_adapter(base, adapter, trains: bool = False):
    """Return a model of transformers with an adapter, as peft loads it."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=trains)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stable", [False, True])
def test_peft_computes_what_our_adapters_do(name, stable, tmp_path):
    base = tmp_path / "base"
    save_base(name, base)
    source = find_model(base)
    targets = ("layers",) if stable else ("[qv]_D", "down")
    cfg, params = adapted(source, rank=3, alpha=5.0, targets=targets, rank_stabilized=stable)
    params = merge_params(params, draw_adapters(cfg))
    ours.write_adapter(tmp_path / "out", cfg, params, str(base), source.family)
    theirs = with_adapter(base, tmp_path / "out")
    assert not [key for key in theirs.state_dict() if "lora_" in key and "default" not in key]
    logits_BTV = forward(cfg, params)
    assert np.abs(logits_BTV - forward(cfg.bare, params)).max() > 0.1
    assert_close(their_logits(theirs.eval(), TOKENS_BT), logits_BTV)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stable", [False, True])
def test_we_compute_what_an_adapter_of_peft_does(name, stable, tmp_path):
    base = tmp_path / "base"
    save_base(name, base)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=THEIR_TARGETS[name], use_rslora=stable,
        task_type="CAUSAL_LM", rank_pattern={THEIR_TARGETS[name][-1]: 2} if stable else {},
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.get_peft_model(plain, settings)
    with torch.no_grad():
        for key, tensor in theirs.named_parameters():
            if "lora_B" in key:
                tensor.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    source = find_model(tmp_path / "adapter")
    params = read_params(source, source.config, make_mesh({}, jax.devices()[:1]))
    assert_close(forward(source.config, params), their_logits(theirs.eval(), TOKENS_BT))


def test_five_steps_of_adamw_are_those_of_peft_and_torch(tmp_path):
    base = tmp_path / "base"
    save_base("llama", base)
    source = find_model(base)
    fields = {"lora.rank": 3, "lora.alpha": 6.0, "optim.learning_rate": 0.01,
              "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.clip_norm": 0.0,
              "optim.weight_decay": 0.1, "optim.beta2": 0.95}  # fmt: skip
    cfg = complete(with_fields(config_of(source), fields))
    params = read_params(source, cfg.model.bare, make_mesh({}, jax.devices()[:1]))
    params = add_adapters(cfg.model, params, jax.random.key(0))
    ours.write_adapter(tmp_path / "start", cfg.model, params, str(base), source.family)
    theirs = with_adapter(base, tmp_path / "start", trains=True).train()
    weights = [tensor for tensor in theirs.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    step = jax.jit(make_train_step(
        language.make_loss(Transformer(cfg.model), 1), cfg.optim, cfg.model
    ))  # fmt: skip
    state, frozen = first_state(cfg, params)
    losses = []
    for number in range(5):
        rows_BT = random_tokens(4, 17, seed=number)
        inputs_BT, targets_BT = rows_BT[:, :-1], rows_BT[:, 1:]
        batch = Batch(*map(jnp.asarray, (inputs_BT, targets_BT, np.ones((4, 16), np.float32))))
        state, numbers = step(state, batch, make_hyper(cfg), frozen)
        optimizer.zero_grad()
        logits_BTV = theirs(torch.tensor(inputs_BT, dtype=torch.long)).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), torch.tensor(targets_BT, dtype=torch.long).flatten()
        )
        loss.backward()
        optimizer.step()
        losses.append((float(numbers["loss"]), loss.item()))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-5)
    theirs.save_pretrained(tmp_path / "end")
    whole = merge_params(state.params, frozen)
    ours.write_adapter(tmp_path / "own", cfg.model, whole, str(base), source.family)
    from safetensors.numpy import load_file

    mine, other = (load_file(tmp_path / one / ours.WEIGHTS) for one in ("own", "end"))
    assert mine.keys() == other.keys()
    for name, array in other.items():
        np.testing.assert_allclose(mine[name], array, atol=2e-5, err_msg=name)
        assert np.abs(array).max() > 0.01
