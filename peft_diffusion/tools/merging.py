"""``merge``: several adapter files become one, or part of a base."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..bases.skeleton import PUBLISHED
from ..core.adapter import Adapter, LowRank, method_of
from ..core.errors import UserError
from ..core.events import Noted, Observer
from ..core.files import at_home
from ..core.reduction import Truncation, exact_pair, reduced, summed
from ..core.weight_change import Change, serves
from ..methods.shared.learned_vectors import LearnedVectors
from .combination import Combination, core_space, knots, linear
from .grams import Seen, collected
from .into import merge_into
from .output_matching import columns_matched, damped, matched, missed
from .results import Adapters, LayerError, Made, OutputError, joined_spec, kept_metadata
from .side_by_side import side_by_side
from .sources import Source, Where, file_dtype, open_sources
from .tool_settings import ALIGNED, MATCHING, MergeConfig
from .watch import Watch, watched


def merge(config: MergeConfig, *, observers: Sequence[Observer] = ()) -> Made:
    """Make one adapter file of several, or fold them into a base and write a checkpoint.

    Sites are read, merged and let go one at a time; one site of each file is in memory, and what is made waits on the disk.
    Without ``rank``, LoRAs are added by writing their ranks one after the other, which is exact. Other methods go through
    the change of the weight that they make.

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
    matching: "_Matching | None" = None


@dataclass(frozen=True)
class _Matching:
    """What outputs are matched by: for each file its name and what went into the layers while its adapter drew."""

    names: Sequence[str]
    seen: Sequence[Mapping[Where, Seen]]
    off_diagonal: float

    def inputs(self, where: Where, width: int) -> tuple[list[Tensor], list[Tensor]]:
        """What went into a layer, for each file: a Gram matrix that is fitted on, and rows of a picture that was kept apart.

        Where the layer did not run with each of the files, all have inputs that are all alike: grams of different measures
        would weigh the files against each other.
        """
        found = [one for seen in self.seen if (one := seen.get(where)) is not None]
        if len(found) < len(self.seen):
            alike = torch.eye(width)
            return [alike.double()] * len(self.seen), [alike] * len(self.seen)
        return [one.fit.mean() for one in found], [one.checked() for one in found]


@dataclass(frozen=True)
class _Site:
    """A site that is merged: its module without weights, its number in the order of the files, and what each changes.

    ``files`` are the numbers of those files that change it.
    """

    where: Where
    bare: nn.Module
    number: int
    changes: Sequence[Change]
    strengths: Sequence[float]
    files: Sequence[int]

    def each(self) -> Iterator[tuple[Change, float]]:
        """The changes with their strengths."""
        return zip(self.changes, self.strengths, strict=True)


def _merge(config: MergeConfig, watch: Watch) -> Made:
    choices = config.choices()
    strengths = [one.strength for one in choices]
    sources, bones = open_sources([one.parsed() for one in choices], config.base, watch.tell, strengths)
    made, errors = Adapters(bones, file_dtype(sources, config.dtype), at_home(config.output)), list[LayerError]()
    outputs = list[OutputError]()
    held = holders(sources)
    rule = Combination(config.within if config.how in ALIGNED else config.how, config.density, config.seed)  # type: ignore[arg-type]
    matching = _matching(config, sources, list(held), watch) if config.how in MATCHING else None
    way = _Way(config.how, rule, None if config.rank is None else Truncation(rank=config.rank), matching)

    def opened() -> Iterator[_Site]:
        for number, (where, own) in enumerate(watch.each("merging sites", held.items())):
            changes = [source.opened(where)[1] for source in own]
            known = [change for change in changes if change is not None]
            if len(known) < len(own):
                made.add(*where, _kept(where, own, watch))
            else:
                bare = bones.parts[where[0]].get_submodule(where[1])
                files = [place for place, source in enumerate(sources) if any(source is one for one in own)]
                yield _Site(where, bare, number, known, [source.strength for source in own], files)

    def take(found: tuple[Where, Change, list[LayerError], list[OutputError]]) -> None:
        where, merged, error, of_outputs = found
        made.add_change(*where, merged)
        errors.extend(error)
        outputs.extend(of_outputs)

    side_by_side(opened(), lambda site: (site.where, *_merged(site, way)), take)
    _write(config, sources, made)
    return watch.made(at_home(config.output), made.count, errors, outputs=outputs)


