"""``merge``: several adapter files become one, or part of a base."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter, LowRank, method_of
from ..core.errors import UserError
from ..core.events import Noted, Observer
from ..core.files import at_home
from ..core.reduction import Truncation, exact_pair, reduced_matrix, reduced_pair, summed
from ..core.weight_change import Change, serves
from ..formats.file import DTYPES
from ..methods.shared.learned_vectors import LearnedVectors
from .combination import Combination, core_space, knots, linear
from .into import merge_into
from .results import Adapters, LayerError, Made, joined_spec, kept_metadata
from .sources import Source, Where, joined_dtype, open_sources
from .tool_settings import ALIGNED, MergeConfig
from .watch import Watch, watched


def merge(config: MergeConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Make one adapter file of several, or fold them into a base and write a checkpoint.

    Sites are read, merged and let go one at a time; beside the result one site of each file is in memory. Without ``rank``,
    LoRAs are added by writing their ranks one after the other, which is exact. Other methods go through the change of the
    weight that they make.

    Args:
        config: Which files, how, and what is written.
        observers: Are told how far it is, what is left out, and last of all what was made.

    Returns:
        What was made, with the error of every site whose rank was reduced.

    Raises:
        UserError: A file cannot be read, is for another base, or holds what cannot be merged; nothing is written.
    """
    with watched(observers) as watch:
        config.check()
        if config.into is not None:
            return merge_into(config, watch)
        return _merge(config, watch)


@dataclass(frozen=True)
class _Way:
    """How the changes of a site become one."""

    how: str
    rule: Combination
    wanted: Truncation | None


def _merge(config: MergeConfig, watch: Watch) -> Made:
    choices = config.choices()
    strengths = [one.strength for one in choices]
    sources, bones = open_sources([one.parsed() for one in choices], config.base, watch.tell, strengths)
    dtype = joined_dtype([source.dtype for source in sources]) if config.dtype is None else DTYPES[config.dtype]
    made, errors = Adapters(bones, dtype), list[LayerError]()
    held = holders(sources)
    rule = Combination(config.within if config.how in ALIGNED else config.how, config.density, config.seed)  # type: ignore[arg-type]
    way = _Way(config.how, rule, None if config.rank is None else Truncation(rank=config.rank))
    tick = watch.ticks("merging sites")
    for number, (where, own) in enumerate(held.items()):
        tick(number, len(held))
        opened = [source.opened(where)[1] for source in own]
        changes = [change for change in opened if change is not None]
        if len(changes) < len(own):
            made.add(*where, _kept(where, own, watch))
            continue
        merged, error = _merged(made, where, changes, [source.strength for source in own], way, number)
        errors += error
        made.add_change(*where, merged)
    tick(len(held), len(held))
    _write(config, sources, made)
    return watch.made(at_home(config.output), made.count, errors)


def holders(sources: Iterable[Source]) -> dict[Where, list[Source]]:
    """List who changes each site.

    Args:
        sources: The files.

    Returns:
        By site, the files that have an adapter there.
    """
    found: dict[Where, list[Source]] = {}
    for source in sources:
        for where in source.sites:
            found.setdefault(where, []).append(source)
    return found


def _kept(where: Where, own: Sequence[Source], watch: Watch) -> Adapter:
    """What is no change of weights is taken over as it is. Raises UserError where several files have it at one site."""
    adapters = [source.adapter(where) for source in own]
    first = adapters[0]
    words = [one for one in adapters if isinstance(one, LearnedVectors)]
    if len(words) == len(adapters):
        if any(source.strength != 1 for source in own):
            watch.tell(Noted(f"{'.'.join(where)}: learned words are kept as they are, whatever the strength"))
        return words[0] if len(words) == 1 else united(where, own, words)
    if len(adapters) > 1:
        names = " and ".join(str(source.path) for source in own)
        raise UserError(
            f"{names} both change {'.'.join(where)}, and {method_of(first)} is no change of a weight, so that they cannot be"
            " merged there; use both files side by side"
        )
    if own[0].strength != 1:
        raise UserError(
            f"{own[0].path}: {method_of(first)} at {'.'.join(where)} is no change of a weight, so that no file can hold it"
            f" at strength {own[0].strength:g}; merge it at strength 1, or use the files side by side"
        )
    return first


