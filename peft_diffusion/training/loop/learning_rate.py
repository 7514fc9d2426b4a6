"""The course of the learning rate."""

import math
from dataclasses import dataclass

from ..settings.choices import Scheduler


@dataclass(frozen=True)
class Shape:
    """What some courses take besides their name.

    Attributes:
        cycles: Cosines, each from the full rate on, of cosine-with-restarts (Loshchilov and Hutter 2017,
            https://arxiv.org/abs/1608.03983, without growing cycles).
        power: Of polynomial.
        decay: Share of the run in which warmup-stable-decay falls in a line (Hu et al. 2024,
            https://arxiv.org/abs/2404.06395).
    """

    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2


def rate(scheduler: Scheduler, step: int, steps: int, warmup: int, shape: Shape = Shape()) -> float:
    """Compute the factor of the learning rate at a step.

    It rises in a line over the warm-up, never starting at 0; then it stays, or falls to reach 0 at the end.

    Args:
        scheduler: The course.
        step: From 0 to ``steps - 1``.
        steps: Those of the run.
        warmup: Those of the warm-up.
        shape: What the course takes besides.

    Returns:
        From 0 to 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    match scheduler:
        case "constant":
            return 1.0
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case "cosine-with-restarts":
            return (1 + math.cos(math.pi * (shape.cycles * done % 1.0))) / 2
        case "polynomial":
            return float((1 - done) ** shape.power)
        case "warmup-stable-decay":
            return min(1.0, (steps - step) / max(1.0, shape.decay * steps))
    return 1 - done
