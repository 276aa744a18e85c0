"""GPT-3 in two of its sizes (Brown et al. 2020, Table 2.1): XL, called 1.3b here, and 6.7b.

Parameters: 1.3b 1,315,723,264 and 6.7b 6,658,404,352 with 50,257 tokens and 2,048 learned
positions; the paper rounds them to 1.3 and 6.7 billion. Its XL row has 24 heads of 128 on a width
of 2,048, which would make 1,517,123,584: here are 16 heads, which give the count it states.
Attention is dense in every layer; the paper's alternates with locally banded sparse layers.

    nanojaxgpt rehearse --config=experiments/gpt3.py:1.3b --topology=v5e:8x8
    nanojaxgpt rehearse --config=experiments/gpt3.py:6.7b --topology=v5p:4x4x4
    nanojaxgpt train --config=experiments/gpt3.py:1.3b --config.data.source=text:PATH

Rehearsed with libtpu 0.0.42.1: 1.3b fits 64 v5e (mesh fsdp=64, 9.1 of 16 GiB), 6.7b 64 v5p
(fsdp=64, 45.1 of 95 GiB).
Steps, batches, warmup (375 M tokens), decay and weight decay are the paper's. Not trained with
this code, so no figure is claimed here.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config

SIZES = {  # layers, width, heads, learning rate, sequences of 2,048 tokens a batch
    "1.3b": (24, 2048, 16, 2e-4, 512),
    "6.7b": (32, 4096, 32, 1.2e-4, 1024),
}
NUM_PARAMS = {"1.3b": 1_315_723_264, "6.7b": 6_658_404_352}


def get_config(variant: str = "1.3b") -> ConfigDict:
    """Return the config of one size."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    model.num_layers, model.embed_dim, model.num_heads, rate, train.batch_size = SIZES[variant]
    model.head_dim = 128
    model.seq_len = 2048
    model.vocab_size = 50257
    model.compute_dtype = "bfloat16"
    model.remat = "dots_no_batch"
    tokens = train.batch_size * model.seq_len
    optim.learning_rate = rate
    optim.warmup_steps = 375_000_000 // tokens
    train.num_steps = 300_000_000_000 // tokens
    train.accumulation_steps = 2
    train.loss_chunks = 8
    cfg.mesh.data, cfg.mesh.fsdp = 1, -1
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 1000
    cfg.eval.num_batches = 20
    return cfg