def _matching(config: MergeConfig, sources: Sequence[Source], sites: Sequence[Where], watch: Watch) -> _Matching:
    """Draw with each adapter."""
    if config.base is None or config.base in PUBLISHED:
        raise UserError(
            f"--how {config.how} draws pictures, and {config.base} has no weights; name a base that has them: --base"
        )
    seen = collected(sources, sites, config.base, config.prompts_by_name(), watch)
    return _Matching([one.name for one in sources], seen, config.off_diagonal)


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


def _merged(site: _Site, way: _Way) -> tuple[Change, list[LayerError], list[OutputError]]:
    """The change of a site, and its errors where ranks were left out or outputs matched."""
    biases = [(one.bias, strength) for one, strength in site.each() if one.bias is not None]
    bias = _numbers([one for one, _ in biases], [strength for _, strength in biases], way, site.number) if biases else None
    kept = [(one, strength) for one, strength in site.each() if one.changes_weight]
    if not kept:
        return Change(bias=bias), [], []
    several, given = [one for one, _ in kept], [strength for _, strength in kept]
    if not serves(site.bare):  # a norm or an embedding has no pair
        weights = [one.weight for one in several if one.weight is not None]
        return Change(weight=_numbers(weights, given, way, site.number), bias=bias), [], []
    if way.matching is not None:
        pair, outputs = _nearest(site, way, way.matching)
        return Change(pair=pair, bias=bias), [], outputs
    pair, error = _pair(site.where, several, given, way, site.number)
    return Change(pair=pair, bias=bias), error, []


def _nearest(site: _Site, way: _Way, matching: _Matching) -> tuple[LowRank, list[OutputError]]:
    """The pair of a site whose outputs are nearest to those of all adapters, and how near it is."""
    pairs: list[LowRank | None] = [None] * len(matching.names)
    for number, (change, strength) in zip(site.files, site.each(), strict=True):
        if change.changes_weight:
            pair = _as_pair(change)
            pairs[number] = LowRank(pair.down, pair.up * strength)
    name, known = ".".join(site.where), [one for one in pairs if one is not None]
    wanted = way.wanted or _largest(name, [one for one in site.changes if one.changes_weight])
    width = known[0].down.shape[1]
    grams, checked = matching.inputs(site.where, width)
    fit = [damped(one, matching.off_diagonal) for one in grams]
    match = matched if way.how == "regmean" else columns_matched
    found, whole = match(pairs, fit, wanted.rank or width), summed(known)
    outputs = []
    for adapter, own, x in zip(matching.names, pairs, checked, strict=True):
        norm = 0.0 if own is None else missed(own, None, x)
        outputs.append(OutputError(name, adapter, missed(found, own, x), missed(whole, own, x), norm))
    return found, outputs


def _numbers(tensors: Sequence[Tensor], strengths: Sequence[float], way: _Way, number: int) -> Tensor:
    """Tensors that are no matrices, merged number by number."""
    if way.how in ("linear", "svd", *ALIGNED):
        return linear(tensors, strengths)
    if way.matching is not None:  # as of inputs that are all alike
        return linear(tensors, [strength / len(way.matching.names) for strength in strengths])
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
            whole = summed([one.pair for one in changes if one.pair], strengths)
            return (whole, []) if wanted is None else _reduced(name, whole, wanted)
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
    found = reduced(change, wanted)
    return found.pair, [LayerError.of(name, found)]


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
