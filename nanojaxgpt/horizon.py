"""In: configs. Out: in words and numbers, how a learning rate depends on the length of a run.

No jax here: whether a run can go on with another length is answered before a backend starts.
"""

from ml_collections import ConfigDict


def decay_begin(cfg: ConfigDict) -> int:
    """Return the number of steps before the decay of the schedule wsd, a whole number."""
    return round(cfg.train.num_steps * (1 - cfg.optim.decay_fraction))


def warmup_warning(cfg: ConfigDict) -> str:
    """Return what to tell of a warm-up that does not end within the run; "" where it does."""
    warmup, steps = cfg.optim.warmup_steps, cfg.train.num_steps
    if warmup < steps:
        return ""
    return (
        f"WARNING: optim.warmup_steps={warmup} is not below train.num_steps={steps}: the warm-up "
        f"ends at {steps / (warmup + 1):.0%} of optim.learning_rate; lower optim.warmup_steps"
    )
