"""Two-digit addition, first imitated, then practised for rewards (GRPO) or by comparison (DPO).

    nanojaxgpt train --config=experiments/finetune/addition.py
    nanojaxgpt train --config=experiments/finetune/addition.py:grpo
    python scripts/finetune_data.py preferences runs/addition runs/data
    nanojaxgpt train --config=experiments/finetune/addition.py:dpo

A model of two layers learns from 300 labelled sums of the 10,000 that two digits have. `grpo`
samples eight answers to each of 9,000 sums, and a checker rewards the right ones (Shao et al. 2024,
"DeepSeekMath", arXiv:2402.03300). `dpo` learns from a right and a wrong answer of the model's own
(Rafailov et al. 2023, arXiv:2305.18290). Minutes on two cores; docs/finetune.md has the
figures.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config


def right(prompt: str, completion: str, record: dict[str, str]) -> float:
    """Return 1 for the right sum."""
    return float(completion == record["answer"])


def get_config(variant: str = "imitation") -> ConfigDict:
    """Return the config of a variant: `imitation`, or `grpo` or `dpo` after it."""
    cfg = base_config()
    model, train, optim = cfg.model, cfg.train, cfg.optim
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 2, 64, 2, 16
    cfg.data.source = "task:addition,digits=2"  # of all sums, 9,000 to train on
    train.num_steps, train.batch_size = 400, 64
    optim.learning_rate = 3e-3
    if variant == "imitation":
        cfg.data.source += ",train_fraction=0.03"
    elif variant == "grpo":
        cfg.init.from_run = "runs/addition"
        cfg.objective.kind, cfg.objective.reward = "policy", f"{__file__}:right"
        cfg.objective.max_tokens = 3
        train.num_steps, train.batch_size = 400, 32
        optim.learning_rate, optim.schedule, optim.warmup_steps = 5e-4, "linear", 10
        cfg.eval.every_steps = 50
    elif variant == "dpo":
        cfg.init.from_run, cfg.objective.kind = "runs/addition", "preference"
        cfg.data.source = "preferences:runs/data/addition_preferences.jsonl"
        cfg.data.packing = "pack"
        cfg.data.lossy_tokenizer = True  # its words stand between single spaces
        cfg.objective.nll_weight = 1.0
        train.num_steps, train.batch_size = 200, 64
        optim.learning_rate, optim.schedule, optim.warmup_steps = 5e-4, "linear", 10
    else:
        raise KeyError(f"no variant {variant}; available: imitation, grpo, dpo")
    return cfg
