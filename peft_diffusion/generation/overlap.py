"""What adapters on a base change and share: the size of their changes at each layer, and for each pair the overlap."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..core import site as sites
from ..core import targets
from ..core.adapter import LowRank
from ..core.errors import FoldError, UserError
from ..core.reduction import spanned
from ..core.registry import Registry
from ..core.weight_change import Change, change_of
from .calibration import Calibration, Suggestion
from .on_activations import Acting, Conflict


@dataclass(frozen=True)
class Size:
    """What an adapter changes at a layer, at strength 1.

    Attributes:
        adapter: Its name.
        component: The component.
        block: The block of the component.
        site: The layer.
        change: The Frobenius norm of the change of the weight.
        relative: That against the norm of the weight; None where the weight is packed in fewer bits.
    """

    adapter: str
    component: str
    block: str
    site: str
    change: float
    relative: float | None


@dataclass(frozen=True)
class PairOverlap:
    """How much the changes of two adapters overlap at a layer that both change.

    Attributes:
        first: The one.
        second: The other.
        component: The component.
        block: The block of the component.
        site: The layer.
        cosine: Of the two changes as vectors, from -1 (they undo each other) through 0 (they add up apart) to 1 (the same).
        reads: How much of the smaller space of inputs that a change reads lies in the other's, from 0 to 1; None where a
            change is not of low rank.
        writes: The same of the outputs that they write to.
    """

    first: str
    second: str
    component: str
    block: str
    site: str
    cosine: float
    reads: float | None
    writes: float | None


@dataclass(frozen=True)
class BlendReport:
    """What adapters change, and what of it they share.

    Attributes:
        sizes: Each adapter at each layer whose weight it changes.
        overlaps: Each pair at each layer that both change.
        effects: What each changes of the network's predictions: see `Calibration.effects`; empty without prompts.
        even: Shares of strength at which all change as much, together 1: of predictions, and without prompts of the weights.
        suggested: Shares of strength at which adapters together predict nearest to what each does alone of its own prompts:
            see `calibration.suggested`; the same as ``even`` without prompts. By real pictures, those at which the losses of
            these rise least: see `on_pictures.suggested_on_pictures`.
        excess: The loss that they cost each other at ``suggested``, by real pictures as a share of what the base loses on
            those of each, summed; None without prompts.
        excess_whole: The same at whole strengths.
        acting: What each adds to the outputs of layers; empty without prompts.
        conflicts: How what each pair adds lies to each other; empty without prompts.
        others: Adapters with layers where they change no weight, as a bottleneck or learned words, by how many there are.
    """

    sizes: tuple[Size, ...]
    overlaps: tuple[PairOverlap, ...]
    effects: Mapping[str, float]
    even: Mapping[str, float]
    suggested: Mapping[str, float]
    excess: float | None
    excess_whole: float | None
    acting: tuple[Acting, ...]
    conflicts: tuple[Conflict, ...]
    others: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Give all of it as JSON has it, with the means of `by_block` beside the layers."""
        return asdict(self) | {"blocks": [asdict(one) for one in self.by_block()]}

    def by_block(self) -> "list[Block]":
        """Sum up the layers of each block, in their order.

        Returns:
            One for each adapter and block, and one for each pair and block.
        """
        own: dict[tuple[str, str, str], tuple[list[Size], list[Acting]]] = {}
        for size in self.sizes:
            own.setdefault((size.adapter, size.component, size.block), ([], []))[0].append(size)
        for one in self.acting:
            own.setdefault((one.adapter, one.component, one.block), ([], []))[1].append(one)
        both: dict[tuple[str, str, str], tuple[list[PairOverlap], list[Conflict]]] = {}
        for overlap in self.overlaps:
            pair = f"{overlap.first} x {overlap.second}"
            both.setdefault((pair, overlap.component, overlap.block), ([], []))[0].append(overlap)
        for clash in self.conflicts:
            both.setdefault((f"{clash.first} x {clash.second}", clash.component, clash.block), ([], []))[1].append(clash)
        rows = [
            Block(
                *key,
                change=math.hypot(*(size.change for size in sizes)) if sizes else None,
                relative=_mean([size.relative for size in sizes]),
                acting=_mean([one.relative for one in acts]),
            )
            for key, (sizes, acts) in own.items()
        ]
        for key, (overlaps, clashes) in both.items():
            cosine, reads, writes = (_mean([getattr(one, n) for one in overlaps]) for n in ("cosine", "reads", "writes"))
            conflict = _mean([clash.cosine for clash in clashes])
            rows.append(Block(*key, cosine=cosine, reads=reads, writes=writes, conflict=conflict))
        return rows


