"""Induction heads: two attention layers copy what repeats, one can't, one with smeared keys can.

Paper: Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv:2209.11895), arguments 1
and 2. There, models trained on 10 B tokens of text go through an abrupt change in which induction
heads form and in-context learning appears, "except the one layer model"; keys mixed with the key
before let one layer do it. Here the same three architectures learn the paper's own probe, random
words that repeat, so what is compared is which of them copies and how abruptly, not the paper's
nats. The period is random: at a fixed one, one layer copies by position.

    nanojaxgpt reproduce experiments/papers/induction_heads.py [--seeds=1]

Hardware: one CPU core, 4 to 8 minutes for each seed of the three arms. Verified on 2026-11-22, the
mean of three seeds: repeat loss 0.0011 / 2.87 / 0.0005 nats, accuracy 100 / 13.6 / 100 %, a fall
within 200 to 300 steps, prefix matching 0.99 in layer 2 and 0.03 in layer 1.
"""

import math
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run

if TYPE_CHECKING:
    from nanojaxgpt.model.config import ModelConfig

SOURCE = "Olsson et al. 2022, argument 1 (the phase change) and its figures"
SMEARED = "Olsson et al. 2022, argument 2 (smeared keys)"
ARMS = {  # layers, smeared keys
    "two_layers": (2, False),
    "one_layer": (1, False),
    "one_layer_smeared": (1, True),
}
NUM_STEPS = 2000


def get_config(variant: str = "two_layers") -> ConfigDict:
    """Return the config of one arm: attention only, 64 wide, 4 heads, 8 M tokens."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    model.num_layers, model.smeared_keys = ARMS[variant]
    model.embed_dim, model.num_heads, model.seq_len = 64, 4, 64
    model.mlp = "none"
    model.tied_head = False
    model.init = "fan_in"
    cfg.data.source = "task:induction,length=65,vocab=64,shortest=8,train_all=1"
    optim.schedule = "constant"
    optim.learning_rate, optim.warmup_steps = 1e-3, 50
    optim.beta2, optim.weight_decay = 0.98, 0.01
    train.num_steps, train.batch_size, train.log_every_steps = NUM_STEPS, 64, 100
    cfg.eval.every_steps, cfg.eval.batch_size = 100, 250
    cfg.checkpoint.every_steps = 500
    return cfg


def repeat_loss(run: Run) -> float:
    """Return the last loss on repeated words in nats; 0 is the optimum."""
    return run.at(NUM_STEPS)


def repeat_accuracy(run: Run) -> float:
    """Return the share of repeated words that are the most likely by the model."""
    import jax
    import jax.numpy as jnp

    from nanojaxgpt.model.transformer import Transformer

    model_cfg, params, batch = validation_batch(run)

    @jax.jit
    def accuracy(params: Any) -> Any:
        logits_BTV, _ = Transformer(model_cfg).apply({"params": params}, batch.tokens_BT)
        right_BT = jnp.argmax(logits_BTV, -1) == batch.targets_BT
        return jnp.sum(right_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)

    return float(accuracy(params))


def validation_batch(run: Run) -> tuple["ModelConfig", Any, Any]:
    """Return the model's config, a run's last parameters and its first 250 validation rows."""
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.papers.reproduce import first_rows, load_job

    job, params = load_job(run)
    batch = first_rows(job.data.validation(run.cfg.model.seq_len), 250)
    return ModelConfig(**run.cfg.model), params, batch


def steps_of_the_fall(run: Run) -> float:
    """Return the steps from the last validation above 2.5 nats to the first below 0.5."""
    losses = {r["step"]: r["validation_loss"] for r in run.records if "validation_loss" in r}
    low = [step for step, loss in losses.items() if loss < 0.5]
    if not low:
        return math.nan
    return min(low) - max((step for step, loss in losses.items() if loss > 2.5), default=0)


def prefix_matching(run: Run, layer: int) -> float:
    """Return the best head's weight on words that follow earlier copies of the query's word."""
    import jax.numpy as jnp

    from nanojaxgpt.papers.probe import attention_weights

    model_cfg, params, batch = validation_batch(run)
    tokens_BT = jnp.asarray(batch.tokens_BT)
    weights_BNTS = attention_weights(model_cfg, params, batch)[layer]
    same_BTS = tokens_BT[:, :, None] == tokens_BT[:, None]
    earlier_BTS = jnp.tril(same_BTS, -1)
    after_BTS = jnp.pad(earlier_BTS[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    repeated_BT = earlier_BTS.any(-1)
    matched_N = jnp.einsum("BNTS,BTS->N", weights_BNTS, after_BTS) / repeated_BT.sum()
    return float(matched_N.max())


def get_paper() -> Paper:
    """Return the three arms, and what each has to do with repeated words."""
    copies, fails = ((0.0, 0.05), (0.99, 1.0)), ((2.3, math.inf), (0.0, 0.3))
    claims = []
    for arm, published, source, (loss, accuracy) in (
        ("two_layers", "copies", SOURCE, copies),
        ("one_layer", "does not copy", SOURCE, fails),
        ("one_layer_smeared", "copies", SMEARED, copies),
    ):
        name = arm.replace("_", " ")
        one: dict[str, Any] = dict(arms=(arm,), every_seed=True)
        claims += [
            Claim(f"{name}: repeat loss", published, source, repeat_loss, loss, **one),
            Claim(f"{name}: accuracy", published, source, repeat_accuracy, accuracy, **one),
        ]
    shared: dict[str, Any] = dict(source=SOURCE, arms=("two_layers",), every_seed=True)
    claims += [
        Claim("two layers: steps from 2.5 to 0.5 nats", "abrupt", measure=steps_of_the_fall,
              accept=(0, 500), **shared),
        Claim("two layers: prefix matching in layer 2", "induction heads",
              measure=lambda run: prefix_matching(run, 1), accept=(0.4, 1), **shared),
        Claim("two layers: prefix matching in layer 1", "none in the first layer",
              measure=lambda run: prefix_matching(run, 0), accept=(0, 0.1), **shared),
    ]  # fmt: skip
    arms = tuple(Arm(name, get_config(name), seeds=(0, 1, 2)) for name in ARMS)
    smaller = (
        "attention-only models, 64 wide, on 8 M tokens of repeated random words, where the paper "
        "trains on 10 B tokens of text; its nats are not compared."
    )
    return Paper("Induction heads need two layers, or smeared keys", tuple(claims), arms, smaller)
