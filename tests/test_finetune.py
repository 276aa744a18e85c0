"""From a file of examples to an evaluated run, by the commands: the parts together."""

import json

import pytest
from conftest import write_corpus

from nanojaxgpt.__main__ import main
from nanojaxgpt.metrics import read_metrics

FIELDS = {
    "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2, "model.seq_len": 64,
    "train.num_steps": 4, "train.batch_size": 8, "eval.every_steps": 0, "optim.warmup_steps": 0,
    "optim.learning_rate": 0.01,
}  # fmt: skip
COLORS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with a trained base model, labelled texts and preferences."""
    folder = tmp_path_factory.mktemp("finetune")
    text = write_corpus(folder, 2000)
    labels = [{"text": f"a {COLORS[i % 3]} {i}", "label": COLORS[i % 3]} for i in range(200)]
    pairs = [{"prompt": f"say {i}: ", "chosen": "yes", "rejected": f"no {i}"} for i in range(200)]
    for name, records in (("labels", labels), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    experiment = "from nanojaxgpt.config import base_config as get_config\n"
    (folder / "exp.py").write_text(experiment)
    assert train(folder, "base", {"data.source": f"text:{text}", "data.tokenizer": "bytes"}) == 0
    return folder


def train(folder, name: str, changes: dict) -> int:
    """Train a run; return the exit code."""
    fields = FIELDS | {"data.cache_dir": folder / "cache"} | changes
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    return main(["train", f"--config={folder}/exp.py", f"--run={folder}/{name}", *flags])


def start(folder, source: str) -> dict:
    """Return the fields of a run that starts from the base and learns from examples."""
    kind, _, file = source.partition(":")
    return {"init.from_run": folder / "base", "data.source": f"{kind}:{folder}/{file}.jsonl",
            "data.packing": "pack"}  # fmt: skip


def evaluated(folder, name: str, capsys) -> dict:
    """Return what `eval` prints of a run."""
    capsys.readouterr()
    assert main(["eval", str(folder / name)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_labels(rank, base, capsys):
    """The head has as many rows as the data have labels, and `eval` finds what training found."""
    name = f"labels-{rank}"
    changes = start(base, "labels:labels") | {"objective.kind": "classify", "lora.rank": rank}
    assert train(base, name, changes) == 0
    found = evaluated(base, name, capsys)
    last = read_metrics(base / name)[-1]
    assert found["loss"] == pytest.approx(last["validation_loss"])
    assert found["accuracy"] == last["validation_accuracy"]
    assert sum(map(sum, found["confusion"])) == found["tokens"]
    assert json.loads((base / name / "confusion.json").read_text()) == found["confusion"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_preferences(rank, base, capsys):
    """DPO starts at ln 2 and learns; `eval` compares with the reference that the run stored."""
    name = f"pairs-{rank}"
    changes = start(base, "preferences:pairs") | {
        "objective.kind": "preference", "lora.rank": rank, "train.log_every_steps": 1
    }  # fmt: skip
    assert train(base, name, changes) == 0
    records = read_metrics(base / name)
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert records[-1]["validation_loss"] < 0.69
    found = evaluated(base, name, capsys)
    assert found["loss"] == pytest.approx(records[-1]["validation_loss"])
    assert main(["eval", str(base / name), f"--data=preferences:{base}/pairs.jsonl"]) == 2
    assert "compares with a reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("labels:labels", {"objective.kind": "preference"}, "needs preferences:FILE"),
        ("labels:labels", {}, "can't learn from labels:"),
        ("preferences:pairs", {"objective.kind": "classify"}, "needs labels:FILE"),
        ("labels:labels", {"objective.kind": "classify", "model.num_labels": 2}, "have 3: blue"),
    ],
)
def test_an_objective_and_data_of_different_kinds(source, changes, said, base, capsys):
    assert train(base, "bad", start(base, source) | changes) == 2
    assert said in capsys.readouterr().err
