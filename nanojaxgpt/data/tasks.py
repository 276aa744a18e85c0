"""In: a task's options. Out: its vocabulary and its examples, each a pure function of its number.

A task is a table of examples of one length. The first `num_train` are trained on, the next
`num_validation` are what it is validated on, so the two never share one; a task without end has a
table of 2^40. Only the answer is scored. A row of the model's `seq_len` holds as many whole
examples as fit, each a segment of its own, as if it stood alone.

Dimensions: B examples, T tokens of an example.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanojaxgpt.data.rows import Batch, Rows, hash_words, permute
from nanojaxgpt.errors import ConfigError

ENDLESS = 2**40
LARGEST_MODULUS = 2**20


class Task(NamedTuple):
    """A table of examples; `make(number_B)` gives the ids [B, T] and which of them are answers.

    The numbers are uint64; an answer is scored as the target of the token before it.
    """

    words: tuple[str, ...]
    num_tokens: int
    num_train: int
    num_validation: int
    make: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def modular_addition(p: int = 97, train_fraction: float = 0.5, seed: int = 0) -> Task:
    """Return `a + b = c` modulo p, the whole table split at random.

    Power et al. 2022, "Grokking" (arXiv:2201.02177); its circuits: Nanda et al. 2023
    (arXiv:2301.05217, there with p=113 and train_fraction=0.3).
    """
    check_that(p > 1, f"p={p} must be at least 2")

    def terms(cell_B: np.ndarray) -> tuple[np.ndarray, ...]:
        a_B, b_B = np.divmod(cell_B, p)
        return a_B, b_B, (a_B + b_B) % p

    return modular_table("+", p, p * p, terms, train_fraction, seed)


def modular_division(p: int = 97, train_fraction: float = 0.5, seed: int = 0) -> Task:
    """Return `a / b = c` modulo a prime p, b from 1 on: c * b = a. Power et al. 2022."""
    # Before its divisors are tried.
    check_that(p < LARGEST_MODULUS, f"p={p} must be less than {LARGEST_MODULUS:,}")
    check_that(p > 1 and all(p % n for n in range(2, int(p**0.5) + 1)), f"p={p} must be a prime")

    def terms(cell_B: np.ndarray) -> tuple[np.ndarray, ...]:
        c_B, b_B = np.divmod(cell_B, p - 1)
        return c_B * (b_B + 1) % p, b_B + 1, c_B

    return modular_table("/", p, p * (p - 1), terms, train_fraction, seed)


def modular_table(
    sign: str,
    p: int,
    size: int,
    terms: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    train_fraction: float,
    seed: int,
) -> Task:
    """Return the task of `a sign b = c`, where `terms` gives (a, b, c) of each cell."""
    check_that(p < LARGEST_MODULUS, f"p={p} must be less than {LARGEST_MODULUS:,}")
    num_train = split_table(size, train_fraction)

    def make(number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cell_B = permute(number_B, size, np.full(len(number_B), seed, np.uint64)).astype(np.int64)
        a_B, b_B, c_B = terms(cell_B)
        sign_B, equals_B = np.full_like(a_B, p), np.full_like(a_B, p + 1)
        ids_BT = np.stack([a_B, sign_B, b_B, equals_B, c_B], axis=1)
        return ids_BT, answers(ids_BT, 4)

    return Task((*numerals(p), sign, "="), 5, num_train, size - num_train, make)


def addition(
    digits: int = 3,
    reversed: int = 0,
    train_fraction: float = 0.9,
    validation_examples: int = 2000,
    balanced: int = 0,
    seed: int = 0,
) -> Task:
    """Return `a + b = c` digit by digit, padded with zeros; reversed=1: the answer's lowest first.

    Trained on is a fraction of all pairs, or with balanced=N (of three digits) N pairs that hold
    short ones and every number of carries: see `balanced_pairs`.
    Lee et al. 2023, "Teaching Arithmetic to Small Transformers" (arXiv:2307.03381).
    """
    check_that(1 <= digits <= 9, f"digits={digits} must be from 1 to 9")
    check_that(reversed in (0, 1), f"reversed={reversed} must be 0 or 1")
    limit = 10**digits
    num_train = balanced or split_table(limit**2, train_fraction)
    check_that(not balanced or digits == 3, f"balanced={balanced} needs digits=3")
    pairs = balanced_pairs(balanced, seed) if balanced else None

    def make(number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key_B = np.full(len(number_B), seed, np.uint64)
        cell_B = permute(number_B, limit**2, key_B) if pairs is None else pairs[number_B]
        cell_B = cell_B.astype(np.int64)
        a_B, b_B = np.divmod(cell_B, limit)
        power = 10 ** np.arange(digits, -1, -1)
        a_BT, b_BT, c_BT = (n_B[:, None] // power % 10 for n_B in (a_B, b_B, a_B + b_B))
        sign_BT = np.full((len(cell_B), 1), 10)
        parts = (a_BT[:, 1:], sign_BT, b_BT[:, 1:], sign_BT + 1, c_BT[:, :: -1 if reversed else 1])
        ids_BT = np.concatenate(parts, axis=1)
        return ids_BT, answers(ids_BT, 2 * digits + 2)

    num_validation = min(validation_examples, limit**2 - num_train)
    return Task((*numerals(10), "+", "="), 3 * digits + 3, num_train, num_validation, make)


def balanced_pairs(count: int, seed: int) -> np.ndarray:
    """Return all pairs of numbers below 1,000, each as a * 1000 + b, uint64 [1,000,000].

    In random order, but that the first `count` are the 100 pairs of one digit, 9 % of two digits
    (the larger number's), and of three digits as many for each number of carries (Lee 2023, with
    10,000 of them). Raises ConfigError where there are not enough of a kind.
    """
    size = 10**6
    pair_P = permute(np.arange(size, dtype=np.uint64), size, np.full(size, seed, np.uint64))
    a_P, b_P = np.divmod(pair_P, np.uint64(1000))
    carries_P = sum((a_P % n + b_P % n >= n).astype(int) for n in np.array([10, 100, 1000], "u8"))
    largest_P = np.maximum(a_P, b_P)
    kind_P = np.where(largest_P < 10, 0, np.where(largest_P < 100, 1, 2 + carries_P))
    two = round(0.09 * count)
    long = count - 100 - two
    wanted = [100, two, *(long // 4 + (carries < long % 4) for carries in range(4))]
    chosen_P = np.zeros(size, bool)
    for kind, number in enumerate(wanted):
        places = np.flatnonzero(kind_P == kind)
        check_that(0 <= number <= len(places), f"balanced={count} must be from 110 to 250000")
        chosen_P[places[:number]] = True
    return np.concatenate([pair_P[chosen_P], pair_P[~chosen_P]])


def copy(length: int = 16, vocab: int = 32, validation_examples: int = 1000) -> Task:
    """Return `length` random words, a bar, and the same words again, which are the answer.

    The simplest of the copying tasks since Graves et al. 2014 (arXiv:1410.5401).
    """
    check_that(length > 0 and vocab > 0, "length and vocab must be at least 1")

    def make(number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        word_BT = random_words(number_B, length, 0) % np.uint64(vocab)
        bar_BT = np.full((len(number_B), 1), vocab, np.uint64)
        ids_BT = np.concatenate([word_BT, bar_BT, word_BT], axis=1)
        return ids_BT, answers(ids_BT, length + 1)

    return Task((*numerals(vocab), "|"), 2 * length + 1, ENDLESS, validation_examples, make)


def induction(
    length: int = 64,
    vocab: int = 64,
    shortest: int = 0,
    train_all: int = 0,
    validation_examples: int = 1000,
) -> Task:
    """Return distinct random words repeated until the example is full.

    Answers are the words of the repetition but its first, which nothing foretells; train_all=1
    trains on every word, and validates on the answers alone. The period differs, from `shortest`
    (0: a quarter of `length`) to a half of it, so that looking back a fixed way solves nothing.
    Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv:2209.11895).
    """
    check_that(length >= 8, f"length={length} must be at least 8")
    shortest, longest = shortest or length // 4, length // 2
    check_that(
        0 < shortest <= longest, f"shortest={shortest} must be from 1 to length / 2 = {longest}"
    )
    check_that(vocab >= longest, f"vocab={vocab} must be at least length / 2 = {longest}")
    check_that(train_all in (0, 1), f"train_all={train_all} must be 0 or 1")

    def make(number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        draw_B = hash_words(number_B, 1) % np.uint64(longest - shortest + 1)
        period_B1 = (shortest + draw_B.astype(np.int64))[:, None]
        order_BV = np.argsort(random_words(number_B, vocab, 2), axis=1)
        place_T = np.arange(length)
        trained_B1 = (number_B < ENDLESS)[:, None]  # the validation examples come after
        answer_BT = (place_T > period_B1) | (trained_B1 & bool(train_all))
        return np.take_along_axis(order_BV, place_T % period_B1, axis=1), answer_BT

    return Task(numerals(vocab), length, ENDLESS, validation_examples, make)


def mqar(
    pairs: int = 8,
    length: int = 64,
    vocab: int = 64,
    power: float = 0.01,
    validation_examples: int = 1000,
) -> Task:
    """Return key-value pairs, then each key once more, its value being the answer.

    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927): keys and
    values are halves of the vocabulary, and a query comes g places of two after the pairs with a
    probability that goes as g^(power - 1). Other than there a value follows its query in the
    text, and what stands between is one word, a dot.
    """
    spaces, keys = (length - 2 * pairs) // 2, vocab // 2
    check_that(length % 2 == 0, f"length={length} must be even")
    check_that(
        0 < pairs <= spaces, f"{pairs} pairs and their queries need length={4 * pairs} or more"
    )
    check_that(pairs <= keys, f"vocab={vocab} has {keys} keys for {pairs} pairs")
    log_chance_S = (power - 1) * np.log(np.arange(1, spaces + 1))

    def make(number_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key_BP = np.argsort(random_words(number_B, keys, 1), axis=1)[:, :pairs]
        value_BP = keys + random_words(number_B, pairs, 2).astype(np.int64) % (vocab - keys)
        # The largest of log chance + Gumbel noise: a draw without replacement (Efraimidis 2006).
        uniform_BS = (random_words(number_B, spaces, 3) >> np.uint64(11)) * 2.0**-53 + 2.0**-54
        noisy_BS = log_chance_S - np.log(-np.log(uniform_BS))
        space_BP = pairs + np.argsort(-noisy_BS, axis=1)[:, :pairs]
        ids_BS2 = np.full((len(number_B), length // 2, 2), vocab)
        ids_BS2[:, :pairs] = np.stack([key_BP, value_BP], axis=2)
        row_B1 = np.arange(len(number_B))[:, None]
        ids_BS2[row_B1, space_BP] = ids_BS2[:, :pairs]
        answer_BS2 = np.zeros(ids_BS2.shape, bool)
        answer_BS2[row_B1, space_BP, 1] = True
        return ids_BS2.reshape(-1, length), answer_BS2.reshape(-1, length)

    words = (*(f"k{n}" for n in range(keys)), *(f"v{n}" for n in range(vocab - keys)), ".")
    return Task(words, length, ENDLESS, validation_examples, make)


TASKS: dict[str, Callable[..., Task]] = {
    "modular_addition": modular_addition,
    "modular_division": modular_division,
    "addition": addition,
    "copy": copy,
    "induction": induction,
    "mqar": mqar,
}


def task_rows(task: Task, seq_len: int) -> tuple[Rows, Rows]:
    """Return the rows of `seq_len` to train on and those to validate on.

    Raises ConfigError where an example does not fit into a row. Every example is in one row of an
    epoch; which ones share a row differs from epoch to epoch.
    """
    num_places = task.num_tokens - 1
    per_row = seq_len // num_places
    if not per_row:
        raise ConfigError(
            f"an example of this task takes {num_places} positions, but model.seq_len={seq_len}; "
            f"set model.seq_len={num_places} or a multiple of it"
        )

    def table(first: int, count: int, shuffled: bool) -> Rows:
        def read(index_B: np.ndarray, key_B: np.ndarray) -> Batch:
            first_B1 = index_B[:, None] * np.uint64(per_row)
            number = (first_B1 + np.arange(per_row, dtype=np.uint64)).ravel()
            real, number = number < count, np.minimum(number, np.uint64(count - 1))
            if shuffled:
                number = permute(number, count, np.repeat(key_B, per_row))
            ids, answer = task.make(number + np.uint64(first))
            return rows_of_examples(ids, answer & real[:, None], per_row, seq_len)

        return Rows(-(-count // per_row), read)

    return table(0, task.num_train, True), table(task.num_train, task.num_validation, False)


def rows_of_examples(ids: np.ndarray, answer: np.ndarray, per_row: int, seq_len: int) -> Batch:
    """Return examples [B * per_row, T] and their answers as rows of `seq_len` places."""
    num_places = ids.shape[1] - 1
    shape = (-1, per_row * num_places)
    padding = ((0, 0), (0, seq_len - per_row * num_places))

    def rows(values: np.ndarray, dtype: type) -> np.ndarray:
        return np.pad(values.astype(dtype).reshape(shape), padding)

    tokens_BT, targets_BT = rows(ids[:, :-1], np.int32), rows(ids[:, 1:], np.int32)
    weights_BT = rows(answer[:, 1:], np.float32)
    if num_places == seq_len:
        return Batch(tokens_BT, targets_BT, weights_BT)
    place, example = np.arange(num_places), np.arange(len(ids)) % per_row + 1
    segments_BT = rows(np.repeat(example, num_places), np.int32)
    positions_BT = rows(np.tile(place, len(ids)), np.int32)
    return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT)


def split_table(size: int, train_fraction: float) -> int:
    """Return how many cells of a table are trained on. Raises ConfigError for none."""
    num_train = round(size * train_fraction)
    check_that(0 < num_train <= size, f"train_fraction={train_fraction} leaves nothing to train on")
    return num_train


def random_words(number_B: np.ndarray, count: int, salt: int) -> np.ndarray:
    """Return uint64 [B, count], random but the same for the same number and salt."""
    return hash_words(number_B[:, None], salt, np.arange(count, dtype=np.uint64))


def answers(ids_BT: np.ndarray, first: int) -> np.ndarray:
    """Return bool [B, T]: all from the token `first` on are answers."""
    return np.broadcast_to(np.arange(ids_BT.shape[1]) >= first, ids_BT.shape)


def numerals(count: int) -> tuple[str, ...]:
    """Return the words "0", "1", ... up to count - 1."""
    return tuple(map(str, range(count)))


def check_that(holds: bool, what: str) -> None:
    """Raise ConfigError for an option that can't be met."""
    if not holds:
        raise ConfigError(f"data.source=task: {what}")
