"""In: rows of a table. Out: the batches of a step or of an evaluation, as global arrays."""

from collections.abc import Callable

from jax.sharding import Mesh

from nanojaxgpt import sharding
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import RunData
from nanojaxgpt.data.rows import Batch, Ramp, ReadRows, make_train_rows, read_batch
from nanojaxgpt.recorder import train_ramp

Finish = Callable[[Batch], Batch]  # rows as they are read -> those that go to the devices


def without_documents(batch: Batch) -> Batch:
    """Return the rows without the numbers of their documents."""
    return batch._replace(documents_BT=None)


def make_train_batch(
    cfg: Config, data: RunData, mesh: Mesh, finish: Finish = without_documents
) -> Callable[[int], Batch]:
    """Return batch(step) -> the global batch of a 0-based training step."""
    seq_len, ramp = cfg.model.seq_len, train_ramp(cfg)
    rows = make_train_rows(data.train(seq_len), ramp.full, cfg.train.seed)
    return make_batches(rows, ramp, seq_len, mesh, finish)


def make_batches(
    rows: ReadRows, ramp: Ramp, seq_len: int, mesh: Mesh, finish: Finish = without_documents
) -> Callable[[int], Batch]:
    """Return batch(step) -> that step's batch as global arrays; a host reads its own rows alone.

    `finish` makes of the rows as they are read those that go to the devices.
    """

    def batch(step: int) -> Batch:
        def read(first: int, last: int) -> Batch:
            return finish(read_batch(rows, ramp, int(step), first, last))

        return sharding.global_batch(read, ramp.size(step), seq_len, mesh)

    return batch
