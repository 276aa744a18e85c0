"""In: the arguments of `nanojaxgpt rehearse`. Out: a train step's memory, traffic and bounds."""

import json
from pathlib import Path

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, integer, open_experiment
from nanojaxgpt.chips import parse_topology
from nanojaxgpt.config import with_fields
from nanojaxgpt.console import warn
from nanojaxgpt.errors import MemoryExceeded


def rehearse(arguments: list[str]) -> None:
    """Compile the train step for hardware you don't have; print its memory, traffic and bounds.

    The chips: v4, v5e, v5p, v6e with a torus (v5e:16x16), a100, h100, h200, cpu with a number.
    Raises MemoryExceeded (exit 6) where the step does not fit.
    """
    options = {
        "topology": {"default": "", "help": "the hardware: v5e:16x16, v5p:4x4x4, h100:8, cpu:8"},
        "slices": {"default": 1, "type": integer(1), "help": "TPU slices; default: 1"},
        "mesh": {
            "default": "config",
            "choices": ("config", "auto"),
            "help": "auto: try meshes, remat policies, micro-batches and splash's blocks; default: "
            "those of the config",
        },
        "json": {"default": "", "help": "also write the results to this file"},
    }
    parsed, cfg = open_experiment("rehearse", rehearse.__doc__, arguments, options)
    if parsed.json:
        rundir.check_file("--json", Path(parsed.json))
    topology = parse_topology(parsed.topology, parsed.slices)
    from nanojaxgpt.data.loader import prepare_data, resolve
    from nanojaxgpt.model.config import complete
    from nanojaxgpt.rehearse import report, search, step, targets
    from nanojaxgpt.sharding import compute_dtype

    target = targets.open_target(topology)
    dtype = compute_dtype(cfg.model.compute_dtype, topology.chip.platform)
    cfg = with_fields(cfg, {"model.compute_dtype": dtype})
    if cfg.model.vocab_size:
        job_cfg = complete(cfg)
    else:
        data = prepare_data(cfg, warn, Path(parsed.run) if parsed.run else None)
        job_cfg = resolve(cfg, data)
    name = parsed.config or parsed.run
    if parsed.mesh == "auto":
        found = search.search(job_cfg, target, warn)
        blocks = search.largest_blocks(found[0].cfg, target)
        lines = report.search_lines(name, target, found, blocks)
    else:
        found = [step.rehearse_step(job_cfg, target)]
        lines = report.lines(name, target, found[0])
    print("\n".join(lines))
    if parsed.json:
        described = [report.rehearsal_dict(name, target, one) for one in found]
        rundir.write_text(Path(parsed.json), json.dumps(described, indent=2) + "\n")
    if not any(one.memory.fits for one in found):
        raise MemoryExceeded(f"the step does not fit the memory of {topology.name}")


COMMANDS = {
    "rehearse": Command(
        rehearse,
        "--config=EXPERIMENT.py --topology=v5e:4x4",
        "memory and speed on hardware you don't have",
        order=9,
    )
}
