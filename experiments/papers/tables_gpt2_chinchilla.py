"""The parameter and FLOP tables of GPT-2 and Chinchilla, exactly; nothing is trained.

Papers: Radford et al. 2019 (GPT-2), Table 2, as OpenAI corrected it; Hoffmann et al. 2022
(Chinchilla, arXiv:2203.15556), Tables A4 and A9; the FLOPs of nanoGPT's transformer_sizing.ipynb.

    nanojaxgpt reproduce experiments/papers/tables_gpt2_chinchilla.py

Hardware: one CPU core, about 10 s. Expected: the integers equal; A4 to its two decimals; every row
of A9 within 0.7 %. Parameters are counted in the model as it is built (shapes alone), and a closed
formula has to agree. Chinchilla's relative positions (Transformer-XL: a projection and two biases
a layer) are no part of this model: their weights are added by formula.

Two readings of Chinchilla are needed, and each has its control: A4's FLOPs leave out embedding and
logits, though Appendix F prints them (an author confirmed it, says nanoGPT's scaling_laws.ipynb);
and attention is as wide as its heads together, which for six models is not d_model.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nanojaxgpt.config import base_config, load_experiment
from nanojaxgpt.papers.paper import Claim, Paper

if TYPE_CHECKING:
    from nanojaxgpt.model.config import ModelConfig

GPT2 = Path(__file__).parents[1] / "gpt2.py"
GPT2_SOURCE = "Radford et al. 2019 in OpenAI's corrected sizes (openai/gpt-2, README and weights)"
SIZING = "nanoGPT, transformer_sizing.ipynb"
FORMULA = "the same formula as nanoGPT's transformer_sizing.ipynb, at the other sizes"
TABLE_A4 = "Hoffmann et al. 2022, Table A4, column FLOP Ratio (Ours/6ND)"
TABLE_A9 = "Hoffmann et al. 2022, Table A9"

NUM_PARAMS = {  # size: with biases, without
    "small": (124_439_808, 124_337_664),
    "medium": (354_823_168, 354_551_808),
    "large": (774_030_080, 773_521_920),
    "xl": (1_557_611_200, 1_556_764_800),
}

CHINCHILLA_VOCAB, CHINCHILLA_CONTEXT = 32_000, 2048

A4 = (  # ratio: width, mlp, head, heads, layers
    (1.03, (640, 2560, 64, 10, 10)),
    (1.10, (1024, 4096, 64, 16, 20)),
    (1.08, (1280, 5120, 128, 10, 24)),
    (1.04, (1792, 7168, 128, 14, 26)),
    (1.03, (2048, 8192, 128, 16, 28)),
    (0.99, (3584, 14336, 128, 28, 40)),
)

A9 = (  # millions of parameters: width, mlp, head, heads, layers
    (44, (512, 2048, 64, 8, 8)),
    (57, (576, 2304, 64, 9, 9)),
    (74, (640, 2560, 64, 10, 10)),
    (90, (640, 2560, 64, 10, 13)),
    (106, (640, 2560, 64, 10, 16)),
    (117, (768, 3072, 64, 12, 12)),
    (140, (768, 3072, 64, 12, 15)),
    (163, (768, 3072, 64, 12, 18)),
    (175, (896, 3584, 64, 14, 14)),
    (196, (896, 3584, 64, 14, 16)),
    (217, (896, 3584, 64, 14, 18)),
    (251, (1024, 4096, 64, 16, 16)),
    (278, (1024, 4096, 64, 16, 18)),
    (306, (1024, 4096, 64, 16, 20)),
    (425, (1280, 5120, 128, 10, 18)),
    (489, (1280, 5120, 128, 10, 21)),
    (509, (1408, 5632, 128, 11, 18)),
    (552, (1280, 5120, 128, 10, 24)),
    (587, (1408, 5632, 128, 11, 21)),
    (632, (1536, 6144, 128, 12, 19)),
    (664, (1408, 5632, 128, 11, 24)),
    (724, (1536, 6144, 128, 12, 22)),
    (816, (1536, 6144, 128, 12, 25)),
    (893, (1792, 7168, 128, 14, 20)),
    (1018, (1792, 7168, 128, 14, 23)),
    (1143, (1792, 7168, 128, 14, 26)),
    (1266, (2048, 8192, 128, 16, 22)),
    (1424, (2176, 8704, 128, 17, 22)),
    (1429, (2048, 8192, 128, 16, 25)),
    (1593, (2048, 8192, 128, 16, 28)),
    (1609, (2176, 8704, 128, 17, 25)),
    (1731, (2304, 9216, 128, 18, 24)),
    (1794, (2176, 8704, 128, 17, 28)),
    (2007, (2304, 9216, 128, 18, 28)),
    (2283, (2304, 9216, 128, 18, 32)),
    (2298, (2560, 10240, 128, 20, 26)),
    (2639, (2560, 10240, 128, 20, 30)),
    (2980, (2560, 10240, 128, 20, 34)),
    (3530, (2688, 10752, 128, 22, 36)),
    (3802, (2816, 11264, 128, 22, 36)),
    (4084, (2944, 11776, 128, 22, 36)),
    (4516, (3072, 12288, 128, 24, 36)),
    (6796, (3584, 14336, 128, 28, 40)),
    (9293, (4096, 16384, 128, 32, 42)),
    (11452, (4352, 17408, 128, 32, 47)),
    (12295, (4608, 18432, 128, 36, 44)),
    (12569, (4608, 18432, 128, 32, 47)),
    (13735, (4864, 19456, 128, 32, 47)),
    (14940, (4992, 19968, 128, 32, 49)),
    (16183, (5120, 20480, 128, 40, 47)),
)


def gpt2(size: str, bias: bool = True) -> "ModelConfig":
    """Return the model of experiments/gpt2.py at one size."""
    from nanojaxgpt.model.config import ModelConfig

    model = load_experiment(f"{GPT2}:{size}").model.to_dict()
    return ModelConfig(**(model | {"bias": bias, "norm_bias": bias}))


def chinchilla(width: int, mlp: int, head: int, heads: int, layers: int) -> "ModelConfig":
    """Return the model of a row, but for its relative positions."""
    from nanojaxgpt.model.config import ModelConfig

    shape = dict(embed_dim=width, mlp_dim=mlp, head_dim=head, num_heads=heads, num_layers=layers)
    shape |= dict(vocab_size=CHINCHILLA_VOCAB, seq_len=CHINCHILLA_CONTEXT, positions="none")
    return ModelConfig(**(base_config().model.to_dict() | shape))


@functools.cache  # most models stand in more than one claim
def count(cfg: "ModelConfig") -> int:
    """Return the parameters of the model as it is built."""
    from nanojaxgpt.model.parameters import count_params

    return count_params(cfg)


def formula(cfg: "ModelConfig") -> int:
    """Return the parameters by a closed formula, for a tied head and a plain MLP."""
    width, inner, bias, norm = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.bias, cfg.norm_bias
    attention = 4 * width * inner + bias * (3 * inner + width)
    mlp = 2 * width * cfg.mlp_dim + bias * (cfg.mlp_dim + width)
    norms = (2 * cfg.num_layers + 1) * width * (1 + norm)
    tables = cfg.vocab_size * width + (cfg.positions == "learned") * cfg.seq_len * width
    return cfg.num_layers * (attention + mlp) + norms + tables


def chinchilla_params(cfg: "ModelConfig") -> int:
    """Return the model's parameters and those of relative positions."""
    inner = cfg.num_heads * cfg.head_dim
    return count(cfg) + cfg.num_layers * (cfg.embed_dim * inner + 2 * inner)


