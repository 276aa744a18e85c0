"""In: configs. Out: in words and numbers, how a learning rate depends on the length of a run.

No jax here: whether a run can be resumed with another length is known before a backend starts.
"""

from nanojaxgpt.config.sections import Config


def decay_begin(cfg: Config) -> int:
    """Return the number of steps before the decay of the schedule wsd, a whole number."""
    return round(cfg.train.num_steps * (1 - cfg.optim.decay_fraction))


def warmup_warning(cfg: Config) -> str:
    """Return a warning if the warm-up does not end within the run, else ""."""
    warmup, steps = cfg.optim.warmup_steps, cfg.train.num_steps
    if warmup < steps:
        return ""
    return (
        f"WARNING: optim.warmup_steps={warmup} is not below train.num_steps={steps}: the warm-up "
        f"ends at {steps / (warmup + 1):.0%} of optim.learning_rate; lower optim.warmup_steps"
    )


# What may change when a run is resumed, where its learning rates so far stay what they were.
LENGTH = {
    "constant": {"train.num_steps"},
    "inverse_sqrt": {"train.num_steps"},
    "wsd": {"train.num_steps", "optim.decay_fraction", "optim.final_fraction"},
}


def length_problem(old: Config, new: Config, fields: set[str], step: int) -> str:
    """Return why a run that is at `step` can't be resumed with other `fields`; "" where it can.

    It can where each update so far had the learning rate that the new config gives.
    """
    schedule = old.optim.schedule
    if fields <= LENGTH["wsd"] and schedule not in LENGTH:
        return (
            f"with optim.schedule={schedule} the learning rates so far would have differed; "
            "constant, inverse_sqrt, and wsd before its decay can be extended"
        )
    if not fields <= LENGTH.get(schedule, set()):
        return "a run keeps the config that it started with"
    if new.train.num_steps < step:
        return f"step {step} is saved already: set train.num_steps to at least {step}"
    begin = min(decay_begin(old), decay_begin(new))
    if schedule == "wsd" and begin < step:
        return (
            f"the decay of wsd begins after step {begin}, and step {step} is saved; branch from "
            f"a checkpoint of step {begin} or before, with init.from_run, --config.init.state=all "
            "and --config.init.step=STEP in a new --run"
        )
    return ""
