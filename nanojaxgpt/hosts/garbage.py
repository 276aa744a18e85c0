"""Python's garbage, collected at set steps of training: on all hosts at once."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_every(steps: int) -> Iterator[Callable[[int], None]]:
    """Give a function to call after each step, which collects garbage at multiples of `steps`.

    Its first call, after the step that compiles, exempts all that exists by then from further
    collections (`gc.freeze`) and turns automatic collection off, which would stop one host or
    another at any step while the rest wait for it. At the end, whatever the reason, both are as
    before. 0 steps leave everything to Python.
    """
    automatic, frozen, started = gc.isenabled(), gc.get_freeze_count(), False

    def after(step: int) -> None:
        nonlocal started
        if not steps:
            return
        if not started:
            started = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % steps == 0:
            gc.collect()

    try:
        yield after
    finally:
        if started and not frozen:  # what others froze stays so
            gc.unfreeze()
        if started and automatic:
            gc.enable()
