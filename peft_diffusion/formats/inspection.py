"""What an adapter file holds, told from its header alone: nothing is loaded, torch is not needed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import methods
from ..core.errors import UserError
from ..core.method import Network
from . import container
from .container import Entry
from .layouts import kohya_network
from .layouts.dotted import kohya_name
from .layouts.names import component_of, split
from .spec import Spec


@dataclass(frozen=True)
class Inspection:
    """A file's header, read. ``sites`` maps each site's name in the file to its tensors' shapes by suffix."""

    path: Path
    size: int
    sha256: str
    spec: Spec | None
    metadata: Mapping[str, str]
    methods: tuple[str, ...]
    components: Mapping[str, int]  # sites per component
    hyper_parameters: Mapping[str, Mapping[str, Mapping[float, int]]]  # by method and name: sites per value
    network: Network | None  # what kohya's trainer, and LyCORIS in it, say of the method
    dtypes: Mapping[str, int]  # tensors per dtype
    parameters: int
    sites: Mapping[str, Mapping[str, tuple[int, ...]]]
    unknown: tuple[str, ...]  # tensors that belong to no known method

    @property
    def ranks(self) -> Mapping[int, int]:
        """Sites per rank, of all methods that have one."""
        return {int(rank): count for rank, count in self._all("rank").items()}

    @property
    def alphas(self) -> Mapping[float, int]:
        """Sites per alpha, of all methods that have one; none in the file means the rank."""
        return self._all("alpha")

    def _all(self, name: str) -> Mapping[float, int]:
        return sum((Counter(values.get(name, {})) for values in self.hyper_parameters.values()), Counter[float]())


def inspect(path: str | Path) -> Inspection:
    """Tell what a safetensors adapter file holds. Raises UserError for one that is no such file or is damaged."""
    where = Path(path)
    header = container.read_header(where)
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    unknown, entries = [], {kohya_name(name): entry for name, entry in header.tensors.items()}
    for name, entry in entries.items():
        site, suffix = split(name)
        if component_of(site) is None:
            unknown.append(name)
        else:
            sites.setdefault(site, {})[suffix] = entry.shape
    spec = Spec.from_metadata(header.metadata, str(where))
    if not sites and spec is None:
        shown = ", ".join(unknown[:3]) or "no tensor"
        raise UserError(f"{where} is no adapter of a known layout: it holds {shown}{', ...' if len(unknown) > 3 else ''}")
    told = _hyper_parameters(where, entries, sites)
    known = methods.known().values()
    beside = frozenset[str]().union(*(one.constants if spec is None else one.constants | one.fillers for one in known))
    return Inspection(
        path=where,
        size=header.size,
        sha256=container.sha256(where),
        spec=spec,
        metadata=header.metadata,
        methods=tuple(sorted(told)),
        components=Counter(component_of(site) or "" for site in sites),
        hyper_parameters=told,
        network=kohya_network.from_metadata(header.metadata),
        dtypes=Counter(entry.dtype for entry in header.tensors.values()),
        parameters=sum(_numel(shape) for s in sites.values() for suffix, shape in s.items() if suffix not in beside),
        sites=sites,
        unknown=tuple(unknown),
    )


def _hyper_parameters(
    path: Path, entries: Mapping[str, Entry], sites: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[str, Counter[float]]]:
    """How many sites have which value of which hyper-parameter of which method."""
    known = methods.known()
    constants = frozenset[str]().union(*(method.constants for method in known.values()))
    found: dict[str, dict[str, Counter[float]]] = {}
    for site, shapes in sites.items():
        scalars = {
            suffix: container.read_scalar(path, entries[f"{site}.{suffix}"]) for suffix in shapes if suffix in constants
        }
        for method, kind in known.items():
            values = kind.told(shapes, scalars)
            if values is not None:
                own = found.setdefault(method, {})
                for name, value in values.items():
                    own.setdefault(name, Counter())[value] += 1
    return found


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