def united(where: Where, own: Sequence[Source], several: Sequence[LearnedVectors]) -> LearnedVectors:
    """Put the learned words of several files into one.

    Args:
        where: The site.
        own: The files.
        several: What each holds there.

    Returns:
        All words.

    Raises:
        UserError: Two files have a word of one name, or words of two kinds.
    """
    words: dict[str, Sequence[int]] = {}
    for source, one in zip(own, several, strict=True):
        twice = [word for word in one.words if word in words]
        if twice or type(one) is not type(several[0]):
            name = repr(twice[0]) if twice and twice[0] else "the soft prompt"
            raise UserError(
                f"{source.path} and a file before it both have {name} at {'.'.join(where)}; give one of them another name"
                " with rename-trigger"
            )
        words |= one.words
    return type(several[0])(torch.cat([one.vectors.detach() for one in several]), words)


def _merged(
    made: Adapters, where: Where, changes: Sequence[Change], strengths: Sequence[float], way: _Way, number: int
) -> tuple[Change, list[LayerError]]:
    """The change of a site, and its error where ranks were left out."""
    site = made.bones.parts[where[0]].get_submodule(where[1])
    biases = [(one.bias, strength) for one, strength in zip(changes, strengths, strict=True) if one.bias is not None]
    bias = _numbers([one for one, _ in biases], [strength for _, strength in biases], way, number) if biases else None
    kept = [(one, strength) for one, strength in zip(changes, strengths, strict=True) if one.changes_weight]
    if not kept:
        return Change(bias=bias), []
    several, given = [one for one, _ in kept], [strength for _, strength in kept]
    if not serves(site):  # a norm or an embedding has no pair
        weights = [one.weight for one in several if one.weight is not None]
        return Change(weight=_numbers(weights, given, way, number), bias=bias), []
    pair, error = _pair(where, several, given, way, number)
    return Change(pair=pair, bias=bias), error


def _numbers(tensors: Sequence[Tensor], strengths: Sequence[float], way: _Way, number: int) -> Tensor:
    """Tensors that are no matrices, merged number by number."""
    if way.how in ("linear", "svd", *ALIGNED):
        return linear(tensors, strengths)
    return way.rule(tensors, strengths, number)


def _pair(
    where: Where, changes: Sequence[Change], strengths: Sequence[float], way: _Way, number: int
) -> tuple[LowRank, list[LayerError]]:
    """The change of a matrix, as a pair."""
    name = ".".join(where)
    if way.how in ALIGNED:
        aligned = knots if way.how == "knots" else core_space
        pair = aligned([_as_pair(one) for one in changes], strengths, way.rule, number)
        return (pair, []) if way.wanted is None else _reduced(name, pair, way.wanted)
    if way.how in ("linear", "svd"):
        wanted = _largest(name, changes) if way.how == "svd" and way.wanted is None else way.wanted
        if all(one.pair is not None for one in changes):
            scaled = [LowRank(one.pair.down, one.pair.up * s) for one, s in zip(changes, strengths, strict=True) if one.pair]
            return (summed(scaled), []) if wanted is None else _reduced(name, summed(scaled), wanted)
        total = linear(_matrices(changes), strengths)
        return (exact_pair(total), []) if wanted is None else _reduced(name, total, wanted)
    total = way.rule(_matrices(changes), strengths, number)
    return _reduced(name, total, way.wanted or _largest(name, changes))


def _as_pair(change: Change) -> LowRank:
    matrix = change.matrix() if change.pair is None else None
    if change.pair is not None:
        return change.pair
    if matrix is None:
        raise TypeError("a change of a bias alone is no pair")
    return exact_pair(matrix)


def _matrices(changes: Sequence[Change]) -> list[Tensor]:
    return [matrix for one in changes if (matrix := one.matrix()) is not None]


def _largest(name: str, changes: Sequence[Change]) -> Truncation:
    ranks = [len(one.pair.down) for one in changes if one.pair is not None]
    if len(ranks) < len(changes):
        raise UserError(f"{name} is changed by a method that has no rank; say how many ranks to keep with --rank")
    return Truncation(rank=max(ranks))


def _reduced(name: str, change: LowRank | Tensor, wanted: Truncation) -> tuple[LowRank, list[LayerError]]:
    found = reduced_matrix(change, wanted) if isinstance(change, Tensor) else reduced_pair(change, wanted)
    return found.pair, [LayerError(name, len(found.pair.down), found.error, found.norm)]


def _write(config: MergeConfig, sources: Sequence[Source], made: Adapters) -> None:
    plans = [source.plan for source in sources]
    output = at_home(config.output)
    told = ", ".join(f"{source.name}={source.strength:g}" for source in sources)
    names = Counter(source.name for source in sources)
    metadata = {
        **kept_metadata(plans),
        "modelspec.merged_from": ", ".join(names),
        "ss_training_comment": f"merged ({config.how}) from {told}",
    }
    made.write(output, config.to, joined_spec(plans, made.bones, made, output.stem), metadata)
