"""Branches: runs that start from the whole state of another run at one of its steps.

`init.state=all` takes over the parameters, the optimizer state, the gradient-norm statistics and
the step, and with the step the place in the data. The run then computes the same bits as the other
run would have, if its config had changed to this one at that step.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nanojaxgpt import checkpoint, config, rundir
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import PyTree
from nanojaxgpt.recorder import Job
from nanojaxgpt.step import make_init, open_state

# The optimizer, and the fields that decide the rows of a batch: they must match.
SAME = re.compile(
    r"optim\.optimizer|train\.(seed|batch_size|ramp_batch_size|ramp_steps)|model\.seq_len"
    r"|data\.(packing|overlong|mixture|validation_fraction|validation_documents|validation_source)"
)


def branch_state(job: Job, report: Callable[[str], None], team: Team = ALONE) -> tuple:
    """Return (state, frozen parameters) of the run init.from_run at step init.step, or its newest.

    Raises ConfigError, DataError or CheckpointError if this run can't start from there.
    """
    init, num_steps = job.cfg.init, job.cfg.train.num_steps
    other = Path(init.from_run)
    if not team.decide(lambda: check_branch(job, other)):
        report(f"WARNING: {other} has no identity.json, so its data can't be compared")
    folder = other / "checkpoints"
    found = checkpoint.restore(
        folder, job.abstract.items(job.cfg, job.frozen), init.step, report, team
    )
    if found is None:
        raise CheckpointError(f"{other} has no checkpoint yet")
    step, items = found
    if step >= num_steps:
        raise ConfigError(
            f"step {step} of {other} is not before train.num_steps={num_steps}: raise "
            "train.num_steps, which counts the other run's steps too, or set an earlier init.step"
        )
    report(f"branching from {other} at step {step}")
    return open_state(job.cfg, jax.device_put(np.int32(step), job.shardings.step), items)


def check_branch(job: Job, other: Path) -> bool:
    """Return whether the other run's data is known; if so, it is the same.

    Raises ConfigError or DataError if a job can't start from a state of the other run.
    """
    there = rundir.read_config(other)
    changes = [c for c in config.differences(there, job.cfg) if SAME.fullmatch(c[0])]
    if changes:
        lines = [f"  {name}: {old!r} there, {new!r} here" for name, old, new in changes]
        raise ConfigError(
            f"init.state=all continues the optimizer and the batches of {other}, but\n"
            + "\n".join(lines)
            + "\nuse the same values here, or take only its parameters with init.state=params"
        )

    def first_state(key: jax.Array) -> dict[str, PyTree]:
        state, frozen = make_init(complete(there))(key)
        return state.items(there, frozen)

    old = checkpoint.leaf_kinds(jax.eval_shape(first_state, jax.random.key(0)))
    new = checkpoint.leaf_kinds(job.abstract.items(job.cfg, job.frozen))
    # Parameters first: the moments of one with another shape differ, too.
    for name in sorted([*new, *old], key=lambda name: not name.startswith("params/")):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"init.state=all needs the state of {other}, but {name} is "
                f"{old.get(name, 'missing')} there, {new.get(name, 'missing')} here: set the same "
                "model.* fields, and turn optim.ema_decay on or off as there"
            )
    return rundir.check_identity(other, job.data.identity) is not None
