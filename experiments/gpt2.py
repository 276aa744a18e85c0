"""GPT-2 in its four sizes (Radford et al. 2019), trained as nanoGPT and llm.c train the small one.

Parameters: small 124,439,808, medium 354,823,168, large 774,030,080, xl 1,557,611,200, as in
OpenAI's released weights (the paper's own 117M and 345M were wrong, says their README).

    nanojaxgpt rehearse --config=experiments/gpt2.py:xl --topology=v5e:4x4
    nanojaxgpt train --config=experiments/gpt2.py:small --config.data.source=text:PATH

The corpus is yours to give; 491,520 tokens a step, for an 8 x 80 GB node or 16 TPUs.
Rehearsed with libtpu 0.0.42.1, every size fits 16 v5e of 16 GiB (mesh fsdp=16): small takes 7.7,
medium 9.1, large 11.0, xl 12.2 GiB. Not yet trained to its end with this code, so no figure is
claimed here.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config

SIZES = {  # layers, width, heads, learning rate, micro-batches
    "small": (12, 768, 12, 6e-4, 1),
    "medium": (24, 1024, 16, 3e-4, 2),
    "large": (36, 1280, 20, 2.5e-4, 3),
    "xl": (48, 1600, 25, 2e-4, 5),
}
NUM_PARAMS = {
    "small": 124_439_808,
    "medium": 354_823_168,
    "large": 774_030_080,
    "xl": 1_557_611_200,
}


def get_config(variant: str = "small") -> ConfigDict:
    """Return the config of one size."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    model.num_layers, model.embed_dim, model.num_heads, rate, parts = SIZES[variant]
    model.seq_len = 1024
    model.vocab_size = 50257
    model.compute_dtype = "bfloat16"
    model.remat = "dots_no_batch"
    train.batch_size = 480
    train.num_steps = 600_000
    train.accumulation_steps = parts
    train.loss_chunks = 8
    optim.learning_rate = rate
    optim.warmup_steps = 2000
    cfg.mesh.data, cfg.mesh.fsdp = 1, -1
    cfg.eval.every_steps = 1000
    cfg.eval.num_batches = 20
    cfg.checkpoint.every_steps = 1000
    return cfg
