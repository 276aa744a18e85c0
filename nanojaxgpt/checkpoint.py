"""Orbax checkpoints of a state, with a fingerprint of every leaf; full or params-only restore."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from nanojaxgpt import sharding
from nanojaxgpt.console import LIBRARY_ERRORS
from nanojaxgpt.errors import CheckpointError, why
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params, PyTree, abstract_tree, parameters
from nanojaxgpt.rundir import check_present, identify, saved_steps, writing


def fingerprint(tree: PyTree) -> dict[str, jax.Array]:
    """Return two uint32 sums for each leaf, by path: of its bits, and of its bits by position.

    Flipped bits change the first, swapped elements the second. Sums modulo 2^32 don't depend
    on their order, so every sharding gives the same.
    """

    def leaf_sums(leaf: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
        position, stride = jnp.ones_like(bits), 1
        for axis in reversed(range(leaf.ndim)):
            iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position += iota * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        # An odd factor for each position, spread over all 32 bits (Knuth's multiplier).
        weight = (position * jnp.uint32(2654435761)) | jnp.uint32(1)
        sums = jnp.stack(
            [jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)]
        )
        return sharding.constrain(sums, None)  # on every device: each process reads them

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf_sums(leaf) for path, leaf in leaves}


_fingerprint = jax.jit(fingerprint)


def describe_leaves(items: dict[str, PyTree]) -> dict[str, list]:
    """Return dtype, shape and fingerprint of every leaf, as JSON takes it."""
    sums, kinds = jax.device_get(_fingerprint(items)), leaf_kinds(items)
    return {name: [*kind, *map(int, sums[name])] for name, kind in kinds.items()}


def leaf_kinds(tree: PyTree) -> dict[str, list]:
    """Return [dtype, shape] of every leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """Return a leaf's path as text, "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Keep(checkpoint_managers.PreservationPolicy):
    """Keeps the newest, every K-th, and the best by a validation loss known only after the save."""

    def __init__(
        self, last: int, every_steps: int, best: int, losses: Callable[[], dict[int, float]]
    ) -> None:
        self.last, self.every_steps, self.best, self.losses = last, every_steps, best, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return whether each checkpoint stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        losses = {step: loss for step, loss in self.losses().items() if step in steps}
        kept = set(sorted(steps)[-self.last :]) | set(
            sorted(losses, key=lambda step: losses[step])[: self.best]
        )
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run that is training: `folder/STEP/{params,opt_state,...,meta}`."""

    def __init__(self, folder: Path, keep: Keep) -> None:
        self.folder, self.saved = Path(folder), 0
        self.identity = identify(self.folder.parent)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=True,  # of saves that were killed or found the disk full
        )
        self.manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def save(self, step: int, items: dict[str, PyTree]) -> None:
        """Start to save trees by their names; the arrays may be donated as soon as this returns."""
        meta = {"step": step, "leaves": describe_leaves(items)}
        self.check(wait=True)
        check_present(self.folder.parent, self.identity)
        self.saved = step
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(meta),
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                ),
            )
        except Exception as error:
            raise self._failed(f"can't save step {step}", error) from error

    def check(self, wait: bool = False) -> None:
        """Raise CheckpointError where the last save failed, as far as is known or after a wait."""
        try:
            if wait:
                self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(f"can't save step {self.saved}", error) from error

    def close(self) -> None:
        """Wait until everything is on disk, and look. Raises CheckpointError where it is not."""
        self.check(wait=True)
        try:
            self.manager.close()
        except Exception as error:
            raise self._failed(f"can't save step {self.saved}", error) from error
        first = jax.process_index() == 0  # to the others a shared file system may show it later
        if first and self.saved and self.saved not in saved_steps(self.folder):
            raise CheckpointError(f"step {self.saved} was saved, but is no longer in {self.folder}")

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        """Return the error for a save that failed, or raise the one behind it."""
        check_present(self.folder.parent, self.identity)
        steps = saved_steps(self.folder)
        newest = f"step {steps[-1]} is the newest saved" if steps else "nothing was saved"
        return CheckpointError(f"{what} to {self.folder}: {why(error, self.folder)}; {newest}")


