"""In: the config's section `data`. Out: tables of rows to train and to validate on, and batches.

Text and generated tasks stand behind the same few functions.
"""

import inspect
import math
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

from nanojaxgpt.checks import kind_of, read_float, read_int, show
from nanojaxgpt.config import AnyConfig, build, cache_dir, fields, sections, typed
from nanojaxgpt.data.examples import find_template
from nanojaxgpt.data.packing import (
    Fit,
    cover_rows,
    packed_rows,
    plan_examples,
    planned_rows,
    wrap_rows,
)
from nanojaxgpt.data.rows import Rows, WeightedRows, join_tables
from nanojaxgpt.data.sources import check_sources, source_identity
from nanojaxgpt.data.sources.records import is_examples
from nanojaxgpt.data.store import (
    Corpus,
    Part,
    Report,
    Span,
    Store,
    check_exact,
    check_inherited,
    prepare,
    prepare_store,
)
from nanojaxgpt.data.tasks import TASKS, Task, task_rows
from nanojaxgpt.data.tokenizers import Tokenizer, WordTokenizer, load_tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.opening import find_model, inherited_template
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.names import unknown_name
from nanojaxgpt.rundir import read_config, read_identity

Fetched = TypeVar("Fetched")
MakeRows = Callable[[Store, Span, int], Rows]
FETCH_SECONDS = 5.0  # that the end of a loop waits for the batch being fetched
ALONE = ("labels", "preferences")  # kinds of examples that have objectives of their own
LARGEST_SUM = 2**31  # of a mixture's weights as integers, see rows.interleave


class RunData(NamedTuple):
    """What a run learns from: `train` and `validation` give tables of rows of a length."""

    tokenizer: Tokenizer
    identity: dict[str, Any]
    size: str  # for a person
    train: Callable[[int], tuple[WeightedRows, ...]]
    validation: Callable[[int], Rows]  # of no row where nothing is held out
    labels: tuple[str, ...] = ()  # of texts to classify, by their numbers
    template: str = ""  # the chat template of the examples, where they have one
    examples: tuple[tuple[str, Store], ...] = ()  # the sources of examples, and their stores

    @property
    def kind(self) -> str:
        """The kind of examples that have an objective of their own, one of ALONE, or ""."""
        kinds = {store.examples["kind"] for _, store in self.examples} & set(ALONE)
        return next(iter(kinds), "")


def prepare_data(
    cfg: AnyConfig, report: Callable[[str], object], run: Path | None = None
) -> RunData:
    """Return the data of a config, tokenized now where it is not there yet.

    `run` is the run directory that it is for, where there is one. Raises as `open_data`,
    `inherited_tokenizer` and `check_objective` do.
    """
    cfg = typed(cfg)
    inherited = inherited_tokenizer(cfg, report, run)
    data = open_data(cfg.data, cache_dir(cfg), report, inherited, own_template(cfg, run))
    check_objective(cfg.objective.kind, data)
    return data


def own_template(cfg: sections.Config, run: Path | None = None) -> str:
    """Return the chat template that data.chat_template "" means; "" where none is needed."""
    needed = has_examples(cfg.data) and not cfg.data.chat_template
    return inherited_template(cfg.init, run) if needed else ""


def check_objective(kind: str, data: RunData) -> None:
    """Raise ConfigError where an objective can't learn from such data."""
    wanted = {"classify": "labels", "preference": "preferences", "reward": "preferences"}
    if (needed := wanted.get(kind, "")) != data.kind:
        problem = f"needs {needed}:FILE" if needed else f"can't learn from {data.kind}:"
        raise ConfigError(f"objective.kind={kind} {problem}; change it, or data.source")


def inherited_tokenizer(
    cfg: sections.Config, report: Callable[[str], object], run: Path | None = None
) -> Tokenizer | None:
    """Return the tokenizer of the parameters that a config starts from; None from scratch.

    A run that was begun keeps a copy, so that it does not need the other model any more. Raises
    ConfigError where init.from_run is not a run, as `find_model` and `load_run_tokenizer` do.
    """
    if not (cfg.init.from_run or cfg.init.from_model):
        return None
    if run and (Path(run) / "identity.json").exists():  # it is written after the tokenizer
        return load_run_tokenizer(Path(run), report)
    source = find_model(cfg.init.from_model) if cfg.init.from_model else Path(cfg.init.from_run)
    return load_run_tokenizer(source, report) if isinstance(source, Path) else source.tokenizer


