"""A small GPT on Python's own standard library: what `bash scripts/quickstart.sh` trains.

nanojaxgpt train --config=experiments/quickstart.py
nanojaxgpt sweep run --config=experiments/quickstart.py
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config
from nanojaxgpt.sweep.space import Space, choice, log_uniform, product


def get_config() -> ConfigDict:
    """Return the config."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    cfg.data.source = "stdlib"
    cfg.data.tokenizer = "sentencepiece"
    cfg.data.tokenizer_vocab_size = 2048
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 4, 128, 4, 128
    model.positions = "rotary"
    model.norm = "rmsnorm"
    model.bias = False
    model.mlp = "relu2"
    optim.learning_rate = 4e-3
    optim.warmup_steps = 50
    optim.schedule = "wsd"
    optim.decay_fraction = 0.5
    optim.final_fraction = 0.05
    train.batch_size = 16
    train.num_steps = 1000
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 250
    cfg.eval.batch_size = 64
    cfg.eval.num_batches = 6
    cfg.sample.prompt = "def "
    cfg.sample.temperature = 0.6
    return cfg


def sweep() -> Space:
    """Return four learning rates around the config's own, each with four seeds."""
    rates = log_uniform("optim.learning_rate", 1e-3, 8e-3, 4)
    return product(rates, choice("train.seed", 0, 1, 2, 3))
