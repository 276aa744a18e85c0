"""In: the arguments of `nanojaxgpt eval`. Out: the loss of a model."""

import json

from nanojaxgpt import config
from nanojaxgpt.arguments import Command, chosen_step, open_model_config
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError


def evaluate(arguments: list[str]) -> None:
    """Print the validation loss and bits per byte of a model, as JSON.

    Of a run over its validation split; with --data=SOURCE on all of another source, with the
    model's own tokenizer.
    """
    about = "evaluate on this source, written as in data.source; default: the validation split"
    parsed, cfg = open_model_config("eval", evaluate.__doc__, arguments, {"data": {"help": about}})
    if parsed.data:
        # What the run's config says of its own source: which hash it has, how much is looked at.
        own = {"data.sha256": "", "eval.num_batches": "0"}
        cfg = config.override_config(cfg, own | parsed.overrides)
    from nanojaxgpt import language_model, sharding

    try:
        mesh = sharding.make_mesh(cfg.mesh.given())
    except ConfigError:  # the run's mesh does not fit this machine: one device does
        mesh = None
    model = language_model.open_model(parsed.source, cfg, mesh, chosen_step(parsed), warn)
    found = language_model.evaluate(model, parsed.data, warn)
    source = {"source": parsed.data} if parsed.data else {}
    print(json.dumps({"step": model.step, **source, **found}))


COMMANDS = {
    "eval": Command(evaluate, "MODEL [--data=SOURCE]", "validation loss, bits per byte", order=2)
}
