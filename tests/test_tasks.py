"""Generated tasks: the answers are right and alone scored, training and validation never meet."""

import numpy as np
import pytest

from nanojaxgpt.data.loader import open_task, task_data
from nanojaxgpt.data.rows import WeightedRows, make_eval_batches, make_train_rows
from nanojaxgpt.data.tasks import ENDLESS, TASKS, task_rows
from nanojaxgpt.data.tokenizers import WordTokenizer, load_tokenizer
from nanojaxgpt.errors import ConfigError, DataError

SPECS = [f"task:{name}" for name in TASKS]


def examples(spec: str, numbers=range(50)):
    """Return the task, and of each example its words and which of them are answers."""
    _, task = open_task(spec)
    ids_BT, answer_BT = task.make(np.array(numbers, np.uint64))
    assert ids_BT.shape == answer_BT.shape == (len(numbers), task.num_tokens)
    assert answer_BT.any(1).all()
    assert not answer_BT[:, 0].any()
    words = [[task.words[i] for i in row] for row in ids_BT.tolist()]
    return task, list(zip(words, answer_BT.tolist(), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_an_example_is_a_function_of_its_number(spec):
    _, whole = examples(spec)
    _, some = examples(spec, [31, 7])
    assert some == [whole[31], whole[7]]
    assert len({tuple(words) for words, _ in whole}) == 50


@pytest.mark.parametrize("name", ["modular_addition", "modular_division"])
def test_modular_tables_are_split_complete_and_right(name):
    size = 11 * 11 if name == "modular_addition" else 11 * 10
    task, table = examples(f"task:{name},p=11,train_fraction=0.3", range(size))
    assert (task.num_train, task.num_validation) == (round(0.3 * size), size - round(0.3 * size))
    assert len({(words[0], words[2]) for words, _ in table}) == size  # each cell in one half
    for (a, sign, b, equals, c), answer in table:
        a, b, c = int(a), int(b), int(c)
        assert (sign, equals) == ("+" if name == "modular_addition" else "/", "=")
        assert c == (a + b) % 11 if sign == "+" else (b > 0 and c * b % 11 == a)
        assert answer == [False] * 4 + [True]
    _, other = examples(f"task:{name},p=11,train_fraction=0.3,seed=1", range(size))
    assert other != table


@pytest.mark.parametrize("backwards", [0, 1])
def test_addition_adds(backwards):
    task, found = examples(f"task:addition,digits=2,reversed={backwards}", range(10_000))
    assert (task.num_train, task.num_validation) == (9_000, 1_000)
    seen = set()
    for words, answer in found:
        left, right = "".join(words).split("=")
        a, b = left.split("+")
        assert int(a) + int(b) == int(right[::-1] if backwards else right)
        assert (len(a), len(b), len(right)) == (2, 2, 3)
        assert answer == [False] * 6 + [True] * 3
        seen.add((a, b))
    assert len(seen) == 10_000


def test_balanced_addition_holds_short_sums_and_every_number_of_carries():
    task, trained = examples("task:addition,balanced=1000", range(1000))
    assert (task.num_train, task.num_validation) == (1000, 2000)

    def pair(words):
        return int("".join(words[:3])), int("".join(words[4:7]))

    def carries(a, b):
        return sum(a % n + b % n >= n for n in (10, 100, 1000))

    pairs = [pair(words) for words, _ in trained]
    longest = [max(pair) for pair in pairs]
    assert sum(n < 10 for n in longest) == 100
    assert sum(10 <= n < 100 for n in longest) == 90
    long = [carries(*pair) for pair in pairs if max(pair) >= 100]
    assert sorted(long.count(n) for n in range(4)) == [202, 202, 203, 203]
    _, unseen = examples("task:addition,balanced=1000", range(1000, 3000))
    rest = {pair(words) for words, _ in unseen}
    assert len(set(pairs)) == 1000
    assert len(rest) == 2000
    assert not rest & set(pairs)
    assert np.mean([min(pair) for pair in rest]) == pytest.approx(333, rel=0.1)  # uniform
    _, other = examples("task:addition,balanced=1000,seed=1", range(1000))
    assert other != trained


def test_copy_copies():
    for words, answer in examples("task:copy,length=5,vocab=9")[1]:
        assert words == [*words[:5], "|", *words[:5]]
        assert answer == [False] * 6 + [True] * 5


def test_induction_follows_from_what_came_before():
    periods = set()
    for words, answer in examples("task:induction,length=40,vocab=30")[1]:
        period = words.index(words[0], 1)
        periods.add(period)
        assert 10 <= period <= 20
        assert len(set(words[:period])) == period
        assert answer == [place > period for place in range(40)]
        for place in np.flatnonzero(answer):
            earlier = words[: place - 1].index(words[place - 1])
            assert words[earlier + 1] == words[place]
    assert len(periods) > 5


def test_induction_can_be_trained_on_every_word_and_validated_on_answers():
    spec = "task:induction,length=40,vocab=30,shortest=5"
    plain, every = open_task(spec)[1], open_task(spec + ",train_all=1")[1]
    for first in (0, ENDLESS):
        number_B = np.uint64(first) + np.arange(200, dtype=np.uint64)
        ids_BT, answer_BT = plain.make(number_B)
        same_BT, scored_BT = every.make(number_B)
        np.testing.assert_array_equal(ids_BT, same_BT)
        assert scored_BT.all() if first == 0 else (scored_BT == answer_BT).all()
        assert answer_BT.sum(1).max() == 40 - 6  # a period of 5, and the word that ends it
        assert answer_BT.sum(1).min() == 40 - 21


def test_mqar_asks_for_every_pair():
    places = []
    for words, answer in examples("task:mqar,pairs=4,length=40,vocab=20,power=0.1", range(300))[1]:
        pairs = dict(zip(words[:8:2], words[1:8:2], strict=True))
        assert len(pairs) == 4
        asked = [(words[place - 1], words[place]) for place in np.flatnonzero(answer)]
        assert sorted(asked) == sorted(pairs.items())
        assert {word for word, scored in zip(words[8:], answer[8:], strict=True)} == {
            *pairs, *pairs.values(), "."
        }  # fmt: skip
        places += np.flatnonzero(answer).tolist()
    assert min(places) == 9
    assert max(places) == 39
    assert np.mean(np.array(places) < 20) > 0.5  # near ones are likelier: uniform would be 0.375


@pytest.mark.parametrize("spec", SPECS)
def test_training_and_validation_never_share_an_example(spec):
    _, task = open_task(spec)
    train, validation = task_rows(task, task.num_tokens - 1)
    read = make_train_rows((WeightedRows("a", 1, train),), 200, seed=0)
    seen = np.concatenate([read(step, 0, 200).tokens_BT for step in range(20)])
    _, read_eval = make_eval_batches(validation, validation.count)
    held_out = read_eval(0, 0, validation.count).tokens_BT
    assert len(held_out) == task.num_validation
    assert not {row.tobytes() for row in seen} & {row.tobytes() for row in held_out}


@pytest.mark.parametrize(("seq_len", "per_row"), [(4, 1), (5, 1), (8, 2), (19, 4)])
def test_rows_hold_whole_examples_apart(seq_len, per_row):
    _, task = open_task("task:modular_addition,p=7")
    train, _ = task_rows(task, seq_len)
    read = make_train_rows((WeightedRows("a", 1, train),), 1, seed=2)
    assert train.count == -(-task.num_train // per_row)
    seen = []
    for step in range(train.count):
        batch = read(step, 0, 1)
        assert batch.tokens_BT.shape == (1, seq_len)
        if batch.segments_BT is None:
            assert seq_len == task.num_tokens - 1
        else:
            used = per_row * 4
            expected = np.repeat(np.arange(per_row) + 1, 4)
            np.testing.assert_array_equal(batch.segments_BT[0, :used], expected)
            np.testing.assert_array_equal(batch.positions_BT[0, :used], np.arange(used) % 4)
            assert not batch.segments_BT[0, used:].any()
        for place in np.flatnonzero(batch.weights_BT[0]):
            assert place % 4 == 3
            a, sign, b, equals = batch.tokens_BT[0, place - 3 : place + 1].tolist()
            assert (sign, equals, batch.targets_BT[0, place]) == (7, 8, (a + b) % 7)
            seen.append((a, b))
    assert len(seen) == len(set(seen)) == task.num_train  # an epoch meets every example once


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("task:modular_adition", "no task modular_adition; did you mean modular_addition"),
        ("task:copy,lenght=3", "no option lenght; did you mean length"),
        ("task:copy,length=x", "length='x' is not an integer"),
        ("task:modular_division,p=91", "p=91 must be a prime"),
        ("task:modular_addition,train_fraction=0", "nothing to train on"),
        ("task:addition,digits=12", "from 1 to 9"),
        ("task:addition,reversed=2", "0 or 1"),
        ("task:addition,balanced=50", "from 110 to 250000"),
        ("task:addition,balanced=900000", "from 110 to 250000"),
        ("task:addition,balanced=500,digits=2", "needs digits=3"),
        ("task:mqar,pairs=8,length=16", "need length=32"),
        ("task:mqar,length=33", "must be even"),
        ("task:mqar,vocab=8", "4 keys for 8 pairs"),
        ("task:induction,vocab=9", "length / 2 = 32"),
        ("task:induction,shortest=33", "from 1 to length / 2 = 32"),
        ("task:induction,train_all=2", "must be 0 or 1"),
        ("task:copy,length=0", "at least 1"),
    ],
)
def test_what_can_not_be_is_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        open_task(spec)


def test_an_example_longer_than_a_row_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"takes 32 positions, but model.seq_len=31.*seq_len=32"):
        task_rows(open_task("task:copy")[1], 31)


def test_words_come_back_and_are_saved(tmp_path):
    tokenizer = WordTokenizer(open_task("task:addition")[1].words)
    ids = tokenizer.encode("1 2 + 3 =")
    assert tokenizer.decode(ids) == "1 2 + 3 ="
    assert tokenizer.token_bytes()[ids].sum() == len("1 2 + 3 = ")
    with pytest.raises(DataError, match="'x' is not a word of this task"):
        tokenizer.encode("1 x")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.words, loaded.content_hash()) == (tokenizer.words, tokenizer.content_hash())
    other = WordTokenizer(open_task("task:copy")[1].words)
    assert other.content_hash() != tokenizer.content_hash()


def test_the_identity_of_a_task_names_its_options():
    one, other = (f"task:modular_addition,p=7,seed={seed}" for seed in (0, 1))
    assert task_data(one).identity == task_data(one).identity != task_data(other).identity