def load_run_tokenizer(run: Path, report: Callable[[str], object]) -> Tokenizer:
    """Return the tokenizer that a run was trained with.

    `report` is told where the run's identity.json can't confirm it. Raises ConfigError where `run`
    is not a run directory, DataError where its tokenizer is missing, damaged or another one.
    """
    cfg, folder = read_config(run), run / "tokenizer"
    tokenizer = load_tokenizer(folder)
    restore = "restore the tokenizer that the run was trained with"
    if identity := read_identity(run, "the tokenizer", report):
        data, found = identity["data"], tokenizer.content_hash()
        known, *_ = data.get("parts") or [data]  # all parts share one; a task has no parts
        if isinstance(known, dict) and known.get("tokenizer", found) != found:
            raise DataError(
                f"{folder} is not the tokenizer that {run} was trained with: its hash is {found}, "
                f"but identity.json has {known['tokenizer']}; {restore}"
            )
    if 0 < cfg.model.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{folder} has {tokenizer.vocab_size:,} tokens, but the model of {run} has "
            f"model.vocab_size={cfg.model.vocab_size}; {restore}"
        )
    return tokenizer


def open_data(
    data: sections.Data,
    folder: Path,
    report: Callable[[str], object] = print,
    inherited: Tokenizer | None = None,
    inherited_chat: str = "",
) -> RunData:
    """Return the data that the config names, made below `folder` where it is not there yet.

    `inherited` is the tokenizer of the parameters to start from: data.tokenizer "" means this one,
    and any other is refused; data.chat_template "" means `inherited_chat`. Raises ConfigError for
    that, and for a name, an option or a weight that can't be used, DataError as `prepare` does.
    """
    check_data(data)
    if is_task(data):
        task = task_data(data.source)
        advice = "choose a run trained on a task with the same words"
        check_inherited(task.tokenizer, inherited, data.source, advice)
        return task
    template = find_template(data, inherited_chat) if has_examples(data) else ""
    corpus = prepare(data, folder, report, inherited, template)
    return text_data(corpus, data, report, template)


def has_examples(data: sections.Data) -> bool:
    """Return whether any source holds examples for fine-tuning."""
    return any(is_examples(source) for source in all_sources(data))


def all_sources(data: sections.Data) -> list[str]:
    """Return the sources to train on, and the one to validate on where it is set."""
    sources = [entry.partition(" ")[2].strip() for entry in data.mixture] or [data.source]
    return [*sources, *([data.validation_source] if data.validation_source else [])]


def is_task(data: sections.Data) -> bool:
    """Return whether the data are generated, not read."""
    return not data.mixture and data.source.startswith("task:")


def check_data(data: sections.Data) -> None:
    """Raise ConfigError or DataError where a source can't be used; nothing is read.

    Cheap, so that a typo fails before jax is imported.
    """
    if is_task(data):
        open_task(data.source)
        return
    for name in all_sources(data):
        if name.startswith("task:"):
            raise ConfigError(f"{name} must be data.source, on its own: a task has its own split")
    check_sources(data)
    if has_examples(data):
        check_examples(data)


def check_examples(data: sections.Data) -> None:
    """Raise ConfigError where examples for fine-tuning can't be used together, or in these rows."""
    sources = all_sources(data)
    if data.packing != "pack":
        found = next(source for source in sources if is_examples(source))
        raise ConfigError(
            f"{found} needs data.packing=pack, which keeps examples whole and apart; "
            f"data.packing={data.packing} cuts them"
        )
    alone = {kind for source in sources if (kind := source.partition(":")[0]) in ALONE}
    if alone and len({source.partition(":")[0] for source in sources}) > 1:
        raise ConfigError(
            f"{', '.join(sources)}: {min(alone)}: is trained on by itself, and validated on itself"
        )
    find_template(data, "")


