"""In: the arguments of `nanojaxgpt eval`. Out: the validation loss of a run's checkpoint."""

import json
from pathlib import Path
from typing import Any

from nanojaxgpt import config, rundir
from nanojaxgpt.arguments import Command, chosen_step, open_run
from nanojaxgpt.config.sections import Data
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError, DataError


def evaluate(arguments: list[str]) -> None:
    """Print the validation loss and bits per byte of a run's checkpoint, as JSON.

    With --data=SOURCE, evaluate on all of another source, with the run's own tokenizer.
    """
    about = "evaluate on this source, written as in data.source; default: the validation split"
    parsed, cfg = open_run("eval", evaluate.__doc__, arguments, {"data": {"help": about}})
    import jax

    from nanojaxgpt import memory, sharding
    from nanojaxgpt.checkpoint import abstract_params, load_params
    from nanojaxgpt.data.loader import prepare_data
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.model.transformer import Transformer
    from nanojaxgpt.train import make_evaluation

    if parsed.data:
        cfg, data = open_other_data(cfg, parsed)
    else:
        data = prepare_data(cfg, warn, Path(parsed.run))
        rundir.check_identity(Path(parsed.run), data.identity)
    try:
        mesh = sharding.make_mesh(cfg.mesh)
    except ConfigError:  # the run's mesh does not fit this machine: one device does
        mesh = sharding.make_mesh({}, jax.devices()[:1])
    run, model_cfg = Path(parsed.run), ModelConfig(**cfg.model)
    lower = memory.EVALUATION_ADVICE
    with memory.explained("the evaluation", mesh, lambda: lower), jax.set_mesh(mesh):
        memory.check_model("the evaluation", cfg, mesh, 0, lower)
        held = {"parameters": abstract_params(model_cfg, mesh)}
        run_evaluation = make_evaluation(cfg, data, mesh, Transformer(model_cfg), held)
        step, params = load_params(run, model_cfg, mesh, chosen_step(run, parsed.step), warn)
        found = run_evaluation(params)
    if not found["tokens"] and parsed.data:
        raise DataError(f"{parsed.data} has nothing to score: it is shorter than two tokens")
    if not found["tokens"]:
        raise DataError(
            f"{run} has no held-out data to validate on; set data.validation_fraction, "
            "data.validation_documents or data.validation_source (for a task: train_fraction), "
            "and train again"
        )
    source = {"source": parsed.data} if parsed.data else {}
    print(json.dumps({"step": step, **source, **found}))


def open_other_data(cfg: Any, parsed: Any) -> tuple[Any, Any]:
    """Return the config and the data to evaluate the source --data of `eval` on, all of it."""
    from nanojaxgpt.data.loader import load_run_tokenizer, open_source

    # What the run's config says of its own source: which hash it has, how much is looked at.
    own = {"data.sha256": "", "eval.num_batches": "0"}
    cfg = config.override_config(cfg, own | parsed.overrides)
    tokenizer = load_run_tokenizer(Path(parsed.run), warn)
    data = Data(**cfg.data)
    return cfg, open_source(parsed.data, tokenizer, data, config.cache_dir(cfg), warn)


COMMANDS = {
    "eval": Command(evaluate, "RUN [--data=SOURCE]", "validation loss, bits per byte", order=2)
}
