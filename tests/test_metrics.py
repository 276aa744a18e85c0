"""FLOPs by hand and by nanoGPT's count; the record of a run and its plot."""

import json
import os
import shutil

import pytest
from conftest import small_model

from nanojaxgpt.config import base_config
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.flops import forward_flops, peak_flops, train_flops
from nanojaxgpt.metrics import MetricsWriter, plot_losses, read_metrics, validation_losses

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


DAMAGED = [
    b'{"step": 2, "loss": 2.\x80}', b"7", b"null", b'{"loss": 1.0}', b'{"step": "3", "loss": 1.0}',
    b'{"step": true, "loss": 1.0}', b'{"step": -1, "loss": 1.0}', b'{"step": 3, "loss": "x"}',
    b'{"step": 3.5}', b"[" * 50_000, b'{"step": ' + b"9" * 5000 + b"}", b"", b"\0\0\0",
]  # fmt: skip


def test_damaged_lines_are_left_out_and_reported_once(tmp_path):
    whole = [{"step": 1, "loss": 2.5}, {"step": 3, "validation_loss": 2.25}]
    first, last = (json.dumps(record).encode() for record in whole)
    path, said = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"\n".join([first, *DAMAGED, last]) + b'\n{"step": 4, "lo')
    assert read_metrics(tmp_path, said.append) == whole
    number, lines = len(DAMAGED), len(DAMAGED) + 2
    assert said == [f"WARNING: {number} of {lines} lines of {path} are damaged and were skipped"]
    assert validation_losses(tmp_path) == {3: 2.25}
    open_writer(tmp_path, 9, said.append).close()
    assert len(said) == 2
    open_writer(tmp_path, 9, said.append).close()
    assert len(said) == 2  # the second start finds a whole file
    assert read_metrics(tmp_path) == whole


def test_a_pipe_in_place_of_the_records_is_skipped(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    os.mkfifo(path)
    assert read_metrics(tmp_path, said.append) == []
    assert said == [f"WARNING: {path} is damaged and was skipped: it is not a regular file"]
    writer = open_writer(tmp_path, 0, said.append)
    writer.write(1, loss=2.5)
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]


def open_writer(run, start, report=print) -> MetricsWriter:
    return MetricsWriter(run, start, base_config(), report)


def test_writer_drops_what_a_resumed_run_does_again(tmp_path):
    writer = open_writer(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, loss=1.0 * step)
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "l')
    writer = open_writer(tmp_path, 3)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    writer.write(4, loss=40.0)
    assert read_metrics(tmp_path)[-1] == {"step": 4, "loss": 40.0}  # readable at once
    writer.close()
    assert [r["loss"] for r in read_metrics(tmp_path)] == [1, 2, 3, 40]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_directory_that_was_deleted_is_noticed_at_the_next_record(replaced, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    writer = open_writer(run, 0)
    writer.write(1, loss=1.0)
    run.rename(tmp_path / "moved")
    if replaced:
        run.mkdir()
    with pytest.raises(CheckpointError, match=f"{run} was deleted or moved during training"):
        writer.write(2, loss=1.0)
    shutil.rmtree(run, ignore_errors=True)
    (tmp_path / "moved").rename(run)
    writer.write(2, loss=1.0)
    writer.close()
    assert [r["step"] for r in read_metrics(run)] == [1, 2]


@pytest.mark.parametrize("harm", ["deleted", "replaced"])
def test_records_that_are_deleted_during_training_are_written_again(harm, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    said: list[str] = []
    writer = open_writer(tmp_path, 1, said.append)
    writer.write(2, loss=2.0)
    (tmp_path / "metrics.jsonl").unlink()
    if harm == "replaced":
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    for step in (3, 4):
        writer.write(step, loss=1.0 * step)
        assert [r["loss"] for r in read_metrics(tmp_path)] == [*range(1, step + 1)]
    assert len(said) == 1
    assert f"{tmp_path}/metrics.jsonl was deleted or replaced" in said[0]
    (tmp_path / "metrics.jsonl").unlink()
    writer.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": float("nan")}], [
    {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "validation_loss": 1.75},
]])  # fmt: skip
def test_plot_is_a_png(records, tmp_path):
    plot_losses(iter(records), tmp_path / "loss.png", "run")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")
