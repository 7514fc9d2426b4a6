"""A LoRA in place of another method, with what that leaves out."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from ..bases import family as families
from ..core.adapter import Adapter, LowRank, method_of, parts_of
from ..core.errors import FoldError, UserError
from ..core.reduction import Reduced, Truncation, reduced_matrix, reduced_pair
from ..core.weight_change import Change, serves
from ..methods.making import is_pair
from .results import Adapters, LayerError
from .sources import Source, Where

Fitted: TypeAlias = Mapping[Where, tuple[Where, Reduced]]
"""Pairs that were fitted on what a base computes, by the site of the adapter: the site that each sits on, and the pair."""


def as_lora(
    source: Source,
    made: Adapters,
    rank: int,
    sites: list[Where],
    *,
    fitted: Fitted,
    tick: Callable[[int, int], None],
) -> list[LayerError]:
    """Make a LoRA of an adapter, site by site.

    The change of each weight becomes the best pair of the rank; a LoRA of no larger one stays as it is. New words stay, and
    so do changes of biases and of norms, which no pair can say.

    Args:
        source: The file.
        made: Takes the adapters.
        rank: At most so many ranks a site.
        sites: Those that are taken over.
        fitted: Pairs in place of adapters that change no weight.
        tick: Is told how many sites are done, and of how many.

    Returns:
        The error of every site whose change was approximated.

    Raises:
        UserError: An adapter changes no weight and nothing was fitted in its place, or depends on weights that are not at
            hand.
    """
    errors: list[LayerError] = []
    for number, where in enumerate(sites):
        tick(number, len(sites))
        errors += _site(source, made, Truncation(rank), where, fitted)
    tick(len(sites), len(sites))
    return errors


def changes_no_weight(source: Source, where: Where) -> bool:
    """Tell whether a site carries an adapter that a pair has to be fitted for.

    Args:
        source: The file.
        where: The site.

    Returns:
        Whether it does; not for new words, which are no change of what a layer computes.

    Raises:
        UserError: The file is damaged, or the change depends on weights that are not at hand.
    """
    if any(part.learned_words() or part.precedes for part in parts_of(source.adapter(where))):
        return False
    try:
        source.change(where)
    except FoldError:
        return True
    return False


def _site(source: Source, made: Adapters, wanted: Truncation, where: Where, fitted: Fitted) -> list[LayerError]:
    if where in fitted:
        place, found = fitted[where]
        return [_take(made, place, found, None)]
    bare = made.bones.parts[where[0]].get_submodule(where[1])
    adapter = source.adapter(where)
    try:
        change = source.change(where)
    except FoldError:
        if changes_no_weight(source, where):
            raise _no_weight(source, where, adapter) from None
        made.add(*where, adapter)
        return []
    reducible = (change.pair or change.matrix()) if serves(bare) else None
    small = change.pair is not None and len(change.pair.down) <= (wanted.rank or 0)
    pairs = [part.state().keys() for part in parts_of(adapter) if serves(bare) and part.low_rank() is not None]
    if reducible is None or (small and all(map(is_pair, pairs))):
        made.add(*where, adapter)
        return []
    if small:  # of another method, such as a LoHa, and a pair all the same
        made.add_change(*where, change)
        return []
    found = reduced_pair(reducible, wanted) if isinstance(reducible, LowRank) else reduced_matrix(reducible, wanted)
    return [_take(made, where, found, change)]


def _take(made: Adapters, place: Where, found: Reduced, change: Change | None) -> LayerError:
    if place[1] in made.made.get(place[0], {}):
        raise UserError(f"{'.'.join(place)} would carry two LoRAs, of which one was fitted; convert the methods apart")
    bias = None if change is None else change.bias
    made.add_change(*place, Change(pair=found.pair, bias=bias))
    return LayerError(".".join(place), len(found.pair.down), found.error, found.norm)


def _no_weight(source: Source, where: Where, adapter: Adapter) -> UserError:
    kinds = " and ".join(dict.fromkeys(map(method_of, parts_of(adapter))))
    denoises = families.role_of(where[0]) != "language model"
    advice = "name the base with --base, whose weights are then read" if denoises else "which is done for pictures alone"
    return UserError(
        f"{source.path}: {'.'.join(where)} carries {kinds}, which changes no weight; a LoRA near it is fitted on what the"
        f" base computes: {advice}"
    )
