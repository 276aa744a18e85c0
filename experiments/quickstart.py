"""placeholder"""

from nanojaxgpt.config import base_config


def get_config():
    cfg = base_config()
    cfg.data.tokenizer = "bytes"
    cfg.model.seq_len = 128
    cfg.train.num_steps = 60
    cfg.eval.num_batches = 5
    cfg.eval.every_steps = 30
    cfg.checkpoint.every_steps = 20
    return cfg
