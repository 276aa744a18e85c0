"""What the backward pass of a layer recomputes: `model.remat` as a policy of `jax.checkpoint`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from nanojaxgpt.config.remat import parse_remat
from nanojaxgpt.errors import ConfigError

HOST = "pinned_host"  # the kind of memory that offloaded activations wait in


def checkpoint_policy(text: str) -> Callable[..., bool] | None:
    """Return the policy of `model.remat`, other than none; None recomputes everything."""
    remat, known = parse_remat(text), jax.checkpoint_policies
    save: list[Any] = [*remat.save]  # jax takes any string as a name
    offload: list[Any] = [*remat.offload]
    if remat.policy != "names":
        return {
            "full": None,
            "dots": known.dots_saveable,
            "dots_no_batch": known.dots_with_no_batch_dims_saveable,
        }[remat.policy]
    if not remat.offload:
        return known.save_only_these_names(*save)
    return known.save_and_offload_only_these_names(
        names_which_can_be_saved=save,
        names_which_can_be_offloaded=offload,
        offload_src="device",
        offload_dst=HOST,
    )


def check_offload(text: str, mesh: Mesh) -> None:
    """Raise ConfigError where the devices can't leave activations in their host's memory."""
    if not parse_remat(text).offload:
        return
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if kinds and HOST not in kinds:  # an absent GPU knows of none
        raise ConfigError(
            f"model.remat={text!r} needs memory of the kind {HOST}, which {device.device_kind} "
            "does not have here; use save= instead of offload="
        )