def flop_ratio(cfg: "ModelConfig", ends: bool = False) -> float:
    """Return FLOPs by Appendix F over 6ND; `ends`: with embedding and logits, as it is printed."""
    from nanojaxgpt.flops import forward_flops

    length = cfg.seq_len
    logits = 2 * length * cfg.embed_dim * cfg.vocab_size
    softmax = 3 * cfg.num_heads * length**2  # subtract the largest, exponentiate, divide
    forward = forward_flops(cfg, length) - logits + cfg.num_layers * softmax
    forward += 2 * logits if ends else 0
    return 3 * forward / (6 * chinchilla_params(cfg) * length)


def palm_flops(cfg: "ModelConfig") -> int:
    """Return 6N + 12LHQT a token (PaLM, appendix B) for a sequence; N without positions."""
    params = count(cfg) - cfg.seq_len * cfg.embed_dim
    attention = 12 * cfg.num_layers * cfg.embed_dim * cfg.seq_len
    return (6 * params + attention) * cfg.seq_len


def disagreements() -> int:
    """Return for how many models the built one and the formula differ."""
    models = [gpt2(size, bias) for size in NUM_PARAMS for bias in (True, False)]
    models += [chinchilla(*shape) for _, shape in A9]
    return sum(count(cfg) != formula(cfg) for cfg in models)


