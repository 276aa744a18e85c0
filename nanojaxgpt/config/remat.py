"""The field `model.remat`: which activations of a layer the backward pass finds, and where."""

from typing import NamedTuple

from nanojaxgpt.checks import show
from nanojaxgpt.config.sections import GATED, Model
from nanojaxgpt.names import nearest

POLICIES = ("none", "full", "dots", "dots_no_batch")

# The activations that have a name, in the order in which a layer makes them; docs/accelerators.md
# describes them.
NAMES = ("layer_input", "q", "k", "v", "attention", "o", "mlp_input", "gate", "up", "down")


class Remat(NamedTuple):
    """`policy` is one of POLICIES, or "names": then what is in neither tuple is recomputed."""

    policy: str
    save: tuple[str, ...] = ()  # on the device
    offload: tuple[str, ...] = ()  # in the memory of the host


def parse_remat(text: str) -> Remat:
    """Return what `model.remat` says: a policy, or words as in `save=q,k,v offload=layer_input`.

    Raises ValueError.
    """
    if text in POLICIES:
        return Remat(text)
    given: dict[str, tuple[str, ...]] = {}
    for word in text.split():
        key, equals, names = word.partition("=")
        if key not in ("save", "offload") or not equals:
            raise ValueError(
                f"{show(word)} is not one of {', '.join(POLICIES)}, and not save=NAMES or "
                f"offload=NAMES{nearest(word, POLICIES)}"
            )
        if key in given:
            raise ValueError(f"{key}= is there twice: separate its names by commas")
        given[key] = tuple(names.split(","))
    found = Remat("names", **given)
    every = found.save + found.offload
    for name in every:
        if name not in NAMES:
            hint = nearest(name, NAMES)
            raise ValueError(f"{show(name)} is not an activation: {', '.join(NAMES)}{hint}")
        if every.count(name) > 1:
            raise ValueError(f"{name} is there twice")
    if not every:
        raise ValueError(f"it is empty; write one of {', '.join(POLICIES)}, or save=NAMES")
    return found


def named_activations(model: Model) -> tuple[str, ...]:
    """Return those of NAMES that the layers of a model make."""
    absent: set[str] = set()
    if model.mlp == "none":
        absent = {"mlp_input", "gate", "up", "down"}
    elif model.mlp not in GATED:
        absent = {"gate"}
    if model.parallel_block:
        absent |= {"mlp_input"}
    return tuple(name for name in NAMES if name not in absent)


def remat_problems(model: Model) -> list[str]:
    """Return the fault of `model.remat`."""
    try:
        found = parse_remat(model.remat)
    except ValueError as error:
        return [f"model.remat: {error}"]
    known = named_activations(model)
    return [
        f"model.remat: this model has no {name}; its activations: {', '.join(known)}"
        for name in found.save + found.offload
        if name not in known
    ]
