"""In: the text of a compiled HLO module. Out: its collectives, their bytes, groups and repetitions.

Read from the text because no public interface gives it: one instruction a line, one computation
between braces. Groups hold partition numbers, which are places in `mesh.devices.flat`.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
    """One collective instruction; `size` is in bytes, of the whole array on its larger side."""

    kind: str
    size: float
    groups: Groups
    times: int  # a step, with the trip counts of the loops around it

    @property
    def sent(self) -> float:
        """Return the bytes that a device sends in a step, by ring algorithms."""
        return self.times * ring_bytes(self.kind, self.size, len(self.groups[0]))


class Program(NamedTuple):
    """The collectives of a module, and how many loops hide how often they run (counted once)."""

    collectives: tuple[Collective, ...]
    unknown_loops: int


class Instruction(NamedTuple):
    """One line: `%name = result opcode(rest`."""

    name: str
    result: str
    opcode: str
    rest: str


def ring_bytes(kind: str, size: float, group: int) -> float:
    """Return the bytes that each of `group` devices sends for one collective over `size` bytes."""
    if kind == "collective-permute":
        return size
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|called_computations)=\{?(%[^,})]+(?:, ?%[^,})]+)*)"
)


def parse_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if begin := COMPUTATION.match(line):
            current = begin[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current and (found := INSTRUCTION.match(line)):
            computations[current].append(Instruction(*found.groups()))
    return computations, entry


def read_collectives(text: str) -> Program:
    """Return the collectives of a compiled module.

    Every branch of a conditional counts. What XLA splits into the fusions of a start, a middle and
    an end keeps one channel: within one computation it counts once.
    """
    computations, entry = parse_computations(text)
    partitions = int(next(iter(re.findall(r"num_partitions=(\d+)", text)), "1"))
    times: collections.Counter[tuple[str, int]] = collections.Counter()
    unknown = set()

    def visit(name: str, repeats: int, begun: set[tuple[str, str]] | None = None) -> None:
        """Count the computation; `begun`, in a fusion, are what its neighbours already hold."""
        parts: set[tuple[str, str]] = set()
        for index, line in enumerate(computations.get(name, ())):
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS or between_slices(line):
                channel = re.search(r"channel_id=(\d+)", line.rest)
                part = (kind, channel[1] if channel else line.name)
                if begun is None or part not in begun:
                    times[name, index] += repeats
                if begun is not None:
                    begun.add(part)
            elif line.opcode == "while":
                body = find(r"body=%?([\w.-]+)", line.rest)
                trips = trip_count(line, computations[name], computations)
                if not trips:
                    unknown.add(body)
                visit(body, repeats * (trips or 1))
            for called in CALLED.findall(line.rest):
                for inner in re.findall(r"%([\w.-]+)", called):
                    visit(inner, repeats, parts if line.opcode == "fusion" else None)

    visit(entry, 1)
    found = [
        read_collective(computations[name][index], name, repeats, partitions)
        for (name, index), repeats in times.items()
    ]
    return Program(tuple(one for one in found if len(one.groups[0]) > 1), len(unknown))


def between_slices(line: Instruction) -> str:
    """Return the kind of collective that a send between slices is; "" for all else.

    libtpu compiles one slice's program, which hands such arrays to the hosts: partition i of
    every slice then works with its like.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest)
    if not found or line.opcode != "send":
        return ""
    kind = found[1].lower().replace("_", "-")
    return kind if kind in KINDS else "collective-permute"


def trip_count(
    loop: Instruction, around: list[Instruction], computations: dict[str, list[Instruction]]
) -> int:
    """Return how often a while loop, in the computation `around`, runs; 0 if the text hides it.

    XLA writes known_trip_count on some backends; else a counter, which begins at a constant, is
    compared with another and goes up by a third.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    names = (find(rf"{part}=%?([\w.-]+)", loop.rest) for part in ("condition", "body"))
    condition, body = (computations.get(name, []) for name in names)
    bounds = constants(condition)
    if len(bounds) != 1 or not any("direction=LT" in i.rest for i in condition):
        return 0
    counters = [re.search(r"index=(\d+)", i.rest) for i in condition]
    counter = next((int(found[1]) for found in counters if found), 0)
    left = next(iter(bounds.values())) - start_value(around, operands(loop)[0], counter)
    return -(-left // stride(body, counter))


def constants(computation: list[Instruction]) -> dict[str, int]:
    """Return the whole scalar constants of a computation by name."""
    return {
        i.name: int(found[1])
        for i in computation
        if i.opcode == "constant"
        and re.match(r"[su](?:32|64)\[\]", i.result)
        and (found := re.match(r"(\d+)\)", i.rest))
    }


def element(computation: list[Instruction], state: str, index: int) -> Instruction | None:
    """Return the source of element `index` of the tuple `state`, behind copies, or None."""
    lines = {i.name: i for i in computation}
    names = operands(lines[state]) if state in lines and lines[state].opcode == "tuple" else []
    found = lines.get(names[index]) if index < len(names) else None
    while found and found.opcode == "copy":
        found = lines.get(operands(found)[0])
    return found


def start_value(around: list[Instruction], state: str, counter: int) -> int:
    """Return where element `counter` of a loop's first state begins; 0 if not plain.

    At 1 where libtpu has drawn the first pass before the loop.
    """
    found = element(around, state, counter)
    return constants(around).get(found.name, 0) if found else 0


def stride(body: list[Instruction], counter: int) -> int:
    """Return by how much a loop's body raises element `counter` of its state; 1 if not plain."""
    raised = element(body, body[-1].name, counter) if body else None
    if not raised or raised.opcode != "add":
        return 1
    numbers = constants(body)
    return next((numbers[name] for name in operands(raised) if numbers.get(name)), 1)


