"""``resize``: an adapter of other ranks."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..core.adapter import LowRank
from ..core.events import Observer
from ..core.files import at_home
from ..core.reduction import Reduced, Truncation, reduced_matrix, reduced_pair
from ..core.weight_change import Change, serves
from ..formats.file import DTYPES
from .results import Adapters, LayerError, Made, write_changed
from .sources import Source, Where, open_sources
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
        made = Adapters(bones, source.dtype if config.dtype is None else DTYPES[config.dtype])
        errors: list[LayerError] = []
        tick = watch.ticks("resizing sites")
        for number, where in enumerate(source.sites):
            tick(number, len(source.sites))
            errors += _resized(made, source, where, config)
        tick(len(source.sites), len(source.sites))
        comment = f"resized from {source.path.name}: {_told(config)}"
        write_changed(made, source.plan, at_home(config.output), config.to, comment)
        return watch.made(at_home(config.output), made.count, errors)


def _wanted(config: ResizeConfig, module: nn.Module) -> Truncation:
    has_kernel = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    rank = config.conv_rank if has_kernel and config.conv_rank is not None else config.rank
    return Truncation(rank, config.energy, config.frobenius, config.ratio)


def _told(config: ResizeConfig) -> str:
    values = {"rank": config.rank, "energy": config.energy, "frobenius": config.frobenius, "ratio": config.ratio}
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None)


def _resized(made: Adapters, source: Source, where: Where, config: ResizeConfig) -> list[LayerError]:
    bare = made.bones.parts[where[0]].get_submodule(where[1])
    wanted = _wanted(config, bare)
    adapter, change = source.opened(where)
    reducible = (change.pair or change.matrix()) if change is not None and serves(bare) else None
    if change is None or reducible is None:  # learned words and the like, a norm, an embedding, or a bias alone
        made.add(*where, adapter)
        return []
    found = _reduced(reducible, wanted)
    made.add_change(*where, Change(pair=found.pair, bias=change.bias))
    return [LayerError(".".join(where), len(found.pair.down), found.error, found.norm)]


def _reduced(change: LowRank | Tensor, wanted: Truncation) -> Reduced:
    return reduced_matrix(change, wanted) if isinstance(change, Tensor) else reduced_pair(change, wanted)
