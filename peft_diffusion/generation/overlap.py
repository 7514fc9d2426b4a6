"""How adapters on a base meet: the size of their changes at each layer, and for each pair overlap and conflict."""

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
from ..core.registry import Registry
from ..core.weight_change import Change, change_of
from .calibration import Calibration


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
class Meeting:
    """How the changes of two adapters lie to each other at a layer that both change.

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
    """What adapters change, and how they meet.

    Attributes:
        sizes: Each adapter at each layer whose weight it changes.
        meetings: Each pair at each layer that both change.
        effects: What each changes of the network's predictions: see `Calibration.effects`; empty without prompts.
        suggested: Strengths at which all change as much, together 1: of predictions, and without prompts of the weights.
        others: Adapters with layers where they change no weight, as a bottleneck or learned words, by how many there are.
    """

    sizes: tuple[Size, ...]
    meetings: tuple[Meeting, ...]
    effects: Mapping[str, float]
    suggested: Mapping[str, float]
    others: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Give all of it as JSON has it, with the means of `by_block` beside the layers."""
        return asdict(self) | {"blocks": [asdict(one) for one in self.by_block()]}

    def by_block(self) -> "list[Block]":
        """Sum up the layers of each block, in their order.

        Returns:
            One for each adapter and block, and one for each pair and block.
        """
        found: dict[tuple[str, str, str], list[Size]] = {}
        for size in self.sizes:
            found.setdefault((size.adapter, size.component, size.block), []).append(size)
        met: dict[tuple[str, str, str], list[Meeting]] = {}
        for one in self.meetings:
            met.setdefault((f"{one.first} x {one.second}", one.component, one.block), []).append(one)
        rows = [Block(*key, math.hypot(*(one.change for one in own)), _mean([one.relative for one in own]), None, None, None)
                for key, own in found.items()]  # fmt: skip
        for key, both in met.items():
            cosine, reads, writes = (_mean([getattr(one, name) for one in both]) for name in ("cosine", "reads", "writes"))
            rows.append(Block(*key, None, None, cosine, reads, writes))
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
        cosine: Of a pair, the mean over layers.
        reads: The same.
        writes: The same.
    """

    of: str
    component: str
    block: str
    change: float | None
    relative: float | None
    cosine: float | None
    reads: float | None
    writes: float | None


def measured(parts: Mapping[str, nn.Module], names: Sequence[str], effects: Mapping[str, float]) -> BlendReport:
    """Measure the changes of adapters.

    Args:
        parts: The components of the base, by name.
        names: The adapters.
        effects: What each changes of predictions; empty where that is not known.

    Returns:
        The report.
    """
    sizes: list[Size] = []
    meetings: list[Meeting] = []
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
                found = _meeting(changes[one], changes[other], norms[one] * norms[other])
                meetings.append(Meeting(one, other, component, block, path, *found))
    known = effects or {name: math.hypot(*(one.change for one in sizes if one.adapter == name)) for name in names}
    suggested = Calibration(known).evenly(dict.fromkeys(known, 1 / max(1, len(known))))
    return BlendReport(tuple(sizes), tuple(meetings), dict(effects), suggested, others)


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


def _meeting(one: Change, other: Change, norms: float) -> tuple[float, float | None, float | None]:
    """The cosine of two changes, by the product of their norms, and how far they read and write the same."""
    reads = writes = None
    if one.pair is not None and other.pair is not None:
        reads = _overlap(one.pair.down.T, other.pair.down.T)
        writes = _overlap(one.pair.up, other.pair.up)
    return _inner(one, other) / norms if norms else 0.0, reads, writes


@torch.no_grad()
def _overlap(one: Tensor, other: Tensor) -> float:
    """The mean of the squared cosines of the principal angles between what the columns of two matrices span."""
    bases = []
    for matrix in (one.double(), other.double()):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, values > values.max() * 1e-7])  # a rank that is not used spans nothing
    smaller = min(base.shape[1] for base in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
