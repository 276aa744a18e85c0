"""GPT-2 small trained from scratch: on OpenWebText as nanoGPT does, on FineWeb as llm.c does.

Sources: nanoGPT's README and config/train_gpt2.py (commit 3adf61e): 600,000 steps of 491,520 tokens
of OpenWebText, validation loss about 2.85, four days on 8 A100 of 40 GB. llm.c's
scripts/run_gpt2_124M.sh: 18,865 steps of 524,288 tokens of FineWeb, 3.28 to 3.29 (modded-nanogpt's
README), 94 minutes on 8 A100.

    nanojaxgpt reproduce experiments/papers/gpt2_124m.py --config.mesh.data=8

OpenWebText and FineWeb come through Hugging Face's `datasets`, the tokenizer from GPT-2's
encoder.json and vocab.bpe in the folder gpt2. Validation is on the last documents of each corpus,
which are not those that nanoGPT and llm.c hold out. Hardware: 8 GPUs of 40 GB; on a CPU it is
NOT-RUN. Not run yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import load_experiment
from nanojaxgpt.papers.paper import Arm, Claim, Paper

RECIPE = Path(__file__).parents[1] / "gpt2.py"
NANOGPT = "nanoGPT, README (commit 3adf61e)"
LLM_C = "llm.c, scripts/run_gpt2_124M.sh; modded-nanogpt, README: about 3.29"
ARMS = {  # corpus, sequences a step, steps, warmup, final fraction, validation documents, biases
    "openwebtext": ("hf:Skylion007/openwebtext", 480, 600_000, 2000, 0.1, 4007, False),
    "fineweb": ("hf:HuggingFaceFW/fineweb/sample-10BT", 512, 18_865, 700, 0.0, 100_000, True),
}
NUM_PARAMS = {  # the vocabulary padded to 50,304
    "openwebtext": 124_373_760,
    "fineweb": 124_475_904,
}


def get_config(variant: str = "fineweb") -> ConfigDict:
    """Return the config of one corpus."""
    cfg = load_experiment(f"{RECIPE}:small")
    model, optim, train = cfg.model, cfg.optim, cfg.train
    cfg.data.source, train.batch_size, train.num_steps, optim.warmup_steps, *rest = ARMS[variant]
    optim.final_fraction, cfg.data.validation_documents, model.bias = rest
    model.norm_bias = model.bias
    cfg.data.tokenizer = "gpt2:gpt2"
    model.vocab_size = 50_304
    model.mlp = {"openwebtext": "gelu", "fineweb": "gelu_tanh"}[variant]
    cfg.eval.batch_size, cfg.eval.num_batches = 96, 40
    return cfg


def get_paper() -> Paper:
    """Return both recipes, each with the loss at its last step."""
    arms = tuple(Arm(name, get_config(name)) for name in ARMS)
    claims = (
        Claim("OpenWebText: validation loss, step 600,000", 2.85, NANOGPT,
              lambda run: run.at(600_000), (2.82, 2.88), ("openwebtext",)),
        Claim("FineWeb: validation loss, step 18,865", 3.29, LLM_C, lambda run: run.at(18_865),
              (3.26, 3.32), ("fineweb",)),
    )  # fmt: skip
    return Paper("GPT-2 small from scratch", claims, arms, needs="eight GPUs or a TPU slice")
