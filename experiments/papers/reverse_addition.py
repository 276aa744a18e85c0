"""Sums written from the last digit on are learned from fewer examples than written as usual.

Paper: Lee et al. 2023, "Teaching Arithmetic to Small Transformers" (arXiv:2307.03381), its figure
on sample efficiency and plots/sample_efficiency.csv of its code: a model of 10.6 M parameters that
trains on a stream of three-digit sums gets 99.8 % of unseen ones right from 5,000 examples with
the answer reversed, and 81.1 % with it plain.

    nanojaxgpt reproduce experiments/papers/reverse_addition.py [--seeds=1]

Here the numbers are padded with zeros, which the paper shows to help plain sums too, and a row is
one example: with that 1,000 examples and 148 k parameters are enough, and the claim is about which
order generalizes. Both must fit what they were trained on. Tested on 2,000 unseen pairs.

Hardware: half a CPU core, 2 to 3 minutes for each of 2 arms and 3 seeds. Verified on 2026-11-24:
98.5 % reversed, 53.5 % plain, the mean of three seeds. Those of the plain arm are 59, 89 and 12 %:
from so few examples plain sums are learned by luck, reversed ones always.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run

SOURCE = "Lee et al. 2023, sample efficiency: 5,000 examples, 10.6 M parameters, no padding"
ARMS = {"plain": 0, "reversed": 1}
EXAMPLES = 1000


def get_config(variant: str = "plain") -> ConfigDict:
    """Return the config of one arm: nanoGPT's model and schedule, 3 layers x 64."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    cfg.data.source = f"task:addition,balanced={EXAMPLES},reversed={ARMS[variant]}"
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 3, 64, 4, 11
    model.mlp = "gelu"
    model.bias = model.norm_bias = False
    optim.beta2 = 0.99
    train.num_steps, train.batch_size, train.log_every_steps = 1500, 128, 50
    cfg.eval.every_steps, cfg.checkpoint.every_steps, cfg.eval.batch_size = 250, 500, 500
    return cfg


def accuracy(run: Run, unseen: bool = True) -> float:
    """Return the percentage of unseen pairs, or of those trained on, whose sum is right."""
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.model.transformer import Transformer
    from nanojaxgpt.papers.reproduce import first_rows, load_job
    from nanojaxgpt.perplexity import exact_match

    job, params = load_job(run)
    length = run.cfg.model.seq_len
    rows = job.data.validation(length) if unseen else job.data.train(length)[0].rows
    model = Transformer(ModelConfig(**run.cfg.model))
    return 100 * float(exact_match(model, params, first_rows(rows, rows.count)).mean())


def decoded_accuracy(run: Run) -> float:
    """Return the percentage of unseen pairs whose sum is right as greedy decoding writes it."""
    import jax
    import jax.numpy as jnp

    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.model.transformer import Transformer
    from nanojaxgpt.papers.reproduce import first_rows, load_job
    from nanojaxgpt.sample import Sampling, generate

    job, params = load_job(run)
    rows = job.data.validation(run.cfg.model.seq_len)
    batch = first_rows(rows, rows.count)
    digits = int(batch.weights_BT[0].sum())
    prompts_BT = jnp.asarray(batch.tokens_BT)[:, : 1 - digits]  # up to the equals sign
    written_BT = generate(
        Transformer(ModelConfig(**run.cfg.model)), params, prompts_BT,
        jnp.full(len(prompts_BT), prompts_BT.shape[1]), jax.random.key(0),
        max_tokens=digits, how=Sampling(temperature=0),
    )  # fmt: skip
    right_BT = written_BT == batch.targets_BT[:, -digits:]
    return 100 * float(right_BT.all(axis=1).mean())


def get_paper() -> Paper:
    """Return both orders from 1,000 examples, three seeds each."""
    both: dict[str, Any] = dict(source=SOURCE, arms=("plain", "reversed"))
    claims = (
        Claim("reversed: unseen sums right, %", "99.8", SOURCE, accuracy, (95, 100),
              ("reversed",)),
        Claim("plain: unseen sums right, %", "81.1", SOURCE, accuracy, (0, 75), ("plain",)),
        Claim("reversed less plain, points", "18.7", accept=(25, 100),
              measure=lambda plain, reverse: accuracy(reverse) - accuracy(plain), **both),
        Claim("control: plain, sums trained on right, %", "fitted", SOURCE,
              lambda plain: accuracy(plain, unseen=False), (98, 100), ("plain",)),
        Claim("control: decoded less by likeliest tokens, points, of both arms", "equal",
              measure=lambda *runs: math.fsum(abs(decoded_accuracy(run) - accuracy(run))
                                              for run in runs),
              accept=(0, 0), every_seed=True, **both),
    )  # fmt: skip
    smaller = (
        "148 k parameters, 1,000 examples of numbers padded with zeros, 1,500 steps, where the "
        "paper has 10.6 M parameters, 1,000 to 20,000 examples without padding and 5,000 steps of "
        "65,536 tokens; numbers of examples are not compared."
    )
    arms = tuple(Arm(name, get_config(name), seeds=(0, 1, 2)) for name in ARMS)
    return Paper("Addition is learned sooner from the last digit on", claims, arms, smaller)
