"""A LoRA in place of another method, with what that leaves out."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor

from ..bases import family as families
from ..core.adapter import Adapter, method_of, parts_of
from ..core.errors import UserError
from ..core.reduction import Reduced, Truncation, reduced
from ..core.weight_change import Change, serves
from ..methods.making import is_pair
from .results import Adapters, LayerError
from .sources import Source, Where
from .watch import Watch


def as_lora(
    source: Source, made: Adapters, rank: int, sites: Sequence[Where], watch: Watch
) -> tuple[list[LayerError], list[Where]]:
    """Make a LoRA of an adapter, site by site.

    The change of each weight becomes the best pair of the rank; a LoRA of no larger one stays as it is. New words stay, and
    so do changes of biases and of norms, which no pair can say.

    Args:
        source: The file.
        made: Takes the adapters.
        rank: At most so many ranks a site.
        sites: Those that are taken over.
        watch: Is told how far it is.

    Returns:
        The error of every site whose change was approximated; and the sites whose adapters change no weight, in whose place
        pairs have to be fitted.

    Raises:
        UserError: The file is damaged, or an adapter depends on weights that are not at hand.
    """
    errors, pending, wanted = list[LayerError](), list[Where](), Truncation(rank)
    for where in watch.each("finding pairs", sites):
        adapter, change = source.opened(where)
        if change is not None:
            errors += _site(made, wanted, where, adapter, change)
        elif any(part.learned_words() or part.precedes for part in parts_of(adapter)):  # no change of what a layer computes
            made.add(*where, adapter)
        else:
            pending.append(where)
    return errors, pending


def _site(made: Adapters, wanted: Truncation, where: Where, adapter: Adapter, change: Change) -> list[LayerError]:
    bare = made.bones.parts[where[0]].get_submodule(where[1])
    reducible = (change.pair or change.matrix()) if serves(bare) else None
    small = change.pair is not None and len(change.pair.down) <= (wanted.rank or 0)
    pairs = [part.state().keys() for part in parts_of(adapter) if serves(bare) and part.low_rank() is not None]
    if reducible is None or (small and all(map(is_pair, pairs))):
        made.add(*where, adapter)
        return []
    if small:  # of another method, such as a LoHa, and a pair all the same
        made.add_change(*where, change)
        return []
    return [_take(made, where, reduced(reducible, wanted), change.bias)]


def add_fitted(made: Adapters, pairs: Mapping[Where, tuple[Where, Reduced]]) -> list[LayerError]:
    """Take pairs that were fitted on what a base computes, after all else.

    Args:
        made: Takes them.
        pairs: By the site of the adapter: the site that each sits on, and the pair.

    Returns:
        The error of each.

    Raises:
        UserError: Something sits there already.
    """
    return [_take(made, place, found, None) for place, found in pairs.values()]


def _take(made: Adapters, place: Where, found: Reduced, bias: Tensor | None) -> LayerError:
    if place[1] in made.made.get(place[0], {}):
        raise UserError(f"{'.'.join(place)} would carry two LoRAs, of which one was fitted; convert the methods apart")
    made.add_change(*place, Change(pair=found.pair, bias=bias))
    return LayerError.of(".".join(place), found)


def refuse_unweighed(source: Source, where: Where) -> NoReturn:
    """Refuse an adapter that changes no weight, where no base is there to fit a pair on.

    Args:
        source: The file.
        where: The site.

    Raises:
        UserError: Always.
    """
    kinds = " and ".join(dict.fromkeys(map(method_of, parts_of(source.adapter(where)))))
    denoises = families.role_of(where[0]) != "language model"
    advice = "name the base with --base, whose weights are then read" if denoises else "which is done for pictures alone"
    raise UserError(
        f"{source.path}: {'.'.join(where)} carries {kinds}, which changes no weight; a LoRA near it is fitted on what the"
        f" base computes: {advice}"
    )
