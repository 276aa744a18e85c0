"""Llama 3 in two sizes (Grattafiori et al. 2024, The Llama 3 Herd of Models, Table 3).

Parameters: 8b 8,030,261,248, 70b 70,553,706,496, as in the released weights. Shapes, learning
rates, warmup and 8,192 tokens of context are the paper's; a step has 4 million tokens, as its
training began.

    nanojaxgpt rehearse --config=experiments/llama3.py:8b --topology=v5p:4x4x4
    nanojaxgpt rehearse --config=experiments/llama3.py:70b --topology=v5p:4x4x8 --slices=2
    nanojaxgpt train --config=experiments/llama3.py:8b --config.data.source=jsonl:PATH

Rehearsed with libtpu 0.0.42.1: 8b fits 64 v5p (mesh fsdp=64, 52.5 of 95 GiB) and, with
--config.train.accumulation_steps=2, 256 v6e (29.2 of 32 GiB); 70b fits two slices of 128 v5p
(slice=2 fsdp=128, 49.6 of 95 GiB).
Not trained with this code, so no figure is claimed here.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config

SIZES = {  # layers, width, heads, mlp, learning rate
    "8b": (32, 4096, 32, 14336, 3e-4),
    "70b": (80, 8192, 64, 28672, 1.5e-4),
}
NUM_PARAMS = {"8b": 8_030_261_248, "70b": 70_553_706_496}


def get_config(variant: str = "8b") -> ConfigDict:
    """Return the config of one size."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim, rate = SIZES[variant]
    model.num_kv_heads = 8
    model.seq_len = 8192
    model.vocab_size = 128_256
    model.mlp = "swiglu"
    model.norm = "rmsnorm"
    model.positions = "rotary"
    model.rotary_base = 500_000.0
    model.bias = model.tied_head = False
    model.compute_dtype = "bfloat16"
    optim.learning_rate = rate
    optim.warmup_steps = 8000
    optim.final_fraction = 0.01
    train.batch_size = 512
    train.num_steps = 1_200_000
    train.loss_chunks = 8
    if variant == "8b":
        cfg.mesh.data, cfg.mesh.fsdp = 1, -1
        model.remat = "dots_no_batch"
        train.accumulation_steps = 4
    else:
        cfg.mesh.slice, cfg.mesh.data, cfg.mesh.fsdp = 2, 1, -1
        model.remat = "full"
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 1000
    cfg.eval.num_batches = 20
    return cfg