def restore(
    folder: Path,
    abstract: dict[str, PyTree],
    step: int = 0,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
) -> tuple[int, dict[str, PyTree]] | None:
    """Return (step, items) of the newest good checkpoint, or None where there are none at all.

    `abstract` maps the wanted items ("params", "opt_state", ...) to trees of ShapeDtypeStruct with
    shardings, into which the arrays are read. Checkpoints that don't load, or whose fingerprints
    are not those that were saved, are passed over loudly, on all hosts of the team if on one.
    With `step`, only that one will do.
    Raises CheckpointError where none is good.
    """
    steps = team.decide(lambda: saved_steps(folder))
    if step and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; available: {steps}")
    for candidate in [step] if step else reversed(steps):
        try:
            return candidate, restore_step(folder, candidate, abstract, team)
        except Exception as error:
            text = str(error).strip().split("\n")[0][:300]
            report(f"WARNING: the checkpoint {folder}/{candidate} is unusable: {text}")
            LIBRARY_ERRORS.lines.clear()  # they were about this
    if steps:
        raise CheckpointError(
            f"no checkpoint in {folder} is usable; tried {[step] if step else steps}"
        )
    return None


def restore_step(
    folder: Path, step: int, abstract: dict[str, PyTree], team: Team = ALONE
) -> dict[str, PyTree]:
    """Return the items of one checkpoint, checked leaf by leaf. Raises ValueError."""
    path = Path(folder).absolute() / str(step)
    wanted = leaf_kinds(abstract)
    saved = team.all_or_none(lambda: read_leaves(path, wanted))
    items = team.all_or_none(lambda: read_items(path, abstract))
    found = describe_leaves(items)
    changed = [name for name in wanted if found[name] != saved[name]]
    if changed:
        raise ValueError(f"these arrays differ from what was saved: {', '.join(changed[:5])}")
    return items


def read_leaves(path: Path, wanted: dict[str, list]) -> dict[str, list]:
    """Return the result of `describe` when the checkpoint was saved. Raises ValueError.

    The step is compared, too: the folder's name alone would let a renamed checkpoint pass.
    """
    saved = saved_leaves(path)
    for name, kind in wanted.items():
        if saved.get(name, [])[:2] != kind:
            raise ValueError(f"{name} is {saved.get(name, ['missing'])[:2]} there, {kind} here")
    return saved


def saved_leaves(path: Path) -> dict[str, list]:
    """Return dtype, shape and fingerprint of the leaves of a checkpoint. Raises ValueError."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        meta = reader.restore(Path(path).absolute() / "meta")
    if meta["step"] != int(path.name):
        raise ValueError(f"it holds step {meta['step']}")
    return meta["leaves"]


def read_items(path: Path, abstract: dict[str, PyTree]) -> dict[str, PyTree]:
    """Return the arrays of a checkpoint, read into the shardings of `abstract`."""
    items = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for name, tree in abstract.items():
            items[name] = reader.restore(path / name, args=ocp.args.StandardRestore(tree))
    return items


class LeafReader:
    """Reads the arrays of one checkpoint one at a time, whatever config it was saved under."""

    def __init__(self, path: Path) -> None:
        self.path, self.trees = Path(path).absolute(), {}

    def read(self, name: str) -> np.ndarray:
        """Return the array of a name that `read_leaves` gives. Raises what Orbax raises."""
        item, _, leaf = name.partition("/")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            if item not in self.trees:
                self.trees[item] = reader.metadata(self.path / item).item_metadata.tree
            wanted = jax.tree_util.tree_map_with_path(
                lambda path, _: 0 if path_name(path) == leaf else ocp.PLACEHOLDER, self.trees[item]
            )
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            how = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy)
            found = jax.tree.leaves(reader.restore(self.path / item, args=how))
        (array,) = [one for one in found if one is not ocp.PLACEHOLDER]
        return array


def load_params(
    run: Path,
    cfg: ModelConfig,
    mesh: Mesh,
    step: int = 0,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
) -> tuple[int, Params]:
    """Return (step, parameters) of a run's newest good checkpoint, or of `step`, on `mesh`.

    Raises CheckpointError where there is none.
    """
    abstract = abstract_params(cfg, mesh)
    folder = Path(run) / "checkpoints"
    found = restore(folder, {"params": abstract}, step, report, team)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return found[0], found[1]["params"]


def abstract_params(cfg: ModelConfig, mesh: Mesh) -> Params:
    """Return the parameters of a model without arrays, with their shardings."""
    shapes = abstract_tree(cfg)
    return with_shardings(shapes, sharding.tree_shardings(shapes, parameters(cfg), mesh))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Return the tree of ShapeDtypeStruct that `restore` reads into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def set_aside(folder: Path, step: int) -> None:
    """Move checkpoints newer than `step` out of the way, to `unusable/`; nothing is deleted.

    Raises CheckpointError where they can't be moved.
    """
    run = Path(folder).parent
    for newer in [s for s in saved_steps(folder) if s > step]:
        target = run / "unusable" / str(newer)
        with writing(run, CheckpointError):
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "+")
            (Path(folder) / str(newer)).rename(target)
