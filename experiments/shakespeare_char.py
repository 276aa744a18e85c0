"""nanoGPT's two Shakespeare recipes, by characters (its README, commit 3adf61e).

cpu: 4 layers, 128 wide, context 64, batch 12, 2,000 steps. nanoGPT gives a validation loss of
1.88 by 20 random batches (its logs say 1.8857 with seed 1337); over the whole split, as here, the
mean of three seeds must come out in [1.86, 1.94]. About 2 minutes on two CPU cores; verified on
2026-11-22: 1.9076, 1.9041, 1.9055 for seeds 0, 1, 2.
gpu: 6 layers, 384 wide, context 256, batch 64, 5,000 steps, dropout 0.2; nanoGPT's best
validation loss is 1.4697. A few minutes on one data-centre GPU; not yet run with this code.

    nanojaxgpt train --config=experiments/shakespeare_char.py:cpu

Tiny Shakespeare, char-rnn's data/tinyshakespeare/input.txt of 1,115,394 bytes, is downloaded once
into the cache. Without a network, give a copy of it: --config.data.source=text:PATH.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config

CORPUS = (
    "text:https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NUM_PARAMS = {"cpu": 804_096, "gpu": 10_745_088}


def set_corpus(cfg: ConfigDict) -> None:
    """Let `cfg` train on Tiny Shakespeare by characters."""
    cfg.data.source, cfg.data.sha256, cfg.data.tokenizer = CORPUS, SHA256, "chars"


def get_config(variant: str = "cpu") -> ConfigDict:
    """Return the config of one recipe; nanoGPT's defaults where its files say nothing."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    set_corpus(cfg)
    model.mlp = "gelu"
    model.bias = model.norm_bias = False
    optim.beta2 = 0.99
    if variant == "cpu":
        model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 4, 128, 4, 64
        train.batch_size, train.num_steps = 12, 2000
        cfg.eval.every_steps = cfg.checkpoint.every_steps = 500
    elif variant == "gpu":
        model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 6, 384, 6, 256
        model.dropout = 0.2
        model.compute_dtype = "bfloat16"
        train.batch_size, train.num_steps = 64, 5000
        cfg.eval.every_steps = cfg.checkpoint.every_steps = 250
    else:
        raise KeyError(f"no variant {variant}; available: cpu, gpu")
    cfg.eval.batch_size = 128
    return cfg
