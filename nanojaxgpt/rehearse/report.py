"""In: rehearsals. Out: the lines of their tables, and the same as JSON."""

from typing import Any

from nanojaxgpt.chips import GIB
from nanojaxgpt.config import to_dict
from nanojaxgpt.rehearse.estimate import advice
from nanojaxgpt.rehearse.step import Rehearsal
from nanojaxgpt.rehearse.targets import Target

TOLERANCE = 0.01  # between the formula's FLOPs and the jaxpr's


def title(name: str, target: Target) -> list[str]:
    """Return the lines that say what was compiled, and for what."""
    topology = target.topology
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    chips = f"{topology.count} x {topology.chip.kind} ({slices}{topology.name})"
    if not target.fake:
        return [f"{name} on {chips}", *([f"note: {target.note}"] if target.note else [])]
    return [f"{name} on {topology.count} FAKE CPU devices for {chips}", f"note: {target.note}"]


def mesh_name(mesh: dict[str, int]) -> str:
    """Return the mesh axes that are in use, `data=2 fsdp=64`."""
    used = [f"{axis}={size}" for axis, size in mesh.items() if size > 1]
    return " ".join(used) or "one device"


def memory_lines(one: Rehearsal) -> list[str]:
    """Return the memory table."""
    memory = one.memory
    rows = [
        ("parameters", memory.parameters, "exact"),
        ("optimizer state", memory.optimizer, "exact"),
        ("gradients", memory.gradients, "exact, of the parameters' size"),
        ("batch", memory.batch, "exact"),
        ("activations and temporaries", memory.temporaries, "the compiler's"),
    ]
    lines = ["memory of a device in GiB"]
    lines += [f"  {name:<28}{size / GIB:>9.3f}  {how}" for name, size, how in rows]
    verdict = "fits" if memory.fits else f"DOES NOT FIT; try {advice(one.cfg, memory)}"
    share = f"of {memory.available / GIB:.1f}: {verdict}"
    return [*lines, f"  {'total':<28}{memory.total / GIB:>9.3f}  {share}"]


def flops_lines(one: Rehearsal) -> list[str]:
    """Return the FLOPs, and whether formula and jaxpr agree."""
    flops = one.flops
    agree = "agree" if abs(flops.difference) <= TOLERANCE else "DISAGREE"
    return [
        "FLOPs of a step, all devices",
        f"  formula {flops.formula:.4e}, of that with weights {flops.weights_formula:.4e}; "
        f"the jaxpr has {flops.weights_counted:.4e} with weights: they {agree} "
        f"({flops.difference:+.2%})",
        f"  recomputed in the backward pass {flops.recomputed:.4e}",
    ]


def traffic_lines(one: Rehearsal) -> list[str]:
    """Return the table of collectives."""
    lines = ["collectives: what a device sends in a step"]
    if not one.memory.compiled:
        return [*lines, "  unknown: the compiler ran out of the chip's memory"]
    if one.traffic:
        lines.append(f"  {'kind':<19}{'axes':<18}{'over':<17}{'times':>6}{'MB':>12}{'seconds':>10}")
    for row in one.traffic:
        over = f"{row.network} x {row.devices}"
        lines.append(
            f"  {row.kind:<19}{row.axes:<18}{over:<17}{row.times:>6}"
            f"{row.sent / 1e6:>12,.3f}{row.seconds:>10.4g}"
        )
    if not one.traffic:
        lines.append("  none")
    if one.unknown_loops:
        lines.append(f"  {one.unknown_loops} loops of unknown length were counted once")
    return lines


def roofline_lines(one: Rehearsal, target: Target) -> list[str]:
    """Return the bounds of the step time, and where the chip's figures are from."""
    bound, cfg = one.roofline, one.cfg
    if not one.memory.compiled:
        return []
    tokens = cfg.train.batch_size * cfg.model.seq_len / bound.seconds
    return [
        "roofline, predicted, in seconds a step",
        f"  compute {bound.compute:.4g}, memory {bound.memory:.4g}, "
        f"communication {bound.communication:.4g}: bound by {bound.bound}",
        f"  at best {bound.seconds:.4g} s, {tokens:,.0f} tokens/s, MFU {bound.mfu:.1%}",
        f"  chip: {target.topology.chip.source}",
    ]


