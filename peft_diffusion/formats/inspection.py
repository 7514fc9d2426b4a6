"""What an adapter file tells a person, from its plan: nothing is loaded, torch is not needed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .. import methods
from ..core.method import Network, Scalars
from . import container, network
from .metadata import base_of
from .planning import Plan, SitePlan, plan
from .spec import Spec


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
        return sum((Counter(values.get(name, {})) for values in self.hyper_parameters.values()), Counter[float]())


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
        hyper_parameters=told,
        network=network.from_metadata(found.header.metadata),
        dtypes=Counter(entry.dtype for entry in found.header.tensors.values()),
        parameters=sum(prod(shape) for own in shapes.values() for suffix, shape in own.items() if suffix not in beside),
        sites=shapes,
        names={name: _names(one) for name, one in sites.items()},
        leftovers=found.leftovers,
        warnings=found.warnings,
    )


def _names(site: SitePlan) -> tuple[str, ...]:
    """What the file calls the tensors of a site, the largest first."""
    return tuple(source.name for source in sorted(site.sources, key=lambda source: prod(source.shape), reverse=True))


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
