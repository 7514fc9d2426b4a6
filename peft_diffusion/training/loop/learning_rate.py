"""The course of the learning rate."""

import math

from ..settings.choices import Scheduler


def rate(scheduler: Scheduler, step: int, steps: int, warmup: int) -> float:
    """The factor (0 to 1) of the learning rate at a step from 0 to ``steps - 1``.

    It rises in a line over ``warmup`` steps, never starting at 0; then it stays, or falls to reach 0 at ``steps``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if scheduler == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if scheduler == "cosine" else 1 - done