def worst_row_at_full_width() -> float:
    """Return A9's largest relative error where attention is taken to be as wide as the model."""
    errors = []
    for millions, (width, mlp, head, _, layers) in A9:
        cfg = chinchilla(width, mlp, head, width // head, layers)
        errors.append(abs(chinchilla_params(cfg) / (millions * 1e6) - 1))
    return max(errors)


def equal(name: str, published: int, source: str, measure: Callable[[], float]) -> Claim:
    """Return the claim that an integer is equal."""
    return Claim(name, published, source, measure, accept=(published, published))


def get_paper() -> Paper:
    """Return every figure of the tables as a claim."""
    words = {True: "with biases", False: "no biases"}
    claims = []
    for size, published in NUM_PARAMS.items():
        for bias, params in zip((True, False), published, strict=True):
            source = GPT2_SOURCE if bias else SIZING if size == "small" else FORMULA
            measure = functools.partial(lambda *model: count(gpt2(*model)), size, bias)
            claims.append(equal(f"GPT-2 {size}, {words[bias]}", params, source, measure))
    claims.append(equal("built models whose formula differs", 0, FORMULA, disagreements))
    return Paper("Parameters and FLOPs of GPT-2 and Chinchilla", (*claims, *flops(), *sizes()))


def flops() -> list[Claim]:
    """Return the claims about FLOPs: those of GPT-2 small, and the ratios of Table A4."""

    def train() -> int:
        from nanojaxgpt.flops import train_flops

        return train_flops(gpt2("small"), 1024)

    def forward() -> int:
        from nanojaxgpt.flops import forward_flops

        return forward_flops(gpt2("small"), 1024)

    claims = [
        equal("GPT-2 small, forward FLOPs at 1,024 tokens", 291_648_307_200, SIZING, forward),
        equal("GPT-2 small, FLOPs of training on them", 874_944_921_600, SIZING, train),
        equal("the same by PaLM's formula", 875_062_886_400, SIZING,
              lambda: palm_flops(gpt2("small", bias=False))),
    ]  # fmt: skip
    for row, (ratio, shape) in enumerate(A4, 1):
        measure = functools.partial(lambda *shape: flop_ratio(chinchilla(*shape)), *shape)
        accept = (ratio - 0.005, ratio + 0.005)
        claims.append(Claim(f"A4, row {row}", ratio, TABLE_A4, measure, accept))
    ratio, shape = A4[0]
    claims.append(
        Claim("control: A4, row 1, by the formula as printed", ratio, TABLE_A4,
              lambda: flop_ratio(chinchilla(*shape), ends=True), accept=(1.5, math.inf))
    )  # fmt: skip
    return claims


def sizes() -> list[Claim]:
    """Return the claims about the sizes of Table A9, in millions."""
    claims = []
    for millions, shape in A9:
        width, _, _, heads, layers = shape
        measure = functools.partial(
            lambda *shape: chinchilla_params(chinchilla(*shape)) / 1e6, *shape
        )
        claims.append(
            Claim(f"A9, {layers} layers of {width}, {heads} heads", millions, TABLE_A9, measure,
                  accept=(0.993 * millions, 1.007 * millions))
        )  # fmt: skip
    claims.append(
        Claim("control: A9's largest error with attention as wide as d_model", "within rounding",
              TABLE_A9, worst_row_at_full_width, accept=(0.05, math.inf))
    )  # fmt: skip
    return claims
