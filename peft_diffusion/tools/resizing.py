"""``resize``: an adapter of other ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.events import Observer
from ..core.files import at_home
from ..core.reduction import Reduced, Truncation, reduced
from ..core.weight_change import Change, has_kernel, serves
from .results import Adapters, LayerError, Made, write_changed
from .side_by_side import side_by_side
from .sources import Where, file_dtype, open_sources
from .tool_settings import ResizeConfig
from .watch import watched


def resize(config: ResizeConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Write an adapter file with other ranks: each site the best approximation of its rank.

    LoRAs are reduced exactly, by their factors; other methods that have a change of the weight become LoRAs. What has none,
    such as learned words, and changes of biases and norms are taken over as they are.

    Args:
        config: Which file, and how many ranks of each site are kept.
        observers: Are told how far it is, and last of all what was made.

    Returns:
        What was made, with the error of every site.

    Raises:
        UserError: The file cannot be read or written, or depends on weights that are not at hand.
    """
    with watched(observers) as watch:
        config.check()
        (source,), bones = open_sources([config.plan], config.base, watch.tell)
        made = Adapters(bones, file_dtype([source], config.dtype), at_home(config.output))
        errors: list[LayerError] = []

        def opened() -> Iterator[_Site]:
            for where in watch.each("resizing sites", source.sites):
                bare = bones.parts[where[0]].get_submodule(where[1])
                adapter, change = source.opened(where)
                reducible = (change.pair or change.matrix()) if change is not None and serves(bare) else None
                if change is None or reducible is None:  # learned words and the like, a norm, an embedding, a bias alone
                    made.add(*where, adapter)
                else:
                    yield _Site(where, reducible, _wanted(config, bare), change.bias)

        def take(resized: tuple[_Site, Reduced]) -> None:
            site, found = resized
            made.add_change(*site.where, Change(pair=found.pair, bias=site.bias))
            errors.append(LayerError.of(".".join(site.where), found))

        side_by_side(opened(), lambda site: (site, reduced(site.change, site.wanted)), take)
        comment = f"resized from {source.path.name}: {_told(config)}"
        write_changed(made, source.plan, at_home(config.output), config.to, comment)
        return watch.made(at_home(config.output), made.count, errors)


@dataclass(frozen=True)
class _Site:
    """A site whose rank is reduced."""

    where: Where
    change: LowRank | Tensor
    wanted: Truncation
    bias: Tensor | None


def _wanted(config: ResizeConfig, module: nn.Module) -> Truncation:
    rank = config.conv_rank if has_kernel(module) and config.conv_rank is not None else config.rank
    return Truncation(rank, config.energy, config.frobenius, config.ratio)


def _told(config: ResizeConfig) -> str:
    values = {"rank": config.rank, "energy": config.energy, "frobenius": config.frobenius, "ratio": config.ratio}
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)
