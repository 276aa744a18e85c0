"""FLOPs of a forward pass and of a training step, and a device's peak, for MFU."""

from nanojaxgpt.chips import CHIPS
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import parameters

# Dense bfloat16 peak of one device in FLOP/s, by how device_kind begins. A device of TPU v2 and
# v3 is a core, half of a chip: 123 TFLOP/s a chip of v3, says Google Cloud's page; v2's figure is
# as remembered, and not compared with a source.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": CHIPS["a100"].flops,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H200": CHIPS["h200"].flops,
}


def forward_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the matmul FLOPs of one forward pass over one sequence of `seq_len` tokens.

    Two per multiply-add; attention counted as full T x T, as nanoGPT and PaLM do, so that MFU
    compares; norms, activations and the embedding's look-up left out.
    """
    rows = parameters(cfg).values()
    kernels = sum(row.size for row in rows if row.kind in ("kernel", "adapter"))
    weights = kernels + cfg.embed_dim * cfg.vocab_size
    return 2 * seq_len * weights + attention_flops(cfg, seq_len)


def attention_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the part of `forward_flops` that multiplies queries, keys and values."""
    return 2 * seq_len * cfg.num_layers * 2 * seq_len * cfg.num_heads * cfg.head_dim


def train_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of training on one sequence: the backward pass is twice the forward.

    With adapters it computes no gradient of the other weights, and half of it falls away for them.
    """
    frozen = 0
    if cfg.lora.rank:
        frozen = forward_flops(cfg.bare, seq_len) - attention_flops(cfg, seq_len)
    return 3 * forward_flops(cfg, seq_len) - frozen


def peak_flops(device_kind: str) -> float:
    """Return the peak of one device in FLOP/s; 0 where it is not known, as for CPUs."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else 0.0