def operands(line: Instruction) -> list[str]:
    """Return the names that an instruction is given."""
    return re.findall(r"%([\w.-]+)", line.rest.partition(")")[0])


def read_collective(line: Instruction, inside: str, times: int, partitions: int) -> Collective:
    """Return one instruction's collective; `inside` is the name of its computation."""
    if kind := between_slices(line):
        slices = len(find(r'megascale_target="\{([\d,]*)\}', line.rest).split(","))
        size = array_bytes(line.result) * (slices if kind == "all-gather" else 1)
        across = tuple(range(0, slices * partitions, partitions))
        return Collective(kind, size, (across,), times)
    kind, groups = line.opcode.removesuffix("-start"), read_groups(line.rest, partitions)
    size, group = array_bytes(line.result), len(groups[0])
    if line.opcode.endswith("-start") and kind in ("all-gather", "reduce-scatter"):
        size *= group / (group + 1)  # the result is (what goes in, what comes out)
    elif line.opcode == "collective-permute-start":
        size /= 2
    elif kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as libtpu writes one: a fusion of all-reduce and slice
    return Collective(kind, size, groups, times)


def find(pattern: str, text: str) -> str:
    """Return the first group of a pattern that XLA's text must contain. Raises ValueError."""
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"XLA's text has changed: no {pattern} in {text[:200]}")
    return found[1]


BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}


def array_bytes(text: str) -> float:
    """Return the bytes of a shape, `bf16[8,128]{1,0}`, or of all in a tuple but its scalars u32."""
    total = 0.0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        if kind == "token" or (kind == "u32" and not sizes):
            continue  # the state of an asynchronous operation
        each = BYTES.get(kind) or int(find(r"(\d+)", kind)) / 8
        total += each * math.prod(map(int, filter(None, sizes.split(","))))
    return total


def iota_groups(text: str) -> np.ndarray:
    """Return the numbers of `[2,4]<=[4,2]T(1,0)`, or of `[4,2]T(1,0)` in a row, as an array."""
    shape, _, rest = text.rpartition("<=")
    sizes, _, order = rest.partition("T")
    dims = [int(n) for n in re.findall(r"\d+", sizes)]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if order:
        ids = ids.transpose([int(n) for n in re.findall(r"\d+", order)])
    return ids.reshape([int(n) for n in re.findall(r"\d+", shape)] if shape else -1)


def read_groups(text: str, partitions: int) -> Groups:
    """Return the device groups in an instruction's attributes, in each of XLA's four forms."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return chains(_lists(pairs[1]))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))? \{([^}]*)\}",
        text,
    ):
        return _mesh_groups(*mesh.groups())
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return tuple(map(tuple, iota_groups(iota[1]).tolist()))
    lists = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    return _lists(lists[1]) if lists else (tuple(range(partitions)),)


def chains(pairs: Groups) -> Groups:
    """Return the rings or chains that (source, target) pairs make, each as one group."""
    after = {pair[0]: pair[1] for pair in pairs}
    starts = [source for source in after if source not in set(after.values())]
    found, seen = [], set()
    for start in starts + list(after):
        chain: list[int] = []
        at = start
        while at not in seen:
            chain.append(at)
            seen.add(at)
            at = after.get(at, at)
        found += [tuple(chain)] if chain else []
    return tuple(found)


def _lists(text: str) -> Groups:
    return tuple(tuple(map(int, part.split(","))) for part in re.findall(r"\{([\d,]+)\}", text))


def _mesh_groups(axes: str, devices: str | None, chosen: str) -> Groups:
    """Return the groups of `mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`.

    A part of an axis is written 'a':(before)size.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    count = math.prod(sizes.values())
    if not devices:
        ids = np.arange(count)
    elif devices.startswith("["):
        ids = iota_groups(devices)
    else:
        ids = np.array([int(n) for n in devices.split(",")])
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    inside = {name: (int(before), int(size)) for name, before, size in parts if before}
    whole = {name for name, before, _ in parts if not before}
    shape, picked = [], []
    for name, size in sizes.items():
        before, part = inside.get(name, (1, size))
        for length, take in ((before, 0), (part, name in inside or name in whole),
                             (size // before // part, 0)):  # fmt: skip
            picked += [len(shape)] if take else []
            shape.append(length)
    rest = [i for i in range(len(shape)) if i not in picked]
    group = math.prod(shape[i] for i in picked)
    return tuple(
        map(tuple, ids.reshape(shape).transpose(rest + picked).reshape(-1, group).tolist())
    )
