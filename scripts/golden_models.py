"""Write tests/golden: for each family a tiny random model of transformers, and its logits.

    python scripts/golden_models.py

Needs the extra `interop`. tests/test_golden_models.py reads the files without torch.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_families import CASES, GPT2, rope, their_model, torch  # noqa: E402

SMALL = dict(hidden_size=16, intermediate_size=20, num_attention_heads=2)
GROUPED = SMALL | dict(num_key_value_heads=1, head_dim=8)
LONGROPE = rope("longrope", short_factor=[1.0, 1.2, 2.0], long_factor=[1.0, 2.5, 9.0],
                partial_rotary_factor=0.75, original_max_position_embeddings=32)  # fmt: skip
NAMES = {
    "gpt2": dict(n_embd=16, n_inner=20, n_head=2), "llama3": GROUPED, "mistral": GROUPED,
    "qwen2": GROUPED, "qwen3": GROUPED, "gemma2": GROUPED, "gemma3": GROUPED, "smollm3": GROUPED,
    "olmo2": GROUPED, "olmo3": GROUPED, "phi3_long": GROUPED | dict(rope_parameters=LONGROPE),
    "gpt_neox": SMALL, "granite": GROUPED,
}  # fmt: skip
LENGTH = 40
PROMPT = np.arange(LENGTH) * 7 % GPT2["vocab_size"]


def main() -> None:
    """Write a folder for each family."""
    for name, sizes in NAMES.items():
        model = their_model(CASES[name], **sizes)
        folder = ROOT / "tests" / "golden" / CASES[name].kind
        model.save_pretrained(folder)
        with torch.no_grad():
            logits_BTV = model(torch.tensor(PROMPT[None], dtype=torch.long)).logits.numpy()
        np.save(folder / "logits.npy", logits_BTV[0, -4:])
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