def resolve(cfg: AnyConfig, data: RunData) -> JobConfig:
    """Return the config with the tokenizer, its vocabulary and the model. Raises ConfigError.

    data.tokenizer stays "" where that of another model is inherited, unless that is bytes.
    """
    tokenizer, size = cfg.data.tokenizer, data.tokenizer.vocab_size
    if not (cfg.init.from_run or cfg.init.from_model) or data.tokenizer.kind in ("bytes", "words"):
        tokenizer = tokenizer or "bytes"
    if 0 < cfg.model.vocab_size < size:
        raise ConfigError(f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {size}")
    found = {"data.tokenizer": tokenizer, "model.vocab_size": cfg.model.vocab_size or size}
    labels = {"reward": 1, "classify": len(data.labels)}.get(cfg.objective.kind, 0)
    if labels and cfg.model.num_labels not in (0, labels):
        raise ConfigError(
            f"model.num_labels={cfg.model.num_labels}, but the data have {labels}: "
            f"{', '.join(data.labels)}; leave it at 0"
        )
    found["model.num_labels"] = cfg.model.num_labels or labels
    if cfg.model.compute_dtype == "auto":
        from nanojaxgpt.sharding import compute_dtype, platform

        found["model.compute_dtype"] = compute_dtype("auto", platform())
    return build({**dict(fields(cfg)), **found}, JobConfig)


def open_source(
    source: str,
    tokenizer: Tokenizer,
    data: sections.Data,
    folder: Path,
    report: Report = print,
    inherited_chat: str = "",
    labels: tuple[str, ...] = (),
) -> RunData:
    """Return the data of one source by a tokenizer that is there: all of it is for validation.

    Of a generated task it is the examples that are held out. Examples are written by
    `inherited_chat` unless data.chat_template says otherwise, `labels` are those of a run. Raises
    what `open_data` raises, and DataError where the tokenizer can't write the source.
    """
    if source.startswith("task:"):
        found = task_data(source)
        if found.tokenizer.content_hash() != tokenizer.content_hash():
            raise DataError(f"{source} does not have the words of the run's tokenizer")
        return found
    content, lossy = source_identity(source, data), check_exact(tokenizer, data, folder)
    template = find_template(data, inherited_chat) if is_examples(source) else ""
    given = tokenizer, lossy, data, folder, report, template, labels
    try:
        store = prepare_store(source, content, *given)
    except OSError as error:
        raise DataError(f"can't create the token store in {folder}: {error}") from error
    corpus = Corpus((Part(source, Fraction(1), store),), store)
    return text_data(corpus, data, report, template)


def text_data(corpus: Corpus, data: sections.Data, report: Report, template: str = "") -> RunData:
    """Return the data of a corpus: each part's own split, unless validation is a source."""
    if corpus.validation is None:
        spans = [
            part.store.split(data.validation_fraction, data.validation_documents)
            for part in corpus.parts
        ]
        held_out = [(part.store, last) for part, (_, last) in zip(corpus.parts, spans, strict=True)]
    else:
        spans = [part.store.split(0.0) for part in corpus.parts]
        held_out = [(corpus.validation, (0, corpus.validation.num_tokens))]
    weights = whole_weights([part.weight for part in corpus.parts])
    train_rows = {"wrap": wrap_rows, "pack": packed_rows}[data.packing]
    eval_rows = {"wrap": cover_rows, "pack": packed_rows}[data.packing]

    said: set[str] = set()

    def rows(plain: MakeRows, name: str, store: Store, span: Span, seq_len: int) -> Rows:
        if not store.examples:
            return plain(store, span, seq_len)
        fit = plan_examples(store, span, seq_len, data.overlong)
        if fit.plan.places_P.size == 0 and name != "validation":
            raise DataError(f"{describe_fit(name, fit, seq_len)}: none is left to train on; "
                            "raise model.seq_len, or set data.overlong=cut")  # fmt: skip
        if (fit.dropped or fit.cut) and (line := describe_fit(name, fit, seq_len)) not in said:
            said.add(line)
            report(line)
        return planned_rows(store, fit.plan, seq_len, weighted=True)

    def train(seq_len: int) -> tuple[WeightedRows, ...]:
        return tuple(
            WeightedRows(
                part.source, weight, rows(train_rows, part.source, part.store, first, seq_len)
            )
            for part, weight, (first, _) in zip(corpus.parts, weights, spans, strict=True)
        )

    def validation(seq_len: int) -> Rows:
        tables = [rows(eval_rows, "validation", store, span, seq_len) for store, span in held_out]
        return join_tables(tables)

    num_tokens = sum(part.store.num_tokens for part in corpus.parts)
    examples = [(part.source, part.store) for part in corpus.parts if part.store.examples]
    if corpus.validation and corpus.validation.examples:
        examples.append(("validation", corpus.validation))
    return RunData(
        corpus.tokenizer, corpus.identity(), f"{num_tokens:,} tokens", train, validation,
        corpus.labels, template, tuple(dict(examples).items()),
    )  # fmt: skip


def describe_fit(name: str, fit: Fit, seq_len: int) -> str:
    """Return how many examples don't fit rows of this length, and what became of them."""
    return (
        f"{name}: {fit.dropped + fit.cut:,} of {fit.num_examples:,} examples are longer than "
        f"model.seq_len={seq_len}: {fit.dropped:,} dropped, {fit.cut:,} cut"
    )


def whole_weights(weights: list[Fraction]) -> list[int]:
    """Return the smallest integers in the same proportion. Raises ConfigError if they are huge."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > LARGEST_SUM:
        raise ConfigError(
            f"data.mixture: the weights come to {sum(whole):,} parts; use fewer digits"
        )
    return whole


def task_data(spec: str) -> RunData:
    """Return the data of a generated task, `task:NAME[,option=value...]`. Raises ConfigError."""
    name, task = open_task(spec)
    tokenizer = WordTokenizer(task.words)
    identity = dict(source=spec, tokenizer=tokenizer.content_hash())

    def train(seq_len: int) -> tuple[WeightedRows, ...]:
        return (WeightedRows(name, 1, task_rows(task, seq_len)[0]),)

    def validation(seq_len: int) -> Rows:
        return task_rows(task, seq_len)[1]

    return RunData(tokenizer, identity, f"examples of {name}", train, validation)


def open_task(spec: str) -> tuple[str, Task]:
    """Return the name and the task of `task:NAME[,option=value...]`. Raises ConfigError."""
    name, *settings = spec.removeprefix("task:").split(",")
    if name not in TASKS:
        raise ConfigError(
            f"{unknown_name('task', name, list(TASKS))}; available: {', '.join(TASKS)}"
        )
    known = {
        option: parameter.default
        for option, parameter in inspect.signature(TASKS[name]).parameters.items()
    }
    options: dict[str, int | float] = {}
    for setting in settings:
        option, _, text = setting.partition("=")
        if option not in known:
            hint = ", ".join(f"{key}={value}" for key, value in known.items())
            raise ConfigError(f"{unknown_name('option', option, list(known))}; {name} has {hint}")
        read = read_int if isinstance(known[option], int) else read_float
        try:
            options[option] = read(text)
            if not math.isfinite(options[option]):
                raise ValueError
        except ValueError:
            kind = kind_of(known[option])
            raise ConfigError(f"{spec}: {option}={show(text)} is not {kind}") from None
    return name, TASKS[name](**options)


def fetch_ahead(
    fetch: Callable[[int], Fetched], first: int, stop: int, ahead: int
) -> Generator[Fetched, None, None]:
    """Yield fetch(step) for the steps [first, stop), made by a thread `ahead` of their use.

    An exception of `fetch` is raised where its result would have come, and is the end. Closing the
    iterator waits for the fetch in progress, but at most FETCH_SECONDS.
    """
    fetched: SimpleQueue[Future[Fetched]] = SimpleQueue()
    room, closed = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        for step in range(first, stop):
            room.acquire()
            if closed.is_set():
                return
            future: Future[Fetched] = Future()
            try:
                future.set_result(fetch(step))
            except BaseException as error:
                future.set_exception(error)
            fetched.put(future)

    # A daemon, so that a fetch that hangs does not keep a process that wants to end.
    thread = threading.Thread(target=work, name="fetch ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first, stop):
            batch = fetched.get().result()
            room.release()
            yield batch
    finally:
        closed.set()
        room.release()
        # Where the interpreter ends while this thread is in jaxlib, the process aborts (SIGABRT).
        thread.join(FETCH_SECONDS)
