"""The course of the learning rate."""

import math

from ..settings.choices import Scheduler


def rate(scheduler: Scheduler, step: int, steps: int, warmup: int) -> float:
    """Compute the factor of the learning rate at a step.

    It rises in a line over the warm-up, never starting at 0; then it stays, or falls to reach 0 at the end.

    Args:
        scheduler: constant, cosine or linear.
        step: From 0 to ``steps - 1``.
        steps: Those of the run.
        warmup: Those of the warm-up.

    Returns:
        From 0 to 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if scheduler == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if scheduler == "cosine" else 1 - done
