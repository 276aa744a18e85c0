"""FLOPs by hand and by nanoGPT's count; records, the progress line and the plot."""

import io
import json

import pytest
from conftest import small_model

from nanojaxgpt.metrics import (
    MetricsWriter,
    Progress,
    duration,
    forward_flops,
    peak_flops,
    plot_losses,
    read_metrics,
    train_flops,
    validation_losses,
)

GPT2 = dict(num_layers=12, embed_dim=768, num_heads=12, seq_len=1024, vocab_size=50257)


def test_gpt2_has_the_flops_that_nanogpt_counts():
    cfg = small_model(**GPT2)  # nanoGPT's transformer_sizing.ipynb
    assert forward_flops(cfg, 1024) == 291_648_307_200
    assert train_flops(cfg, 1024) == 874_944_921_600


@pytest.mark.parametrize(
    ("changes", "matrices"),
    [({}, 2), ({"mlp": "swiglu"}, 3), ({"mlp": "none"}, 0), ({"num_kv_heads": 1}, 2)],
)
def test_flops_by_hand(changes, matrices):
    sizes = dict(num_layers=3, embed_dim=8, num_heads=4, head_dim=5, mlp_dim=11, vocab_size=13)
    cfg = small_model(**(sizes | {"seq_len": 7} | changes))
    key_heads = changes.get("num_kv_heads", 4)
    layer = 8 * 4 * 5 * 2 + 8 * key_heads * 5 * 2 + 7 * 4 * 5 * 2 + matrices * 8 * 11
    assert forward_flops(cfg, 7) == 2 * 7 * (3 * layer + 8 * 13)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("cpu", 0),
        ("", 0),
    ],
)
def test_peak_of_a_device(kind, peak):
    assert peak_flops(kind) == peak


def test_a_torn_line_is_left_out(tmp_path):
    assert read_metrics(tmp_path) == []
    whole = [{"step": 1, "loss": 2.5}, {"step": 1, "validation_loss": 2.25}]
    text = "".join(json.dumps(record) + "\n" for record in whole)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == whole
    assert validation_losses(tmp_path) == {1: 2.25}


def test_writer_drops_what_a_resumed_run_does_again(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, loss=1.0 * step)
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "l')
    writer = MetricsWriter(tmp_path, 3)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    writer.write(4, loss=40.0)
    assert read_metrics(tmp_path)[-1] == {"step": 4, "loss": 40.0}  # readable at once
    writer.close()
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1, 2, 3, 40]
    assert list((tmp_path / "tensorboard").iterdir())
    assert not list(tmp_path.glob("*partial*"))


class Terminal(io.StringIO):
    """Text that says it goes to a terminal."""

    def isatty(self):
        return True


VALUES = {"loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1234.5}


def show(out) -> str:
    progress = Progress(1000, 0, out)
    progress.step(1, VALUES | {"mfu": 0.25})
    progress.began = 1e-9
    progress.step(2, VALUES)
    progress.step(3, VALUES)
    progress.say("step 3: saved")
    progress.step(4, VALUES)
    return out.getvalue()


def test_elsewhere_than_on_a_terminal_each_record_is_a_line():
    text = show(io.StringIO())
    lines = text.splitlines()
    assert "\r" not in text
    assert "\x1b" not in text
    assert len(lines) == 5
    assert lines[0] == "step    1/1000  loss 2.5000  lr 1.00e-03  1,234 tokens/s  MFU 25.0%"
    assert lines[1].endswith(" left")
    assert "MFU" not in lines[1]
    assert lines[3] == "step 3: saved"


def test_on_a_terminal_one_line_rewrites_itself():
    text = show(Terminal())
    assert text.count("\n") == 1  # what is said stays
    before, after = text.split("step 3: saved\n")
    frames = before.split("\r")[1:]
    assert [frame.split("/")[0] for frame in frames[:3]] == [f"step    {n}" for n in (1, 2, 3)]
    widths = [len(frame) for frame in frames[:3]]
    assert widths == sorted(widths)  # nothing of a longer line is left over
    assert frames[3].strip() == ""
    assert len(frames[3]) >= len(frames[2].rstrip())
    assert after.startswith("\rstep    4/1000")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (2 * 3600 + 7 * 60 + 50, "2 h 07 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": float("nan")}], [
    {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "validation_loss": 1.75},
]])  # fmt: skip
def test_plot_is_a_png(records, tmp_path):
    plot_losses(iter(records), tmp_path / "loss.png", "run")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
