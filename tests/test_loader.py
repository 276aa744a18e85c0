"""From a config to batches: any split of the hosts, any start, and no validation in training."""

import functools
import threading
from fractions import Fraction
from itertools import pairwise

import jax
import numpy as np
import pytest
from conftest import assert_batches_equal

from nanojaxgpt import sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import cache_dir, sections
from nanojaxgpt.data import loader
from nanojaxgpt.data.loader import fetch_ahead, open_data, whole_weights
from nanojaxgpt.data.rows import make_eval_batches, make_train_rows, take_rows
from nanojaxgpt.data.tokenizers import load_tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.hosts import process
from nanojaxgpt.training import fit

SEQ_LEN, BATCH_SIZE = 16, 8


@pytest.fixture
def folders(tmp_path):
    """Return two folders of documents whose every word is their own."""
    for name, count in (("one", 41), ("two", 30)):
        (tmp_path / name).mkdir()
        for number in range(count):
            words = [f"{name}{number:02}.{place}" for place in range(3 + number % 7)]
            (tmp_path / name / f"{number:02}.txt").write_text(" ".join(words))
    return tmp_path


@pytest.fixture
def open_kind(folders, small_config):
    """Return a function that opens each kind of data, with dotted changes."""
    one, two = folders / "one", folders / "two"
    kinds = {
        "wrap": {"data.source": f"text:{one}"},
        "pack": {"data.source": f"text:{one}", "data.packing": "pack"},
        "mixture": {"data.mixture": f"('3 text:{one}', '1 text:{two}')", "data.packing": "pack"},
        "task": {"data.source": "task:modular_addition,p=11"},
    }

    def build(kind, **changes):
        cfg = small_config(**({"data.tokenizer": "bytes"} | kinds[kind] | changes))
        return open_data(sections.Data(**cfg.data), cache_dir(cfg), report=lambda _: None)

    return build


def train_rows(data, seed=0):
    return make_train_rows(data.train(SEQ_LEN), BATCH_SIZE, seed)


KINDS = ("wrap", "pack", "mixture", "task")


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_hosts_reads_the_same_batch_at_any_step(kind, open_kind):
    read, again = train_rows(open_kind(kind)), train_rows(open_kind(kind))
    num_rows = open_kind(kind).train(SEQ_LEN)[0].rows.count
    over_the_end = num_rows // BATCH_SIZE
    assert num_rows % BATCH_SIZE
    for step in (over_the_end, 0, 3, 1000):
        whole = again(step, 0, BATCH_SIZE)
        for count in (1, 2, 4):
            cuts = pairwise(range(0, BATCH_SIZE + 1, BATCH_SIZE // count))
            pieces = [read(step, first, last) for first, last in cuts]
            assert_batches_equal(take_rows(pieces, np.arange(BATCH_SIZE)), whole)
    assert not np.array_equal(read(0, 0, 8).tokens_BT, read(1, 0, 8).tokens_BT)
    other = train_rows(open_kind(kind), seed=1)
    assert not np.array_equal(read(0, 0, 8).tokens_BT, other(0, 0, 8).tokens_BT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_global_batch_is_the_same_on_eight_devices(kind, open_kind):
    read, asked = train_rows(open_kind(kind)), []

    def rows(step, first, last):
        asked.append((first, last))
        return read(step, first, last)

    meshes = sharding.make_mesh({}, jax.devices()[:1]), sharding.make_mesh(dict(data=4, fsdp=2))
    for step in (0, 5, 77):
        batches = [
            sharding.global_batch(functools.partial(rows, step), BATCH_SIZE, SEQ_LEN, mesh)
            for mesh in meshes
        ]
        assert_batches_equal(*(jax.tree.map(np.asarray, batch) for batch in batches))
        assert len(batches[1].tokens_BT.addressable_shards) == 8
    assert sorted(set(asked)) == [(0, 1), (0, 8), *((n, n + 1) for n in range(1, 8))]


def texts(data, table) -> set[str]:
    """Return every word that is read or scored in a table of rows."""
    _, read = make_eval_batches(table, table.count)
    batch = read(0, 0, table.count)
    rows = np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], 1)
    return {data.tokenizer.decode(row[row != data.tokenizer.end_id]) for row in rows}


VALIDATION = {
    "fraction": {"data.validation_fraction": "0.2"},
    "documents": {"data.validation_documents": "3"},
}


@pytest.mark.parametrize("how", VALIDATION)
@pytest.mark.parametrize("kind", ["pack", "mixture"])
def test_validation_shares_no_document_with_training(how, kind, open_kind):
    data = open_kind(kind, **VALIDATION[how])
    sources = data.train(200)
    trained = " ".join(text for source in sources for text in texts(data, source.rows))
    held_out = " ".join(texts(data, data.validation(200)))
    names = {name: {w[:5] for w in text.replace("two", " two").replace("one", " one").split()}
             for name, text in (("train", trained), ("validation", held_out))}  # fmt: skip
    assert not names["train"] & names["validation"]
    assert len(names["train"] | names["validation"]) == (71 if kind == "mixture" else 41)
    if how == "documents":
        assert len(names["validation"]) == 3 * len(sources)


def test_a_validation_source_leaves_all_of_the_corpus_to_training(folders, open_kind):
    changes = {"data.validation_source": f"text:{folders / 'two'}", "data.packing": "pack"}
    data = open_kind("pack", **changes)
    trained = " ".join(texts(data, data.train(200)[0].rows))
    assert "one40." in trained
    assert "two" not in trained
    held_out = " ".join(texts(data, data.validation(200)))
    assert "one" not in held_out
    assert "two00." in held_out
    assert "two29." in held_out


@pytest.mark.parametrize("packing", ["wrap", "pack"])
def test_a_mixture_is_validated_on_every_part_once(packing, folders, open_kind):
    parts = [
        open_kind(packing, **{"data.source": f"text:{folders / name}"}).validation(SEQ_LEN)
        for name in ("one", "two")
    ]
    table = open_kind("mixture", **{"data.packing": packing}).validation(SEQ_LEN)
    assert table.count == sum(part.count for part in parts)
    _, read = make_eval_batches(table, table.count)
    alone = [make_eval_batches(part, part.count)[1](0, 0, part.count) for part in parts]
    assert_batches_equal(read(0, 0, table.count), take_rows(alone, np.arange(table.count)))


@pytest.mark.parametrize(
    ("texts_", "whole"),
    [(["3", "1"], [3, 1]), (["0.75", "0.25"], [3, 1]), (["1/3", "0.5", "1/6"], [2, 3, 1]),
     (["0.333333", "0.666667"], [333333, 666667]), (["50", "100"], [1, 2])],
)  # fmt: skip
def test_weights_become_the_smallest_integers(texts_, whole):
    assert whole_weights([Fraction(text) for text in texts_]) == whole


def test_weights_of_too_many_digits_are_refused():
    with pytest.raises(ConfigError, match="fewer digits"):
        whole_weights([Fraction("0.12345678901"), Fraction("1")])


@pytest.mark.parametrize("kind", ["wrap", "pack", "task"])
def test_a_corpus_smaller_than_a_batch_is_refused(kind, open_kind):
    with pytest.raises(DataError, match=r"fills .* sequences, but a batch needs 4,000"):
        make_train_rows(open_kind(kind).train(SEQ_LEN), 4_000, 0)


def test_a_task_stands_alone(folders, open_kind):
    with pytest.raises(ConfigError, match=r"task:copy must be data.source"):
        open_kind("wrap", **{"data.mixture": "('1 task:copy',)"})
    with pytest.raises(ConfigError, match=r"task:copy must be data.source"):
        open_kind("wrap", **{"data.validation_source": "task:copy"})


def test_fetching_ahead_keeps_order_and_overlaps():
    assert list(fetch_ahead(lambda step: step * 10, 5, 9, 2)) == [50, 60, 70, 80]
    assert list(fetch_ahead(int, 5, 5, 2)) == []
    third = threading.Event()

    def fetch(step):
        if step == 2:
            third.set()
        return threading.get_ident()

    batches = fetch_ahead(fetch, 0, 10, 2)
    assert next(batches) != threading.get_ident()
    assert third.wait(10)  # made while nobody has asked for it


def test_fetching_ahead_raises_what_went_wrong_in_its_place():
    def fetch(step):
        if step == 2:
            raise DataError("the store was altered")
        return step

    batches = fetch_ahead(fetch, 0, 10, 4)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="the store was altered"):
        next(batches)


