"""Write tests/golden: for each family a tiny random model of transformers, and its logits.

    python scripts/golden_models.py

Of one of them also questions with the answers of `lm_eval --model hf`, in float64. Needs the extra
`interop`. tests/test_golden_models.py and tests/test_evals.py read the files without torch.
"""

import json
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
QUESTIONS, FAMILY, LETTERS = 20, "llama", "abcdefghijklmnopqrstuvwxyz"


def write_questions() -> None:
    """Write questions about letters, with lm-eval's (log-probability, greedy) of each choice."""
    import tokenizers
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from nanojaxgpt.data.tokenizer_json import export_characters

    folder = ROOT / "tests" / "golden"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / FAMILY, dtype=torch.float64)
    letters = tokenizers.Tokenizer.from_str(export_characters(LETTERS).decode())
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="a")
    oracle = HFLM(pretrained=model, tokenizer=wrapped, device="cpu", softmax_dtype="float64")
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(QUESTIONS):
        query = "".join(draw.choice(list(LETTERS), draw.integers(3, 30)))
        sizes = draw.integers(1, 7, draw.integers(2, 5))
        choices = ["".join(draw.choice(list(LETTERS), size)) for size in sizes]
        ids = torch.tensor([[LETTERS.index(letter) for letter in query]])
        likeliest = int(model(ids).logits[0, -1].argmax())  # of more rows than there are letters
        choices += LETTERS[likeliest : likeliest + 1]
        asked = [Instance("loglikelihood", {}, (query, one), 0) for one in choices]
        answers = oracle.loglikelihood(asked, disable_tqdm=True)
        lines.append({"query": query, "choices": choices, "gold": int(draw.integers(len(sizes))),
                      "answers": answers})  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)


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
    write_questions()


if __name__ == "__main__":
    main()
