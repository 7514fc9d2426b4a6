"""What adapters add to the outputs of layers while a base draws: how much, and whether two of them add the same."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bases import components
from ..core import site as sites
from ..core import targets
from ..core.events import Never, Observers, Stop
from ..core.slot import Slot, slot_of
from .calibration import few, firsts
from .sampler import Cell, paint
from .settings import Sampling

if TYPE_CHECKING:
    from .adapters import Adapters


@dataclass(frozen=True)
class Acting:
    """What an adapter adds to the output of a layer, at strength 1, on what the layer is given while the base draws.

    Attributes:
        adapter: Its name.
        component: The component.
        block: The block of the component.
        site: The layer.
        relative: The root mean square of what it adds over that of the output, over prompts and steps.
    """

    adapter: str
    component: str
    block: str
    site: str
    relative: float


@dataclass(frozen=True)
class Conflict:
    """How what two adapters add to the output of a layer lies to each other.

    Attributes:
        first: The one.
        second: The other.
        component: The component.
        block: The block of the component.
        site: The layer.
        cosine: Of both as vectors, over prompts and steps, from -1 (they undo each other) through 0 to 1 (the same).
    """

    first: str
    second: str
    component: str
    block: str
    site: str
    cosine: float


class _Sums:
    """Sums over all that a layer computes: the squares of its output, and the products of what adapters add to it."""

    def __init__(self, slot: Slot, block: str, names: Sequence[str]) -> None:
        self.slot = slot
        self.block = block
        self.names = [name for name in names if name in slot.adapters]
        self.output: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    @torch.no_grad()
    def __call__(self, site: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Take in a call of the layer, as a forward hook."""
        y: Tensor = output[0] if isinstance(output, tuple) else output
        x: Tensor = args[0] if args else named["input" if "input" in named else "hidden_states"]
        told = {name: value for name, value in named.items() if value is not x}
        one = torch.ones((1,) * y.ndim, device=y.device, dtype=y.dtype)
        added = [self.slot.adapters[name].run(x, y, one, y, told) - y for name in self.names]
        rows = torch.stack([change.flatten() for change in added]).float()
        self.output = self.output + y.float().square().sum()
        self.products = self.products + rows @ rows.T


def acting(
    adapters: "Adapters",
    names: Sequence[str],
    cells: Sequence[Cell],
    sampling: Sampling,
    stop: Stop = Never(),  # noqa: B008
) -> tuple[tuple[Acting, ...], tuple[Conflict, ...]]:
    """See what adapters add while the base draws without them.

    Args:
        adapters: Those on the base. They keep the strengths of the last picture.
        names: Which are looked at; they are off meanwhile.
        cells: The pictures, with the strengths of adapters that stand beside those. The first prompts count.
        sampling: How pictures are drawn; few steps are taken.
        stop: Where it is set, nothing is drawn after the present picture.

    Returns:
        Each adapter at each layer that it changes, and each pair at each layer that both change.

    Raises:
        UserError: As `sampler.paint`.
        Interrupted: It was stopped.
    """
    off = dict.fromkeys(names, 0.0)
    drawn = [Cell(cell.prompt, cell.seed, {**(cell.strengths or {}), **off}, cell.negative) for cell in firsts(cells)]
    with plainly(adapters), _watching(adapters, names) as found:
        for _ in paint(adapters, drawn, few(sampling, len(drawn)), tell=Observers(), stop=stop):
            pass
    sizes: list[Acting] = []
    conflicts: list[Conflict] = []
    for (component, path), sums in found.items():
        if not isinstance(sums.products, Tensor):  # a layer that was not called
            continue
        where = (component, sums.block, path)
        whole, products = float(sums.output), sums.products.double().cpu()
        norms = products.diagonal().clamp(min=0).sqrt().tolist()
        sizes += [
            Acting(name, *where, norm / math.sqrt(whole) if whole else 0.0)
            for name, norm in zip(sums.names, norms, strict=True)
        ]
        for one, other in combinations(range(len(sums.names)), 2):
            size = norms[one] * norms[other]
            cosine = float(products[one, other]) / size if size else 0.0
            conflicts.append(Conflict(sums.names[one], sums.names[other], *where, cosine))
    return tuple(sizes), tuple(conflicts)


@contextmanager
def plainly(adapters: "Adapters") -> Iterator[None]:
    """Compute layer by layer inside, where a fast network would replay a recording that asks no layer.

    Args:
        adapters: Those on the base.

    Yields:
        Once; afterwards the base is as fast as it was.
    """
    was = adapters.is_fast
    if was:
        adapters.fast(False)
    try:
        yield
    finally:
        if was:
            adapters.fast(True)


@contextmanager
def _watching(adapters: "Adapters", names: Sequence[str]) -> Iterator[Mapping[tuple[str, str], _Sums]]:
    """Sums of all layers that adapters change, which grow inside, by component and path."""
    found: dict[tuple[str, str], _Sums] = {}
    handles = []
    try:
        for component, part in components(adapters.pipe).items():
            blocks = targets.blocks(part, parts=True)
            for path, site in sites.sites(part).items():
                slot = slot_of(site)
                if slot is not None and any(name in slot.adapters for name in names):
                    found[component, path] = sums = _Sums(slot, blocks.names[blocks.of(path)], names)
                    handles.append(site.register_forward_hook(sums, with_kwargs=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()
