"""The files that the recipes of experiments/finetune/ learn from, made of small data sets."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

DIALOGUE = "#Person1#: Hi!\n#Person1#: How are you?\n#Person2#: Fine.\n#Person1#: Good."


def run(folder: Path, recipe: str, *paths: Path) -> dict[str, list[dict]]:
    """Return the records of each file that the script writes."""
    command = [sys.executable, str(ROOT / "scripts" / "finetune_data.py"), recipe]
    said = subprocess.run(
        [*command, *map(str, paths), str(folder)], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for path in sorted(folder.iterdir()):
        found[path.stem] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert f"{path}: {len(found[path.stem]):,} records" in said
    return found


def test_topics_are_held_out_alike_for_a_head_and_for_words(tmp_path):
    rows = [(number % 4 + 1, f"Title {number}", "A\\text") for number in range(600)]
    with open(tmp_path / "table.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    found = run(tmp_path / "data", "ag_news", tmp_path / "table.csv")
    assert {name: len(records) for name, records in found.items()} == {
        "ag_news_train": 100, "ag_news_validation": 500,
        "ag_news_words_train": 100, "ag_news_words_test": 500,
    }  # fmt: skip
    number = {row[1]: row[0] - 1 for row in rows}
    for row, words in zip(found["ag_news_validation"], found["ag_news_words_test"], strict=True):
        assert words["query"] == f"{row['text']}\nTopic:"
        assert words["choices"][words["gold"]] == row["label"]
        assert number[row["text"].split(".")[0]] == words["gold"]
    held_out = {row["text"] for row in found["ag_news_validation"]}
    assert not held_out & {row["text"] for row in found["ag_news_train"]}


def test_dialogues_give_summaries_texts_and_turns(tmp_path):
    dev, test = tmp_path / "dev.jsonl", tmp_path / "test.jsonl"
    dev.write_text(json.dumps({"dialogue": DIALOGUE, "summary": "#Person1# greets."}) + "\n")
    three = {f"summary{n}": f"#Person{n}#" for n in (1, 2, 3)}
    crowd = {"dialogue": DIALOGUE.replace("#Person2#", "#Person3#"), **three}
    test.write_text("\n".join(json.dumps(row) for row in ({"dialogue": DIALOGUE, **three}, crowd)))
    found = run(tmp_path / "summaries", "dialogsum", dev, test)
    assert found["dialogsum_train"][0]["completion"] == "Person1 greets."
    assert found["dialogsum_test"][0]["references"] == ["Person1", "Person2", "Person3"]
    assert "Person1: Hi!" in found["dialogsum_test"][0]["prompt"]

    found = run(tmp_path / "turns", "turns", dev, test)
    (conversation,) = found["turns_train"]  # the one of three persons is left out
    assert conversation["messages"] == [
        {"role": "user", "content": "Hi! How are you?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "Good."},
    ]
    assert len(found["dialogues_train"]) == 1


def test_captions_keep_their_pairs(tmp_path):
    texts = {"en": "A dog.\nA cat.\n", "de": "Ein Hund.\nEine Katze.\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [tmp_path / name for name in ("en", "de", "en", "de")]
    found = run(tmp_path / "data", "multi30k", *paths)
    assert found["multi30k_train"][1] == {
        "prompt": "Translate into German: A cat.", "completion": "Eine Katze."
    }  # fmt: skip
    assert found["multi30k_test"][0]["references"] == ["Ein Hund."]
