"""The reference model's log-probabilities of preferences: computed once, stored with the run.

A table gives for each document of a store the sum over its trained tokens. It is filled into
batches on the host, so that training needs the reference model no more.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanojaxgpt import checkpoint, rundir
from nanojaxgpt.batches import Finish, make_batches, make_train_batch
from nanojaxgpt.data.loader import fetch_ahead
from nanojaxgpt.data.rows import Batch, Rows, make_eval_batches, make_ramp
from nanojaxgpt.data.store import content_key
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives.features import log_probabilities
from nanojaxgpt.objectives.preference import pair_sums
from nanojaxgpt.recorder import Job
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.sharding import constrain
from nanojaxgpt.step import TrainState, make_hyper
from nanojaxgpt.trainable import merge_params

FILE = "reference.npz"
Tables = dict[str, np.ndarray]  # train and validation: float32 by a document's number


def fill_reference(table: np.ndarray) -> Finish:
    """Return the function that fills a table's numbers into rows."""

    def finish(batch: Batch) -> Batch:
        documents_BT: Any = batch.documents_BT
        reference_BT = np.where(documents_BT < 0, 0, table[np.maximum(documents_BT, 0)])
        return batch._replace(documents_BT=None, reference_BT=reference_BT.astype(np.float32))

    return finish


def make_reference_step(model: Transformer, loss_chunks: int) -> Callable[..., jax.Array]:
    """Return score(params, batch, hyper) -> the sums of each answer, float32 [B, S]."""

    @jax.jit
    def score(params: Params, batch: Batch, hyper: Hyper) -> jax.Array:
        log_BT = log_probabilities(model, params, batch, hyper, loss_chunks)
        segments_BT: Any = batch.segments_BT
        sums_BP2 = pair_sums(log_BT * batch.weights_BT, segments_BT)
        return constrain(sums_BP2.reshape(len(log_BT), -1), None, None)

    return score


def make_table(scored: Iterable[tuple[Batch, np.ndarray]]) -> np.ndarray:
    """Return the table of (rows as they were read, their scores [B, S])."""
    numbers, values = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for batch, sums_BS in scored:
        documents_BT: Any = batch.documents_BT
        segments_BT: Any = batch.segments_BT
        first_BT = (batch.positions_BT == 0) & (documents_BT >= 0)
        first_BT &= batch.weights_BT.any(1)[:, None]  # not the rows that pad a last batch
        row, place = np.nonzero(first_BT)
        numbers.append(documents_BT[row, place])
        values.append(sums_BS[row, segments_BT[row, place] - 1])
    documents = np.concatenate(numbers)
    table = np.zeros(documents.max(initial=-1) + 1, np.float32)
    table[documents] = np.concatenate(values)
    return table


def read_tables(run: Path, identity: dict[str, Any]) -> Tables:
    """Return the tables of a run, or {} where they are missing, damaged or not of `identity`."""
    try:
        with np.load(run / FILE) as found:
            tables = {name: found[name] for name in ("train", "validation")}
            known = json.loads(str(found["identity"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
    wanted = json.loads(json.dumps(identity))
    return tables if wanted.items() <= known.items() else {}


def write_tables(run: Path, identity: dict[str, Any], tables: Tables) -> None:
    """Write the tables into the run directory, whole or not at all. Raises CheckpointError."""
    partial = run / f"{FILE}.partial"
    with rundir.writing(run, CheckpointError):
        with open(partial, "wb") as file:
            arrays = {"identity": np.array(json.dumps(identity))} | tables
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(run / FILE)


def hash_params(params: Params) -> str:
    """Return 16 hex digits that name the parameters, however they are laid out."""
    sums = jax.device_get(jax.jit(checkpoint.fingerprint)(params))
    return content_key({path: pair.tolist() for path, pair in sums.items()})


def with_reference(
    job: Job,
    run: Path,
    state: TrainState,
    frozen: Params,
    start: Callable[[], tuple[TrainState, Params]],
    report: Callable[[str], None],
    team: Team = ALONE,
) -> Job:
    """Return the job whose batches have the log-probabilities of the reference model.

    They are read from the run directory, or computed with the parameters before the first step and
    written there. `state` and `frozen` are those to continue from; `start` gives those before the
    first step. Raises ConfigError, CheckpointError.
    """
    cfg, data = job.cfg, job.data
    if not cfg.objective.has_reference:
        return job
    identity = {"data": data.identity, "seed": cfg.train.seed, "init": cfg.init.given()}
    identity["seq_len"] = cfg.model.seq_len
    if is_first := not int(state.step):
        identity["parameters"] = hash_params(merge_params(state.params, frozen))
    known = team.decide(lambda: bool(read_tables(run, identity)))
    tables = read_tables(run, identity) if known else {}
    if not tables:
        state, frozen = (state, frozen) if is_first else start()
        params = merge_params(state.params, frozen)
        identity["parameters"] = hash_params(params)
        tables = make_tables(job, params, report)
        team.decide(lambda: write_tables(run, identity, tables))
    train_batch = make_train_batch(cfg, data, job.mesh, fill_reference(tables["train"]))
    evaluate = functools.partial(job.evaluate, finish=fill_reference(tables["validation"]))
    return job._replace(train_batch=train_batch, evaluate=evaluate)


def make_tables(job: Job, params: Params, report: Callable[[str], None]) -> Tables:
    """Return the tables of the documents to train and to validate on. Raises ConfigError."""
    cfg, mesh, seq_len = job.cfg, job.mesh, job.cfg.model.seq_len
    source, *others = job.data.train(seq_len)
    if others:
        raise ConfigError(
            f"objective.loss={cfg.objective.loss} can't learn from a mixture, as documents are "
            "known by their number in one source; join the files into one, or use simpo or orpo"
        )
    size = cfg.train.batch_size // cfg.train.accumulation_steps
    score = make_reference_step(Transformer(cfg.model), cfg.train.loss_chunks)

    def scored(rows: Rows) -> Iterator[tuple[Batch, np.ndarray]]:
        count, read = make_eval_batches(rows, size)
        fetch = make_batches(read, make_ramp(size), seq_len, mesh)
        with closing(fetch_ahead(fetch, 0, count, cfg.data.prefetch_batches)) as batches:
            for number, batch in enumerate(batches):
                sums_BS = score(params, batch, make_hyper(cfg))
                yield read(number, 0, size), np.asarray(sums_BS)

    tables = {"train": make_table(scored(source.rows))}
    tables["validation"] = make_table(scored(job.data.validation(seq_len)))
    found = sum(np.count_nonzero(table) for table in tables.values())
    report(f"reference: the log-probabilities of {found:,} answers")
    return tables
