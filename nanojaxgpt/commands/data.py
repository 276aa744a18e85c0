"""In: the arguments of `prepare` and `inspect`. Out: a tokenized corpus, or a step's batch."""

from itertools import chain
from pathlib import Path

from nanojaxgpt import config
from nanojaxgpt.arguments import Command, integer, open_experiment
from nanojaxgpt.console import warn
from nanojaxgpt.data.loader import check_data


def prepare(arguments: list[str]) -> None:
    """Tokenize the corpus of an experiment or a RUN ahead of training; print a summary.

    A preparation that was stopped is resumed; one that is complete is opened and checked.
    """
    parsed, cfg = open_experiment("prepare", prepare.__doc__, arguments, {})
    check_data(cfg.data)
    from nanojaxgpt.data import store
    from nanojaxgpt.data.examples import find_template
    from nanojaxgpt.data.loader import inherited_tokenizer, own_template

    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        warn(line)

    run = Path(parsed.run) if parsed.run else None
    inherited = inherited_tokenizer(cfg, warn, run)
    template = find_template(cfg.data, own_template(cfg, run))
    corpus = store.prepare(cfg.data, config.cache_dir(cfg), report, inherited, template)
    print_table(store.describe_corpus(corpus))
    if not said:
        warn("everything was prepared already")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns: the first and the last to the left, the numbers to the right."""
    *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, last]))


def inspect(arguments: list[str]) -> None:
    """Print the batch of one step as the model sees it: text, segments, scored targets."""
    options = {
        "step": {"default": 1, "type": integer(1), "help": "step, as in the log; default: 1"},
        "rows": {"default": 4, "type": integer(0), "help": "rows to print in full; default: 4"},
        "split": {"default": "train", "choices": ("train", "validation"), "help": "default: train"},
    }
    parsed, cfg = open_experiment("inspect", inspect.__doc__, arguments, options)
    check_data(cfg.data)
    from nanojaxgpt.data.loader import prepare_data
    from nanojaxgpt.data.rows import make_ramp
    from nanojaxgpt.data.show import show_examples, show_step

    data = prepare_data(cfg, warn, Path(parsed.run) if parsed.run else None)
    train = cfg.train
    ramp = make_ramp(train.batch_size, train.ramp_batch_size, train.ramp_steps)
    if parsed.split == "validation":
        ramp = make_ramp(cfg.eval.batch_size or train.batch_size)
    lines = show_step(
        data, parsed.split, parsed.step, cfg.model.seq_len, ramp, train.seed, parsed.rows
    )
    for line in chain(show_examples(data, cfg.model.seq_len, cfg.data.overlong), lines):
        print(line)


COMMANDS = {
    "prepare": Command(
        prepare,
        "--config=EXPERIMENT.py[:VARIANT]",
        "tokenize the corpus ahead of training",
        order=6,
        writes_files=True,
    ),
    "inspect": Command(
        inspect,
        "--config=EXPERIMENT.py [--step=N] [--rows=4]",
        "print the batch of a step",
        order=7,
    ),
}