def test_fetching_ahead_stays_within_its_depth_and_ends_when_it_is_closed():
    asked, thread = [], []

    def fetch(step):
        asked.append(step)
        thread[:] = [threading.current_thread()]
        return step

    batches = fetch_ahead(fetch, 0, 100, 3)
    assert not asked  # no thread before the first is wanted
    for step in range(5):
        assert next(batches) == step
        assert max(asked) <= step + 3
    batches.close()
    assert not thread[0].is_alive()  # the process may end now: no thread is in jaxlib
    assert max(asked) <= 4 + 3 + 1
    assert list(fetch_ahead(fetch, 0, 9, 3)) == list(range(9))
    assert not thread[0].is_alive()


def test_an_iterator_that_is_dropped_waits_for_a_fetch_but_not_for_one_that_hangs(monkeypatch):
    monkeypatch.setattr(loader, "FETCH_SECONDS", 0.1)
    began, hung, thread = threading.Event(), threading.Event(), []

    def fetch(step):
        thread[:] = [threading.current_thread()]
        if step < 2:
            return step
        began.set()
        return hung.wait(60)

    batches = fetch_ahead(fetch, 0, 9, 2)
    assert [next(batches), next(batches)] == [0, 1]
    assert began.wait(10)
    del batches
    assert thread[0].daemon
    assert thread[0].is_alive()
    hung.set()
    thread[0].join(10)
    assert not thread[0].is_alive()


@pytest.mark.slow
def test_a_task_trains_and_eval_says_that_nothing_is_held_out(
    small_config, tmp_path, monkeypatch, capsys
):
    one_device = functools.partial(sharding.make_mesh, {}, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one_device())
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    spec, run = "task:modular_addition,p=7,train_fraction=1", tmp_path / "run"
    changes = {"data.source": spec, "model.seq_len": "8", "train.num_steps": "2"}
    cfg = small_config(**(changes | {"model.num_layers": "1"}))
    state = fit(cfg, run, report=lambda _: None)
    assert int(state.step) == 2
    assert load_tokenizer(run / "tokenizer").vocab_size == 9
    assert "nan" not in capsys.readouterr().out
    assert main(["eval", str(run)]) == DataError.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "set data.validation_fraction" in shown.err
