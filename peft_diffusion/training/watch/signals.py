"""When to stop: what is measured beside the loss on what is kept apart, and what it says."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core import site
from ...core.adapter import Adapter, parts_of
from ...core.errors import FoldError, UserError
from ...core.merge import dense_weight
from ...core.sharded import whole
from ..record.run_record import memorisation
from ..results import Suggestion

TOLERANCE = 0.02
"""How far the loss on what is kept apart may stand above its lowest before a run is called over-trained."""
_STRENGTHS = (0.5, 0.75, 1.25)  # measured beside 0 and 1, which are known
_ROUNDED = 0.05  # a suggestion is no more precise than this


@dataclass(frozen=True)
class Measured:
    """One measurement of a run. ``unseen`` and ``seen`` are losses on fixed noise; None is what was not measured.

    ``memorisation`` is the share by which the loss on training examples fell further, since step 0, than that on unseen
    ones: 0 where both fell alike, near 1 where only what was seen is known.
    """

    step: int
    unseen: float | None
    seen: float | None
    leakage: float | None
    memorisation: float | None


def measurements(metrics: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """The measurements among the lines of a run's ``metrics.jsonl``, in the order of their steps."""
    found: dict[int, dict[str, float]] = {}
    for line in metrics:
        for name in ("held_out_loss", "seen_loss", "leakage"):
            if name in line:
                found.setdefault(line["step"], {})[name] = float(line[name])
    first = found.get(0, {})
    return [
        Measured(step, own.get("held_out_loss"), own.get("seen_loss"), own.get("leakage"), _memorisation(own, first))
        for step, own in sorted(found.items())
    ]


def _memorisation(now: Mapping[str, float], first: Mapping[str, float]) -> float | None:
    pairs = [(one.get("seen_loss", 0.0), one.get("held_out_loss", 0.0)) for one in (first, now)]
    return memorisation(*pairs) if all(loss > 0 for pair in pairs for loss in pair) else None


def best_step(unseen: Mapping[int, float]) -> int | None:
    """The step of the lowest loss after the start, the earliest of equal ones; None where nothing was measured."""
    return min((step for step in sorted(unseen) if step), key=lambda step: unseen[step], default=None)


def verdict(measured: Iterable[Measured]) -> str | None:
    """A line for a run that went on for too long, or too fast; None for one that did not."""
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


@contextmanager
def at_strength(parts: Iterable[nn.Module], name: str, value: float) -> Iterator[None]:
    """The adapter at a strength; afterwards at 1, at which it is trained."""
    owners = [found for part in parts if (found := site.strengths(part)) is not None and name in found.names]
    try:
        for strengths in owners:
            strengths.write({name: value})
        yield
    finally:
        for strengths in owners:
            strengths.write({name: 1.0})


def suggest(measure: Callable[[float], float], base: float, full: float) -> Suggestion:
    """The strength of the lowest loss. ``base`` and ``full`` are the losses at 0 and 1; ``measure`` gives that of others."""
    losses = {0.0: base, 1.0: full} | {strength: measure(strength) for strength in _STRENGTHS}
    if min(losses, key=lambda strength: losses[strength]) == max(_STRENGTHS):
        losses[1.5] = measure(1.5)
    losses = dict(sorted(losses.items()))
    return Suggestion(_lowest(losses), losses)


def _lowest(losses: Mapping[float, float]) -> float:
    """Where the parabola through the lowest value and its neighbours is lowest, rounded; the value itself at an end."""
    places = list(losses)
    at = min(range(len(places)), key=lambda index: losses[places[index]])
    if at in (0, len(places) - 1):
        return places[at]
    a, b, c = places[at - 1 : at + 2]
    fa, fb, fc = (losses[place] for place in (a, b, c))
    below = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    above = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lowest = b - 0.5 * above / below if below else b
    return round(round(lowest / _ROUNDED) * _ROUNDED, 2)


@torch.no_grad()
def layer_changes(parts: Mapping[str, nn.Module], name: str) -> dict[str, float]:
    """How far each layer moved, by component and path, to five digits.

    The Frobenius norm of the change over that of the weight (of the bias, where only that changes); for a method that
    does not fold, the root mean square of its parameters.
    """
    return {
        f"{component}.{path}": float(f"{_change(adapter):.5g}")
        for component, part in parts.items()
        for path, adapter in site.adapters(part, name).items()
    }


def _change(adapter: Adapter) -> float:
    try:
        weight, bias = _weight_and_bias(adapter.site)
        folded = [part.fold(weight, bias) for part in parts_of(adapter)]
    except (FoldError, UserError):
        return _size(adapter)
    weights = [change for change, _ in folded if change is not None]
    biases = [change for _, change in folded if change is not None]
    if weights:
        return _ratio(sum(weights[1:], weights[0]), weight)
    return _ratio(sum(biases[1:], biases[0]), bias) if biases and bias is not None else _size(adapter)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """In float32. Raises FoldError for what has no weight, such as a whole sublayer."""
    if getattr(module, "weight", None) is None:
        raise FoldError("there is no weight to change")
    bias = getattr(module, "bias", None)
    return dense_weight(module), whole(bias).detach().float() if isinstance(bias, Tensor) else None


def _size(adapter: Adapter) -> float:
    values = [parameter.detach().float() for parameter in adapter.parameters()]
    count = sum(value.numel() for value in values)
    return math.sqrt(sum(float(value.square().sum()) for value in values) / max(1, count))


def _ratio(change: Tensor, of: Tensor) -> float:
    return float(change.float().norm() / of.norm().clamp(min=1e-12))
