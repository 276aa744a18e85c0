"""The reference model's log-probabilities of preferences: computed once, stored with the run.

A table gives for each document of a store the sum over its trained tokens. It is filled into
batches on the host, so that training needs the reference model no more.
"""

import functools
import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt import rundir
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives.preference import pair_sums, token_log_probabilities
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.sharding import constrain

FILE = "reference.npz"
Finish = Callable[[Batch], Batch]  # rows as they are read -> those that go to the devices
Tables = dict[str, np.ndarray]  # train and validation: float32 by a document's number


def without_documents(batch: Batch) -> Batch:
    """Return the rows without the numbers of their documents."""
    return batch._replace(documents_BT=None)


def fill(table: np.ndarray) -> Finish:
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
        rng = jax.random.key(0)  # of no use: there is no dropout
        log_BT = token_log_probabilities(model, params, batch, hyper, rng, loss_chunks)
        segments_BT: Any = batch.segments_BT
        sums_BP2 = pair_sums(log_BT, segments_BT)
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


@jax.jit
def fingerprint(params: Params) -> jax.Array:
    """Return a number that differs where one of the parameters does; uint32."""

    def words(leaf: jax.Array) -> jax.Array:
        kind = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
        return jnp.sum(bits, dtype=jnp.uint32)

    sums = [words(leaf) for leaf in jax.tree.leaves(params)]
    return functools.reduce(lambda total, one: total * jnp.uint32(31) + one, sums)


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