def lines(name: str, target: Target, one: Rehearsal) -> list[str]:
    """Return the whole table of one rehearsal."""
    cfg = one.cfg
    parts = cfg.train.accumulation_steps
    micro = f" in {parts} micro-batches" if parts > 1 else ""
    return [
        *title(name, target),
        f"{one.num_params:,} parameters, mesh {mesh_name(one.mesh)}, batch "
        f"{cfg.train.batch_size} x {cfg.model.seq_len} tokens{micro}, remat {cfg.model.remat}; "
        f"compiled in {one.compile_seconds:.0f} s",
        "",
        *memory_lines(one),
        *flops_lines(one),
        *traffic_lines(one),
        *roofline_lines(one, target),
    ]


def search_lines(name: str, target: Target, found: list[Rehearsal], blocks: str = "") -> list[str]:
    """Return the table of a search: what fits and is beaten by none, fastest first; the rest.

    `blocks` are the largest of splash that compile, if any do.
    """
    best = pareto(found)
    table = [
        *title(name, target),
        "",
        f"  {'mesh':<24}{'remat':<34}{'micro':>6}{'GiB':>8}{'s/step':>10}  bound",
    ]
    for one in best:
        table.append(
            f"{search_columns(one)}{one.roofline.seconds:>10.4g}  "
            f"{one.roofline.bound}, MFU at most {one.roofline.mfu:.1%}"
        )
    for one in found:
        if not one.memory.fits:
            table.append(f"{search_columns(one)}{'-':>10}  does not fit")
    if beaten := sum(one.memory.fits for one in found) - len(best):
        table.append(f"  {beaten} more fit, but save neither memory nor time")
    if blocks:
        table.append(f'  largest blocks that compile: model.attention_blocks="{blocks}"')
    return table


def search_columns(one: Rehearsal) -> str:
    """Return what was tried, and the memory that it takes."""
    return (
        f"  {mesh_name(one.mesh):<24}{one.cfg.model.remat:<34}"
        f"{one.cfg.train.accumulation_steps:>6}{one.memory.total / GIB:>8.2f}"
    )


def pareto(found: list[Rehearsal]) -> list[Rehearsal]:
    """Return those that fit and that no other beats in memory and time, fastest first."""
    fitting = [one for one in found if one.memory.fits]
    fitting.sort(key=lambda one: (one.roofline.seconds, one.memory.total))
    best: list[Rehearsal] = []
    for one in fitting:
        if not best or one.memory.total < best[-1].memory.total:
            best.append(one)
    return best


def rehearsal_dict(name: str, target: Target, one: Rehearsal) -> dict[str, Any]:
    """Return all of a rehearsal as plain data: bytes, FLOPs and seconds."""
    memory, bound = one.memory, one.roofline
    known = memory.compiled
    return {
        "experiment": name,
        "topology": target.topology.name,
        "slices": target.topology.slices,
        "devices": target.topology.count,
        "chip": target.topology.chip._asdict(),
        "fake_devices": target.fake,
        "note": target.note,
        "mesh": one.mesh,
        "num_params": one.num_params,
        "memory": memory._asdict() | {"total": memory.total, "fits": memory.fits},
        "flops": one.flops._asdict() | {"difference": one.flops.difference},
        "collectives": [row._asdict() for row in one.traffic] if known else None,
        "unknown_loops": one.unknown_loops,
        "roofline": bound._asdict() | {"seconds": bound.seconds, "bound": bound.bound}
        if known else None,
        "compile_seconds": round(one.compile_seconds, 1),
        "config": to_dict(one.cfg),
    }  # fmt: skip
