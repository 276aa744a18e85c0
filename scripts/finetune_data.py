"""Write the files that the recipes of experiments/finetune/ learn from, into a folder.

    python scripts/finetune_data.py ag_news TEST.csv runs/data
    python scripts/finetune_data.py dialogsum DEV.jsonl TEST.jsonl runs/data
    python scripts/finetune_data.py multi30k TRAIN.en TRAIN.de TEST.en TEST.de runs/data
    python scripts/finetune_data.py turns DEV.jsonl TEST.jsonl runs/data
    python scripts/finetune_data.py preferences runs/addition runs/data

The first four read a data set as its authors publish it, which you fetch: AG News' table of class,
title and description (Zhang 2015), DialogSum (Chen 2021), Multi30k (Elliott 2016). `turns` makes
conversations of the dialogues. `preferences` samples sums from a run, and pairs a right one
with a wrong one. The files *_test.jsonl hold examples that no recipe trains on.
"""

import argparse
import csv
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
HELD_OUT = 500  # texts of AG News, and sums
SUMS, PROMPTS, DRAWS = "task:addition,digits=2", 4000, 8  # sums, and the answers drawn to each
TOPICS = ("World", "Sports", "Business", "Technology")  # AG News' classes 1 to 4
SPEAKER = re.compile(r"#Person(\d)#: *")

Record = dict[str, Any]
Files = Iterator[tuple[str, list[Record]]]  # (name, records)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text, without their ends."""
    return path.read_text(encoding="utf-8").splitlines()


def ag_news(table: Path) -> Files:
    """Yield texts with their topics as labels, as text to continue, and as questions."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    random.Random(SEED).shuffle(rows)
    found = [(f"{title}. {text}".replace("\\", " "), int(label) - 1) for label, title, text in rows]
    test, train = found[:HELD_OUT], found[HELD_OUT:]
    for part, some in (("train", train), ("validation", test)):
        yield f"ag_news_{part}", [{"text": text, "label": TOPICS[n]} for text, n in some]
    questions = [(f"{text}\nTopic:", n) for text, n in found]
    yield (
        "ag_news_words_train",
        [{"prompt": text, "completion": f" {TOPICS[n]}"} for text, n in questions[HELD_OUT:]],
    )
    yield (
        "ag_news_words_test",
        [{"query": text, "choices": list(TOPICS), "gold": n} for text, n in questions[:HELD_OUT]],
    )


def without_names(dialogue: str) -> str:
    """Return a text in which the speakers are Person1 and Person2, without marks."""
    return dialogue.replace("#", "")


def dialogsum(dev: Path, test: Path) -> Files:
    """Yield dialogues to summarize; each of the test set has three summaries."""
    ask = "Summarize the dialogue in one or two sentences.\n\n{}"
    rows = [json.loads(line) for line in read_lines(dev)]
    yield "dialogsum_train", [
        {"prompt": ask.format(without_names(row["dialogue"])),
         "completion": without_names(row["summary"])}
        for row in rows
    ]  # fmt: skip
    rows = [json.loads(line) for line in read_lines(test)]
    yield "dialogsum_test", [
        {"prompt": ask.format(without_names(row["dialogue"])),
         "references": [without_names(row[f"summary{n}"]) for n in (1, 2, 3)]}
        for row in rows
    ]  # fmt: skip


def multi30k(english: Path, german: Path, test_english: Path, test_german: Path) -> Files:
    """Yield captions to translate from English to German."""
    ask = "Translate into German: {}"
    for part, sources, targets, field in (
        ("train", english, german, "completion"), ("test", test_english, test_german, "references"),
    ):  # fmt: skip
        yield (
            f"multi30k_{part}",
            [
                {"prompt": ask.format(source), field: target if part == "train" else [target]}
                for source, target in zip(read_lines(sources), read_lines(targets), strict=True)
            ],
        )


def turns(dialogue: str) -> list[Record]:
    """Return the messages of a dialogue: who speaks first is the user, who answers the assistant.

    What a person says in several lines is one message.
    """
    parts = SPEAKER.split(dialogue)[1:]
    said = [
        (who, " ".join(text.split())) for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    first = said[0][0]
    grouped = itertools.groupby(said, key=lambda pair: pair[0])
    return [
        {"role": "user" if who == first else "assistant", "content": " ".join(t for _, t in texts)}
        for who, texts in grouped
    ]


def conversations(dev: Path, test: Path) -> Files:
    """Yield DialogSum's dialogues of two persons as texts for a base model, and as messages."""
    for part, path in (("train", test), ("validation", dev)):
        dialogues = [json.loads(line)["dialogue"] for line in read_lines(path)]
        dialogues = [text for text in dict.fromkeys(dialogues) if "#Person3#" not in text]
        yield f"dialogues_{part}", [{"text": without_names(text)} for text in dialogues]
        found = [turns(text) for text in dialogues]
        yield f"turns_{part}", [{"messages": said} for said in found if len(said) > 1]


def preferences(run: Path) -> Files:
    """Yield pairs of a right and a wrong answer that the run drew, and sums it has not seen."""
    import nanojaxgpt
    from nanojaxgpt import config
    from nanojaxgpt.data.loader import prepare_data
    from nanojaxgpt.data.rows import Rows
    from nanojaxgpt.rollout import Prompt, read_prompts

    model = nanojaxgpt.load(run)
    cfg = config.with_fields(model.experiment, {"data.source": SUMS})
    data, length = prepare_data(cfg, print), model.config.seq_len

    def read(rows: Rows, count: int) -> list[Prompt]:
        numbers = np.arange(min(count, rows.count), dtype=np.uint64)
        return read_prompts(rows.read(numbers, np.zeros_like(numbers)), model.tokenizer)

    found: list[Record] = []
    prompts = read(data.train(length)[0].rows, PROMPTS)
    for start in range(0, len(prompts), 100):
        some = prompts[start : start + 100]
        ids = [prompt.ids for prompt in some for _ in range(DRAWS)]
        drawn = [text.strip() for text in model.generate(ids, max_tokens=3, seed=start)]
        for number, prompt in enumerate(some):
            texts = drawn[number * DRAWS : (number + 1) * DRAWS]
            wrong = [text for text in texts if text != prompt.answer]
            if 0 < len(wrong) < DRAWS:
                pair = {"chosen": prompt.answer, "rejected": wrong[0]}
                found.append({"prompt": prompt.text, **pair})
    yield "addition_preferences", found
    yield (
        "addition_test",
        [
            {"prompt": prompt.text, "references": [prompt.answer]}
            for prompt in read(data.validation(length), HELD_OUT)
        ],
    )


def write(files: Iterable[tuple[str, list[Record]]], folder: Path) -> None:
    """Write each file as JSON lines, and say how many records it has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files:
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(records):,} records")


MAKERS = {
    "ag_news": ag_news, "dialogsum": dialogsum, "multi30k": multi30k, "turns": conversations,
    "preferences": preferences,
}  # fmt: skip


def main() -> None:
    """Write the files of one recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=list(MAKERS))
    parser.add_argument("paths", nargs="+", type=Path, help="what it reads, then the folder")
    parsed = parser.parse_args()
    *paths, folder = parsed.paths
    write(MAKERS[parsed.recipe](*paths), folder)


if __name__ == "__main__":
    main()
