"""Where in the steps each layer of a network changes from one adapter to another, by the rule of K-LoRA."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...bases import components, family
from ...core.adapter import LowRank
from ...core.errors import FoldError, UserError
from ...core.slot import Slot, slot_of, walk
from ...core.strength_schedule import ByPart
from ...core.weight_change import Change, change_of, serves

if TYPE_CHECKING:
    from ..adapters import Adapters

_RISE, _START = 1.5, 0.5  # alpha and beta of the paper: the style's weight goes from 0.5 to 2 over the steps
_FAR = 3  # times the mean: a ratio of a layer above is left out of the mean
_NEVER, _ALWAYS = 0.0, 2.0  # points at which the first adapter has no step, and all
_ROWS = 1024  # of a change that are multiplied out at once


@dataclass(frozen=True)
class Switching:
    """Where layers change from the one adapter to the other.

    Attributes:
        layers: The point of the steps by layer, as strengths name it: at 0 or below the second adapter has all steps, above
            1 the first.
        encoders: The components that run before the steps, and that both adapters change.
        network: The component that the layers are of.
    """

    layers: Mapping[str, float]
    encoders: tuple[str, ...]
    network: str

    def between(self, content: ByPart, style: ByPart) -> "Switching":
        """Give the other all steps where one of both is off, as blocks and components of a strength say.

        Args:
            content: How much of the first adapter.
            style: How much of the second.

        Returns:
            The points, and the components in which both act.
        """
        names = list(self.layers)
        first, second = (amount.on(self.network, names) for amount in (content, style))
        layers = {
            layer: _NEVER if not first[layer] else _ALWAYS if not second[layer] else place
            for layer, place in self.layers.items()
        }
        parts = [amount.components for amount in (content, style)]
        carriers = tuple(one for one in self.encoders if all(own.get(one, 1.0) for own in parts))
        return replace(self, layers=layers, encoders=carriers)

    @property
    def mean(self) -> float:
        """The share of the steps that the first adapter has, over layers."""
        return mean(min(1.0, max(0.0, place)) for place in self.layers.values())


@dataclass(frozen=True)
class Largest:
    """Numbers of a change of a weight.

    Attributes:
        top: The sum of the largest magnitudes.
        whole: The sum of all magnitudes.
    """

    top: float
    whole: float


@torch.no_grad()
def measured(adapters: "Adapters", content: str, style: str) -> Switching:
    """Find out where each layer of the network that denoises changes from the content to the style.

    With S the sum of the K largest magnitudes of a change, K the product of both ranks, and gamma the mean over layers of
    sum|content| / sum|style| (without those of three times the mean), the rule takes the content at progress t (0 to 1) of
    the steps where ``S_content / gamma > S_style (1.5 t + 0.5)``, and else the style. So it is one point for each layer:
    ``t = (S_content / (gamma S_style) - 0.5) / 1.5``. The published code counts calls of layers for t, which holds for one
    number of steps alone; here t is how far the steps are.

    Args:
        adapters: Those on the base.
        content: The name of the first.
        style: The name of the second.

    Returns:
        The points, of layers that have a strength together the median.

    Raises:
        UserError: No layer of the network has its weight changed by both.
    """
    parts = components(adapters.pipe)
    network = next(name for name in parts if family.role_of(name) == "denoiser")
    both: dict[str, list[tuple[Largest, Largest]]] = {}
    for path, module in walk(parts[network]):
        slot = slot_of(module)
        first, second = (None if slot is None else _change(slot, module, name, path) for name in (content, style))
        if slot is None or first is None or second is None:
            continue
        number = _rank(first) * _rank(second)
        pair = largest(first, number), largest(second, number)
        if pair[1].top:  # a style that was never trained there has no share
            both.setdefault(slot.strengths.blocks[slot.block], []).append(pair)
    if not both:
        raise UserError(
            f"--compose k-lora chooses at each layer between {content!r} and {style!r}, and there is none whose weight both"
            " change; add them instead"
        )
    gamma = _gamma([first.whole / second.whole for pairs in both.values() for first, second in pairs])
    places = {name: median(_place(first, second, gamma) for first, second in pairs) for name, pairs in both.items()}
    carriers = [name for name, part in parts.items() if name != network and _carries(part, content, style)]
    return Switching(places, tuple(carriers), network)


def _place(content: Largest, style: Largest, gamma: float) -> float:
    return (content.top / (gamma * style.top) - _START) / _RISE if gamma else 0.0


def _gamma(ratios: list[float]) -> float:
    whole = mean(ratios)
    return mean(kept) if (kept := [ratio for ratio in ratios if ratio < _FAR * whole]) else whole


def largest(change: Change, number: int) -> Largest:
    """Sum up the largest magnitudes of a change of a weight, of which a few rows are multiplied out at a time.

    Args:
        change: The change.
        number: How many are taken.

    Returns:
        Their sum, and that of all.
    """
    kept, whole = torch.zeros(0), 0.0
    for rows in _rows(change):
        magnitudes = rows.abs().flatten()
        whole += float(magnitudes.sum(dtype=torch.float64))
        magnitudes = magnitudes.topk(min(number, len(magnitudes)), sorted=False).values
        kept = torch.cat([kept.to(magnitudes.device), magnitudes])
        kept = kept.topk(min(number, len(kept)), sorted=False).values
    return Largest(float(kept.sum(dtype=torch.float64)), whole)


def _rows(change: Change) -> Iterator[Tensor]:
    """The change as a matrix, some rows at a time."""
    if change.pair is not None:
        down = change.pair.down.float()
        yield from (up.float() @ down for up in change.pair.up.split(_ROWS))
    elif (matrix := change.matrix()) is not None:
        yield from matrix.float().split(_ROWS)


def _rank(change: Change) -> int:
    if change.pair is not None:
        return len(change.pair.down)
    matrix = change.matrix()
    return 1 if matrix is None else min(matrix.shape)


def _change(slot: Slot, module: nn.Module, name: str, path: str) -> Change | None:
    """What an adapter changes of a weight; None where it changes none."""
    if name not in slot.adapters.names():
        return None
    stored = slot.adapters.stored(name)
    if stored is not None and serves(module):  # what a file holds is read as it is: a built adapter is slower to exchange
        down, up, scale = stored.matrices()
        device = slot.strengths.values.device
        return Change(LowRank(down.to(device).float().flatten(1) * scale, up.to(device).float()))
    try:
        change = change_of(slot.adapters[name], module, path)
    except (FoldError, UserError):
        return None
    return change if change.changes_weight else None


def _carries(part: nn.Module, *names: str) -> bool:
    slots = [slot for _, module in walk(part) if (slot := slot_of(module)) is not None]
    return all(any(name in slot.adapters.names() for slot in slots) for name in names)
