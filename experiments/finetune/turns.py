"""A base model trained on dialogues, then taught to answer in turns: a chat of its own.

    python scripts/finetune_data.py turns DEV.jsonl TEST.jsonl runs/data
    nanojaxgpt train --config=experiments/finetune/turns.py:base
    nanojaxgpt train --config=experiments/finetune/turns.py:chat
    nanojaxgpt chat runs/chat

The dialogues are DialogSum's (Chen et al. 2021, arXiv:2105.06762). The base model reads them as
text, the chat then trains on the answers alone. It has four layers and reads 496 dialogues: expect
the manner of a dialogue, and no knowledge.
"""

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config


def get_config(variant: str = "base") -> ConfigDict:
    """Return the config of a variant: `base`, or `chat` after it."""
    cfg = base_config()
    cfg.model.num_layers, cfg.model.embed_dim, cfg.model.num_heads = 4, 192, 6
    cfg.model.seq_len, cfg.model.positions = 512, "rotary"
    cfg.model.dropout = 0.1
    cfg.data.packing, cfg.data.overlong = "pack", "cut"
    cfg.train.batch_size = 8
    if variant == "base":
        cfg.data.source = "jsonl:runs/data/dialogues_train.jsonl"
        cfg.data.validation_source = "jsonl:runs/data/dialogues_validation.jsonl"
        cfg.data.tokenizer, cfg.data.tokenizer_vocab_size = "sentencepiece", 2048
        cfg.train.num_steps, cfg.optim.learning_rate = 600, 2e-3
    elif variant == "chat":
        cfg.init.from_run = "runs/base"
        cfg.data.source = "chat:runs/data/turns_train.jsonl"
        cfg.data.validation_source = "chat:runs/data/turns_validation.jsonl"
        cfg.data.chat_template = "plain"
        cfg.train.num_steps, cfg.optim.learning_rate = 150, 5e-4
    else:
        raise KeyError(f"no variant {variant}; available: base, chat")
    return cfg
