"""muP's transfer of the learning rate at nanoGPT-mup's own widths, 256 to 2048.

Paper: Yang et al. 2022 (arXiv:2203.03466); the recipe is that of EleutherAI's nanoGPT-mup (commit
b2a5e60): 2 layers, heads of 64, learning rates 2^-14 to 2^-3 and three seeds, on Tiny Shakespeare
by characters (122 steps of 8 x 1024, constant rate) and on OpenWebText (1,000 steps of 32 x 1024, a
cosine to a tenth). What is claimed and how it is measured is that of mup_transfer.py.

    nanojaxgpt reproduce experiments/papers/mup_full.py

Tiny Shakespeare is downloaded once, OpenWebText comes through `datasets`,
GPT-2's encoder.json and vocab.bpe lie in the folder gpt2. Hardware: 576 runs, for GPUs; on a CPU it
is NOT-RUN. Not run yet; mup_transfer.py is the scaled-down version.
"""

from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import load_module
from nanojaxgpt.papers.paper import Arm, Paper

SCALED = load_module(str(Path(__file__).with_name("mup_transfer.py")))
WIDTHS, HEAD_DIM = (256, 512, 1024, 2048), 64
RATES = tuple(2.0**power for power in range(-14, -2))
NUM_PARAMS = {  # at the base width; 12 L D^2, norms without biases, positions, one table
    "shakespeare_standard": 1_852_928,
    "shakespeare_mup": 1_852_928,
    "openwebtext_standard": 14_714_112,
    "openwebtext_mup": 14_714_112,
}


def get_config(corpus: str, parametrization: str) -> ConfigDict:
    """Return the config of one corpus and parametrization at the base width."""
    cfg = SCALED.get_config(parametrization)
    model, optim, train = cfg.model, cfg.optim, cfg.train
    model.embed_dim, model.head_dim, model.seq_len = WIDTHS[0], HEAD_DIM, 1024
    model.num_heads = WIDTHS[0] // HEAD_DIM
    model.mup_base_dim = WIDTHS[0] if parametrization == "mup" else 0
    train.batch_size, train.num_steps = 8, 122
    cfg.eval.batch_size, cfg.eval.num_batches = 8, 8
    if corpus == "openwebtext":
        cfg.data.source, cfg.data.tokenizer = "hf:Skylion007/openwebtext", "gpt2:gpt2"
        model.vocab_size = 50_304
        optim.schedule = "cosine"
        train.batch_size, train.num_steps, train.loss_chunks = 32, 1000, 8
    return cfg


def get_paper() -> Paper:
    """Return both parametrizations on both corpora over widths, learning rates and seeds."""
    space = SCALED.widths_and_rates(WIDTHS, HEAD_DIM, RATES)
    arms, claims = [], []
    for corpus in ("shakespeare", "openwebtext"):
        names = [f"{corpus}_{parametrization}" for parametrization in ("standard", "mup")]
        for name in names:
            cfg = get_config(corpus, name.removeprefix(f"{corpus}_"))
            arms.append(Arm(name, cfg, (0, 1, 2), space))
        claims += SCALED.transfer_claims(*names)
    return Paper(
        "muP's transfer at widths 256 to 2048", tuple(claims), tuple(arms), needs="GPUs or a TPU"
    )
