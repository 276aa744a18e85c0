"""SmolLM2-135M, a chat model of 135 million parameters, tuned to topics, summaries and translation.

    bash scripts/chat.sh   # once: fetches the model
    python scripts/finetune_data.py ag_news TEST.csv runs/data
    nanojaxgpt train --config=experiments/finetune/smollm2.py:topics_lora

The variants `topics_*` classify the texts of AG News (Zhang et al. 2015, arXiv:1509.01626): with a
head, where all layers train, the last two, or adapters; or with the topics as words of the model.
`summaries` learns from DialogSum (Chen et al. 2021, arXiv:2105.06762), `translation` from Multi30k
(Elliott et al. 2016, arXiv:1605.00459). Each takes minutes on two cores; docs/finetune.md has the
figures, measured by tasks.json.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
MODEL = CACHE / "nanojaxgpt/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = "runs/data"


def topics(cfg: ConfigDict, how: str) -> None:
    """Classify a text into four topics, after about a thousand examples."""
    cfg.train.num_steps = 60
    if how == "words":
        cfg.data.source, cfg.data.chat_template = f"pairs:{DATA}/ag_news_words_train.jsonl", "none"
        cfg.data.validation_fraction = 0.05
        cfg.lora.rank, cfg.optim.learning_rate = 8, 1e-3
        return
    cfg.objective.kind = "classify"
    cfg.data.source = f"labels:{DATA}/ag_news_train.jsonl"
    cfg.data.validation_source = f"labels:{DATA}/ag_news_validation.jsonl"
    if how == "full":
        cfg.optim.learning_rate = 1e-4
    elif how == "last_layers":
        cfg.optim.trainable, cfg.optim.trainable_layers = ("layers/", "final_norm", "label"), 2
        cfg.optim.learning_rate = 5e-4
    elif how == "lora":
        cfg.lora.rank, cfg.optim.learning_rate = 8, 1e-3
    else:
        raise KeyError(f"no variant topics_{how}; available: full, last_layers, lora, words")


def get_config(variant: str = "topics_lora") -> ConfigDict:
    """Return the config of a variant: topics_HOW, summaries or translation."""
    cfg = base_config()
    cfg.init.from_model = str(MODEL)
    cfg.model.seq_len, cfg.train.batch_size = 256, 4
    cfg.data.packing, cfg.data.overlong = "pack", "cut"
    cfg.data.lossy_tokenizer = True  # it drops a few control characters
    cfg.optim.warmup_steps, cfg.optim.weight_decay = 10, 0.0
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 0
    kind, _, how = variant.partition("_")
    if kind == "topics":
        topics(cfg, how)
    elif variant in ("summaries", "translation"):
        cfg.lora.rank, cfg.optim.learning_rate, cfg.train.num_steps = 8, 1e-3, 60
        cfg.data.source = f"pairs:{DATA}/multi30k_train.jsonl"
        cfg.data.validation_fraction = 0.02
        if variant == "summaries":
            cfg.data.source = f"pairs:{DATA}/dialogsum_train.jsonl"
            cfg.model.seq_len, cfg.train.batch_size = 512, 2
    else:
        raise KeyError(f"no variant {variant}; available: topics_HOW, summaries, translation")
    return cfg