@dataclass(frozen=True)
class Block:
    """A block of a component, for an adapter or for a pair.

    Attributes:
        of: The adapter, or both.
        component: The component.
        block: The block.
        change: Of an adapter, the norm of all of its changes there.
        relative: Of an adapter, the mean of its changes against the weights.
        acting: Of an adapter, the mean of what it adds against the outputs of layers.
        cosine: Of a pair, the mean over layers.
        reads: The same.
        writes: The same.
        conflict: The same, of what both add to outputs.
    """

    of: str
    component: str
    block: str
    change: float | None = None
    relative: float | None = None
    acting: float | None = None
    cosine: float | None = None
    reads: float | None = None
    writes: float | None = None
    conflict: float | None = None


@dataclass(frozen=True)
class Drawn:
    """What drawing tells of adapters.

    Attributes:
        effects: What each changes of predictions.
        suggestion: Strengths at which they go together.
        acting: What each adds to the outputs of layers.
        conflicts: How what each pair adds lies to each other.
    """

    effects: Mapping[str, float]
    suggestion: Suggestion
    acting: tuple[Acting, ...]
    conflicts: tuple[Conflict, ...]


def measured(parts: Mapping[str, nn.Module], names: Sequence[str], drawn: Drawn | None = None) -> BlendReport:
    """Measure the changes of adapters.

    Args:
        parts: The components of the base, by name.
        names: The adapters.
        drawn: What drawing tells of them; None where nothing was drawn.

    Returns:
        The report.
    """
    sizes: list[Size] = []
    overlaps: list[PairOverlap] = []
    others: dict[str, int] = {}
    for component, state in Registry(parts).states().items():
        part = parts[component]
        built = {name: sites.adapters(part, name) for name in names if name in state.entries}
        blocks = targets.blocks(part, parts=True)
        for path in dict.fromkeys(path for own in built.values() for path in own):
            module = part.get_submodule(path)
            block = blocks.names[blocks.of(path)]
            changes: dict[str, Change] = {}
            for name, own in built.items():
                change = _change(own[path], module, f"{component}.{path}") if path in own else None
                if change is not None:
                    changes[name] = change
                elif path in own:
                    others[name] = others.get(name, 0) + 1
            weight = getattr(module, "weight", None)
            whole = float(weight.float().norm()) if _is_plain(weight) else 0.0
            norms = {name: math.sqrt(max(0.0, _inner(change, change))) for name, change in changes.items()}
            for name, size in norms.items():
                sizes.append(Size(name, component, block, path, size, size / whole if whole else None))
            for one, other in combinations(changes, 2):
                found = _overlap_of(changes[one], changes[other], norms[one] * norms[other])
                overlaps.append(PairOverlap(one, other, component, block, path, *found))
    known = drawn.effects if drawn else {n: math.hypot(*(one.change for one in sizes if one.adapter == n)) for n in names}
    even = Calibration(known).evenly(dict.fromkeys(known, 1 / max(1, len(known))))
    return BlendReport(
        tuple(sizes),
        tuple(overlaps),
        effects=dict(drawn.effects) if drawn else {},
        even=even,
        suggested=dict(drawn.suggestion.strengths) if drawn else even,
        excess=drawn.suggestion.excess if drawn else None,
        excess_whole=drawn.suggestion.excess_whole if drawn else None,
        acting=drawn.acting if drawn else (),
        conflicts=drawn.conflicts if drawn else (),
        others=others,
    )


def _change(adapter: Any, module: nn.Module, where: str) -> Change | None:
    """What an adapter changes of a weight; None where it changes none, or one that is packed."""
    try:
        change = change_of(adapter, module, where)
    except (FoldError, UserError):
        return None
    return change if change.changes_weight else None


def _is_plain(weight: object) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta


@torch.no_grad()
def _inner(one: Change, other: Change) -> float:
    """The inner product of two changes of a weight. Those of low rank are not multiplied out."""
    if one.pair is not None and other.pair is not None:
        a, b = (LowRank(pair.down.double(), pair.up.double()) for pair in (one.pair, other.pair))
        return float(((a.up.T @ b.up) * (a.down @ b.down.T)).sum())
    first, second = one.matrix(), other.matrix()
    return 0.0 if first is None or second is None else float((first.double() * second.double()).sum())


def _overlap_of(one: Change, other: Change, norms: float) -> tuple[float, float | None, float | None]:
    """What `PairOverlap` has of two changes: the cosine, by the product of their norms, and how far they read and write the
    same."""
    reads = writes = None
    if one.pair is not None and other.pair is not None:
        reads = _overlap(one.pair.down.T, other.pair.down.T)
        writes = _overlap(one.pair.up, other.pair.up)
    return _inner(one, other) / norms if norms else 0.0, reads, writes


@torch.no_grad()
def _overlap(one: Tensor, other: Tensor) -> float:
    """The mean of the squared cosines of the principal angles between what the columns of two matrices span."""
    bases = [spanned(matrix) for matrix in (one, other)]
    smaller = min(base.shape[1] for base in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
