"""Two-digit addition, first imitated, then practised for rewards (GRPO).

    nanojaxgpt train --config=experiments/finetune/addition.py
    nanojaxgpt train --config=experiments/finetune/addition.py:grpo

A model of two layers learns from 25,600 sums and is stopped early, at a third of the unseen sums
right. Then it samples eight answers to each sum, and is rewarded for the right ones (Shao et al.
2024, "DeepSeekMath", arXiv:2402.03300): two thirds are right. Half a minute and a minute on two
cores; the figures are in docs/finetune.md.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config


def right(prompt: str, completion: str, record: dict[str, str]) -> float:
    """Return 1 for the right sum."""
    return float(completion == record["answer"])


def get_config(variant: str = "imitation") -> ConfigDict:
    """Return the config of a variant: `imitation`, or `grpo` after it."""
    cfg = base_config()
    model, train, optim = cfg.model, cfg.train, cfg.optim
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 2, 64, 2, 16
    cfg.data.source = "task:addition,digits=2"
    train.num_steps, train.batch_size = 400, 64
    optim.learning_rate = 3e-3
    if variant == "grpo":
        cfg.init.from_run = "runs/addition"
        cfg.objective.kind, cfg.objective.reward = "policy", f"{__file__}:right"
        cfg.objective.max_tokens = 3
        train.num_steps, train.batch_size = 400, 32
        optim.learning_rate, optim.schedule, optim.warmup_steps = 5e-4, "linear", 10
        cfg.eval.every_steps = 50
    elif variant != "imitation":
        raise KeyError(f"no variant {variant}; available: imitation, grpo")
    return cfg
