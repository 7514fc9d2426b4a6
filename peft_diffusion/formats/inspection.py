"""What an adapter file tells a person, from its plan: nothing is loaded, torch is not needed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import methods
from ..core.method import Network, Scalars
from ..core.parsing import json_value
from ..core.wording import number_of
from . import container, network
from .metadata import base_of
from .origin import Origin, origin
from .planning import Plan, SitePlan, plan, told_damage
from .spec import Spec


@dataclass(frozen=True)
class Hashes:
    """Digests of a file, as hex digits.

    Attributes:
        sha256: Of all bytes.
        autov2: What A1111 and Civitai show of that.
        data: SHA-256 of the tensors alone, as they are: A1111's "Lora hashes" and kohya's ``sshs_model_hash``.
        told: ``sshs_model_hash`` as the metadata have it; "" where they have none. It is another one than ``data`` where the
            tensors were changed since.
        legacy: kohya's ``sshs_legacy_hash``: as the metadata have it, or as of the file now. "" in a file that is too short.
    """

    sha256: str
    autov2: str
    data: str
    told: str
    legacy: str


@dataclass(frozen=True)
class Inspection:
    """What an adapter file tells.

    Attributes:
        path: The file.
        size: In bytes.
        sha256: Of the whole file, as hex digits.
        spec: What it says of itself; None in files of other programs.
        metadata: Of its header.
        layouts: The layouts that its names are of, the one of most tensors first.
        methods: The methods that its tensors are of, by name.
        components: Sites per component.
        methods_by_component: Sites per method of each component.
        origin: Which model it is for, whether this package runs that or not.
        triggers: The words that call it: those of its spec, of ``modelspec.trigger_phrase``, and the words that it learned.
        tags: How often its captions had a tag, as kohya's trainer counts, over all folders; the most frequent first.
        hashes: Digests by which programs know it: see ``Hashes``.
        hyper_parameters: By method and name, sites per value.
        network: What kohya's trainer, and LyCORIS in it, say of the method; None where they say nothing.
        dtypes: Tensors per dtype.
        parameters: Numbers that were trained.
        sites: The shapes of each site's tensors by suffix; a site is its component, a dot, and its path with underscores.
        names: What the file calls the tensors of each site, the largest first.
        unknown: Tensors that make no part of an adapter, whatever the base.
        leftovers: Why, by tensor.
        warnings: What the person should know.
    """

    path: Path
    size: int
    sha256: str
    spec: Spec | None
    metadata: Mapping[str, str]
    layouts: tuple[str, ...]
    methods: tuple[str, ...]
    components: Mapping[str, int]
    methods_by_component: Mapping[str, Mapping[str, int]]
    origin: Origin
    triggers: tuple[str, ...]
    tags: Mapping[str, int]
    hashes: "Hashes"
    hyper_parameters: Mapping[str, Mapping[str, Mapping[float, int]]]
    network: Network | None
    dtypes: Mapping[str, int]
    parameters: int
    sites: Mapping[str, Mapping[str, tuple[int, ...]]]
    names: Mapping[str, tuple[str, ...]]
    leftovers: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """The tensors that make no part of an adapter."""
        return tuple(self.leftovers)

    @property
    def base(self) -> Mapping[str, str]:
        """What the file says of its base: name, family and the like. Empty where it says nothing."""
        return base_of(self.spec, self.metadata)

    @property
    def ranks(self) -> Mapping[int, int]:
        """Sites per rank, of all methods that have one."""
        return {int(rank): count for rank, count in self._all("rank").items()}

    @property
    def alphas(self) -> Mapping[float, int]:
        """Sites per alpha, of all methods that have one; none in the file means the rank.

        The scale is alpha / rank: what another program scales otherwise (rank-stabilized, by alpha / sqrt(rank)) is told so.
        """
        return self._all("alpha")

    def _all(self, name: str) -> Mapping[float, int]:
        return _of_all(self.hyper_parameters, name)


def inspect(source: str | Path | Plan) -> Inspection:
    """Tell what an adapter file holds.

    Args:
        source: The file, or the plan that was made of it.

    Returns:
        What it tells.

    Raises:
        UserError: There is no such file, it is no adapter, or it is damaged.
    """
    found = source if isinstance(source, Plan) else plan(source)
    told = _hyper_parameters(found)
    known = methods.known().values()
    beside = frozenset[str]().union(*(one.constants if found.spec is None else one.constants | one.fillers for one in known))
    sites = {f"{component}.{name}": one for component, name, one in found.each() if one.methods}
    shapes = {name: dict(one.shapes) for name, one in sites.items()}
    return Inspection(
        path=found.path,
        size=found.header.size,
        sha256=found.sha256,
        spec=found.spec,
        metadata=found.header.metadata,
        layouts=found.layouts,
        methods=tuple(sorted(told)),
        components=Counter(component for component, _, one in found.each() if one.methods),
        methods_by_component=_by_component(found),
        origin=origin(found.header),
        triggers=triggers_of(found),
        tags=tags_of(found),
        hashes=_hashes(found),
        hyper_parameters=told,
        network=network.from_metadata(found.header.metadata),
        dtypes=Counter(entry.dtype for entry in found.header.tensors.values()),
        parameters=sum(prod(shape) for own in shapes.values() for suffix, shape in own.items() if suffix not in beside),
        sites=shapes,
        names={name: _names(one) for name, one in sites.items()},
        leftovers=found.leftovers,
        warnings=(*found.warnings, *_damages(found)),
    )


def _damages(found: Plan) -> Iterator[str]:
    """What of the sites makes the file damaged, for which it cannot be loaded: of several sites that lack one tensor the
    first by its name."""
    damaged = [(f"{component}.{name}", one.damage) for component, name, one in found.each() if one.damage is not None]
    for missing in dict.fromkeys(missing for _, missing in damaged):
        where, *others = [site for site, lacks in damaged if lacks == missing]
        yield told_damage(f"{where} and {number_of(len(others), 'other site')}" if others else where, missing)


def _by_component(found: Plan) -> dict[str, Counter[str]]:
    told: dict[str, Counter[str]] = {}
    for component, _, one in found.each():
        for method in one.methods:
            told.setdefault(component, Counter())[method.name] += 1
    return told


def triggers_of(found: Plan) -> tuple[str, ...]:
    """List the words that call an adapter.

    Args:
        found: Its file.

    Returns:
        The words of its spec, or of ``modelspec.trigger_phrase``, and those that it learned, each once.
    """
    phrase = found.header.metadata.get("modelspec.trigger_phrase", "").strip()
    spoken = found.spec.triggers if found.spec is not None else ((phrase,) if phrase else ())
    suffixes = frozenset(method.embedding[0] for method in methods.known().values() if method.embedding is not None)
    places = (source.place for _, _, one in found.each() for source in one.sources)
    learned = (place.piece for place in places if place.suffix in suffixes)
    return tuple(dict.fromkeys((*spoken, *(word for word in learned if word))))


def tags_of(found: Plan) -> dict[str, int]:
    """Count the tags of the captions that an adapter was trained on, as kohya's trainer does.

    Args:
        found: Its file.

    Returns:
        How often captions had each, the most frequent first; nothing where the file does not say, or is damaged.
    """
    # The spec says it in files of every layout, and kohya's key in that of kohya's.
    own = found.spec.training.get("tag_frequency") if found.spec is not None else None
    try:
        folders = own if isinstance(own, dict) else json_value(found.header.metadata.get("ss_tag_frequency", "{}"))
    except ValueError:
        return {}
    counted: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int and count > 0 and tag.strip():
                counted[tag.strip()] += count
    return dict(counted.most_common())


def _hashes(found: Plan) -> Hashes:
    told, of_file = found.header.metadata, found.sha256
    data = of_file if found.loaded is not None else container.data_sha256(found.path)
    legacy = told.get("sshs_legacy_hash") or container.legacy_hash(found.path)
    return Hashes(of_file, of_file[:10], data, told.get("sshs_model_hash", ""), legacy)


def _names(site: SitePlan) -> tuple[str, ...]:
    """What the file calls the tensors of a site, the largest first."""
    return tuple(source.name for source in sorted(site.sources, key=lambda source: prod(source.shape), reverse=True))


def ranks_of(found: Plan) -> Mapping[int, int]:
    """Count the ranks of a file without reading it whole, as `inspect` does for its hashes.

    Args:
        found: The file.

    Returns:
        As `Inspection.ranks`.
    """
    return {int(rank): count for rank, count in _of_all(_hyper_parameters(found), "rank").items()}


def _of_all(told: Mapping[str, Mapping[str, Mapping[float, int]]], name: str) -> Mapping[float, int]:
    """How many sites have which value of a hyper-parameter, of all methods that have it."""
    return sum((Counter(values.get(name, {})) for values in told.values()), Counter[float]())


def _hyper_parameters(found: Plan) -> dict[str, dict[str, Counter[float]]]:
    """How many sites have which value of which hyper-parameter of which method."""
    told: dict[str, dict[str, Counter[float]]] = {}
    scalars = _scalars(found)
    for _, _, site in found.each():
        for method in site.methods:
            own = told.setdefault(method.name, {})
            for name, value in (method.read_hyper_parameters(site.shapes, _of_site(site, scalars)) or {}).items():
                own.setdefault(name, Counter())[value] += 1
    return told


def _scalars(found: Plan) -> Mapping[str, float | None]:
    """The values of all constants of a file, by the names of the tensors."""
    constants = frozenset[str]().union(*(method.constants for method in methods.known().values()))
    names = [one.name for _, _, site in found.each() for one in site.sources if one.place.suffix in constants]
    if found.loaded is None:
        return container.read_scalars(found.header, names)
    return {name: found.loaded[name].item() if found.loaded[name].numel() == 1 else None for name in names}


def _of_site(site: SitePlan, scalars: Mapping[str, float | None]) -> Scalars:
    own = {one.place.suffix: scalars[one.name] for one in site.sources if one.name in scalars}
    return {**site.constants, **own}
