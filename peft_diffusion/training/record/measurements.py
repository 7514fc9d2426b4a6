"""What the measurements of a run say: when it was best, and whether it went on for too long. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.02
"""How far the loss on what is kept apart may stand above its lowest before a run is called over-trained."""


@dataclass(frozen=True)
class Measurement:
    """One measurement of a run; None is what was not measured.

    Attributes:
        step: Steps done.
        unseen: The loss on what is kept apart, on fixed noise.
        seen: That on a few of those that are trained on.
        leakage: How far the base's answers moved that the adapter should leave alone.
        memorisation: By what share the loss on training examples fell further, since step 0, than that on unseen ones: 0
            where both fell alike, near 1 where only what was seen is known.
    """

    step: int
    unseen: float | None
    seen: float | None
    leakage: float | None
    memorisation: float | None


def measurements(metrics: Iterable[Mapping[str, Any]]) -> list[Measurement]:
    """Read the measurements of a run.

    Args:
        metrics: The lines of its ``metrics.jsonl``.

    Returns:
        In the order of their steps.
    """
    found: dict[int, dict[str, float]] = {}
    for line in metrics:
        for name in ("held_out_loss", "seen_loss", "leakage"):
            if name in line:
                found.setdefault(line["step"], {})[name] = float(line[name])
    first = found.get(0, {})
    return [
        Measurement(step, own.get("held_out_loss"), own.get("seen_loss"), own.get("leakage"), _memorisation(own, first))
        for step, own in sorted(found.items())
    ]


def _memorisation(now: Mapping[str, float], first: Mapping[str, float]) -> float | None:
    pairs = [(one.get("seen_loss", 0.0), one.get("held_out_loss", 0.0)) for one in (first, now)]
    return memorisation(*pairs) if all(loss > 0 for pair in pairs for loss in pair) else None


def best_step(unseen: Mapping[int, float]) -> int | None:
    """Find the step of the lowest loss after the start, the earliest of equal ones.

    Args:
        unseen: Losses on what is held out, by step.

    Returns:
        The step; None where nothing was measured.
    """
    return min((step for step in sorted(unseen) if step), key=lambda step: unseen[step], default=None)


def verdict(measured: Iterable[Measurement]) -> str | None:
    """Say of a run that it went on for too long, or too fast.

    Args:
        measured: Its measurements.

    Returns:
        A line; None for a run that did not.
    """
    known = {one.step: (one.unseen, one.seen) for one in measured if one.unseen is not None}
    best = best_step({step: unseen for step, (unseen, _) in known.items()})
    if best is None:
        return None
    (lowest, seen_then), (now, seen_now) = known[best], known[max(known)]
    if now <= (1 + TOLERANCE) * lowest:
        return None
    rose = f"the loss on what is kept apart rose from {lowest:.4f} to {now:.4f} ({now / lowest - 1:+.0%})"
    if seen_then is not None and seen_now is not None and seen_now > (1 + TOLERANCE) * seen_then:
        return f"unstable since step {best}: {rose}, and that on training examples rose too; lower the learning rate"
    return f"over-trained since step {best}: {rose}, while that on training examples did not; train fewer steps"


def memorisation(first: tuple[float, float], now: tuple[float, float]) -> float:
    """Compute how much further the loss fell on what is trained on than on what is not, as a share of the latter.

    Args:
        first: The losses on what was seen and on what was not, at the start, above 0.
        now: The same, now.

    Returns:
        0 where both fell alike, near 1 where only what was seen is known.
    """
    return 1 - (now[0] / first[0]) / (now[1] / first[1])
