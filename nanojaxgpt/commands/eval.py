"""In: the arguments of `nanojaxgpt eval`. Out: the validation loss of a run's checkpoint."""

import json
from pathlib import Path

from nanojaxgpt import config
from nanojaxgpt.arguments import Command, chosen_step, open_run
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError


def evaluate(arguments: list[str]) -> None:
    """Print the validation loss and bits per byte of a run's checkpoint, as JSON.

    With --data=SOURCE, evaluate on all of another source, with the run's own tokenizer.
    """
    about = "evaluate on this source, written as in data.source; default: the validation split"
    parsed, cfg = open_run("eval", evaluate.__doc__, arguments, {"data": {"help": about}})
    if parsed.data:
        # What the run's config says of its own source: which hash it has, how much is looked at.
        own = {"data.sha256": "", "eval.num_batches": "0"}
        cfg = config.override_config(cfg, own | parsed.overrides)
    from nanojaxgpt import language_model, sharding

    run = Path(parsed.run)
    try:
        mesh = sharding.make_mesh(cfg.mesh.given())
    except ConfigError:  # the run's mesh does not fit this machine: one device does
        mesh = None
    model = language_model.open_model(run, cfg, mesh, chosen_step(run, parsed.step), warn)
    found = language_model.evaluate(model, parsed.data, warn)
    source = {"source": parsed.data} if parsed.data else {}
    print(json.dumps({"step": model.step, **source, **found}))


COMMANDS = {
    "eval": Command(evaluate, "RUN [--data=SOURCE]", "validation loss, bits per byte", order=2)
}
