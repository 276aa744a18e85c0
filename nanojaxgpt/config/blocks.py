"""The field `model.attention_blocks`: the tiles of the splash kernel."""

from typing import NamedTuple

from nanojaxgpt.checks import read_int, show
from nanojaxgpt.config.sections import Model
from nanojaxgpt.names import nearest

LANES = 128  # every block is a multiple of this
USUAL = (512, 384, 256, LANES)  # the first that divides the length


class SplashBlocks(NamedTuple):
    """Queries and keys of a tile, forward and backward; keys are multiplied `kv_compute` at a time.

    `fused` computes all gradients in one kernel, instead of those of queries and of keys apart.
    """

    q: int
    kv: int
    kv_compute: int
    backward_q: int
    backward_kv: int
    backward_kv_compute: int
    fused: bool


def splash_blocks(text: str, queries: int, keys: int) -> SplashBlocks:
    """Return the blocks of `model.attention_blocks` for a device's queries and its keys.

    Words as in `q=1024 kv=512 fused=true`; without one, the backward pass takes the sizes of the
    forward pass, and that the usual ones. Raises ValueError.
    """
    given: dict[str, int] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in SplashBlocks._fields or not equals:
            hint = nearest(name, SplashBlocks._fields)
            known = ", ".join(SplashBlocks._fields)
            raise ValueError(f"{show(word)} is not one of {known} with =VALUE{hint}")
        if name != "fused":
            given[name] = read_int(value)
        elif value in ("true", "false"):
            given[name] = value == "true"
        else:
            raise ValueError(f"{show(word)}: write fused=true or fused=false")

    def usual(length: int) -> int:
        return next((size for size in USUAL if length % size == 0), LANES)

    q, kv = given.get("q", usual(queries)), given.get("kv", usual(keys))
    backward = given.get("backward_q", q), given.get("backward_kv", kv)
    found = SplashBlocks(
        q, kv, given.get("kv_compute", kv), *backward,
        given.get("backward_kv_compute", backward[1]), bool(given.get("fused", False)),
    )  # fmt: skip
    wholes = {"q": queries, "backward_q": queries, "kv": keys, "backward_kv": keys}
    wholes |= {"kv_compute": kv, "backward_kv_compute": backward[1]}
    for name, whole in wholes.items():
        size = getattr(found, name)
        if size < LANES or size % LANES:
            raise ValueError(f"{name}={size} must be a multiple of {LANES}")
        if whole % size:
            kind = "kv" if name.endswith("compute") else "tokens on a device"
            raise ValueError(f"{name}={size} does not divide {whole} {kind}")
    return found


def blocks_problems(model: Model) -> list[str]:
    """Return the fault of `model.attention_blocks`."""
    try:
        if model.attention_blocks:
            splash_blocks(model.attention_blocks, model.seq_len, model.seq_len)
    except ValueError as error:
        return [f"model.attention_blocks: {error}"]
    return []
