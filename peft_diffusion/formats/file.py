"""The one way to save an adapter and the one way to load it."""

import io
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..bases import components, describe
from ..bases import family as families
from ..bases.base import AnyBase
from ..core import site as sites
from ..core import targets
from ..core.adapter import Adapter, Described, PairForm, Piece, StoredPair, chained
from ..core.errors import DamagedError, UserError, first_line
from ..core.files import at_home, write_bytes
from ..core.merge import dense_weight
from ..core.parsing import refusing
from ..core.recent import Recent
from . import container, metadata
from . import layout as layouts
from .layout import Content, Layout, SaveDtype, Whole, Written
from .names import site_name
from .origin import NOT_RUN, origin
from .planning import IDLE, NO_METHOD, NO_SITE, WHICH, Plan, SitePlan, by_reason, plan, refuse_leftovers, some, told_damage
from .spec import KEY as SPEC
from .spec import Spec, other_weights, refuse_unknown

if TYPE_CHECKING:
    from ..bases.base import BaseInfo
    from ..bases.causal_lm import LanguageInfo

Info: TypeAlias = "Callable[[], BaseInfo | LanguageInfo]"
"""Describes a base, as `bases.describe` does."""

_PROJECTION = "text_projection"

DTYPES: Mapping[SaveDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "float32": torch.float32}
"""What the numbers of a file are rounded to, by the names that settings have for them."""


@dataclass(frozen=True)
class Coverage:
    """How much of a file found its place.

    Attributes:
        found: Tensors that did.
        sites: The sites that they make.
        unmatched: The names of the tensors that did not.
    """

    found: int
    sites: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """The adapters of a file, ready for ``attach_built``.

    Attributes:
        components: By component and path.
        spec: What the file says of itself; empty for files of other programs.
        report: How much of the file found its place.
        warnings: What the person should know.
        plan: What the file was planned to hold.
        stored: Of further sites, the pairs as the file holds them, by component and path; none where all was to be built.
        left: By name, why a tensor of the file makes no part of an adapter.
    """

    components: dict[str, dict[str, Adapter]]
    spec: Spec
    report: Coverage
    warnings: tuple[str, ...]
    plan: Plan
    stored: Mapping[str, Mapping[str, StoredPair]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def at(self, component: str) -> dict[str, Adapter | StoredPair]:
        """Give all that there is for a component, for ``attach_built``.

        Args:
            component: Its name.

        Returns:
            By path.
        """
        return {**self.components.get(component, {}), **self.stored.get(component, {})}

    def by_component(self) -> dict[str, dict[str, Adapter | StoredPair]]:
        """Give all that there is, for ``attach_built``.

        Returns:
            By component and path.
        """
        return {component: self.at(component) for component in dict.fromkeys((*self.components, *self.stored))}


@dataclass(frozen=True)
class _Site:
    """A site of the base and what a file holds for it."""

    component: str
    path: str
    plan: SitePlan


def save(
    path: str | Path,
    components: Mapping[str, nn.Module],
    name: str,
    spec: Spec,
    *,
    layout: str = layouts.DEFAULT,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter as one safetensors file, aside and then renamed.

    Args:
        path: The file to make or replace. Its layout may put others beside it.
        components: The components that carry the adapter, by name.
        name: What it is called on them.
        spec: What the file says of itself.
        layout: The layout of the file: kohya, which also holds what only this package knows; diffusers, peft, original
            (kohya-sgm), lycoris, omi, embedding, embedding-a1111 or embedding-diffusers; or one of a plug-in.
        dtype: What its numbers are rounded to; None for no rounding.

    Raises:
        UserError: None of the components carries it, the layout is not known or cannot say it, or nothing can be written.
    """
    write(path, _attached(components, name, spec), layout=layout, dtype=dtype)


def check(path: str | Path, components: Mapping[str, nn.Module], name: str, spec: Spec, *, layout: str) -> None:
    """See that `save` can write an adapter, before time goes into it. Nothing is written.

    Args:
        path: As of `save`.
        components: As of `save`.
        name: As of `save`.
        spec: As of `save`, as far as it is known.
        layout: As of `save`.

    Raises:
        UserError: The layout is not known or cannot say it, or has another name for its file.
    """
    _named(at_home(Path(path)), layout, layouts.find(layout).write(_attached(components, name, spec)))


def _attached(components: Mapping[str, nn.Module], name: str, spec: Spec) -> Content:
    adapters = {key: built for key, part in components.items() if (built := sites.adapters(part, name))}
    if not adapters:
        raise UserError(f"no adapter {name!r} is attached, so there is nothing to save")
    return Content(adapters, {key: components[key] for key in adapters}, spec)


def _named(file: Path, layout: str, written: Written) -> Path:
    """The file to write. Raises UserError where the layout has another name for it."""
    is_file = file.suffix.lower() == ".safetensors" or container.is_pickle(file)  # and no folder, as style-v1.5 is
    if written.file_name and not is_file:
        file = file / written.file_name
    if written.file_name and file.name != written.file_name:
        raise UserError(
            f"{file}: files of the layout {layout!r} are found only under the name {written.file_name}; choose"
            f" {file.with_name(written.file_name)}, in a folder of its own"
        )
    return file


def _keep(tensor: Tensor) -> None:
    """What is in memory stays there."""


def write(
    path: str | Path,
    content: Content,
    *,
    layout: str = layouts.DEFAULT,
    dtype: torch.dtype | None = None,
    like: Sequence[torch.dtype] = (),
    kept: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
    let_go: Callable[[Tensor], None] = _keep,
) -> Path:
    """Write adapters as one file, aside and then renamed. Tensors are rounded one at a time.

    Args:
        path: The file to make or replace. Its layout may put others beside it, and may have a name of its own for it: then a
            path without an ending is the folder.
        content: What it is to hold.
        layout: The layout of the file.
        dtype: What its numbers are rounded to; None for no rounding. A single number, such as alpha, is never rounded.
        like: Without ``dtype``: a tensor takes the first of these that holds it exactly, and float32 where none does.
        kept: Metadata of the file that the content comes from, which are kept. Of another program's file, which has no spec,
            ``content.spec`` then only chooses names, and nothing of it is said.
        more: Further entries of the metadata, which go before all others.
        let_go: Is called with each tensor after it was read, as `core.spill.Spill.release`.

    Returns:
        The file that was written.

    Raises:
        UserError: The layout is not known or cannot say it, a number is beyond ``dtype``, or nothing can be written.
    """
    written = layouts.find(layout).write(content)
    file = _named(at_home(Path(path)), layout, written)
    told = written.metadata
    if kept is not None:
        told = {**kept, **{key: value for key, value in told.items() if SPEC in kept or key in written.needed}}
    if container.is_pickle(file):
        tensors = {name: _rounded(file, name, tensor, dtype, like) for name, tensor in written.tensors.items()}
        _write_pickle(file, layout, written, tensors)
    else:
        _write_each(file, written, {**told, **(more or {})}, dtype, like, let_go)
    for other, text in written.beside.items():
        write_bytes(file.with_name(other), text.encode())
    return file


def _write_each(
    file: Path,
    written: Written,
    told: Mapping[str, str],
    dtype: torch.dtype | None,
    like: Sequence[torch.dtype],
    let_go: Callable[[Tensor], None],
) -> None:
    """Write a safetensors file. Each tensor is rounded twice, to tell its dtype and to be written, and is then let go."""

    def rounded(name: str) -> Tensor:
        return _rounded(file, name, written.tensors[name], dtype, like)

    def release(name: str) -> None:
        let_go(written.tensors[name])

    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in written.tensors.items():
        forms[name] = (rounded(name).dtype, tuple(tensor.shape))
        release(name)
    container.write_each(file, forms, rounded, told, release)


def _rounded(file: Path, name: str, tensor: Tensor, dtype: torch.dtype | None, like: Sequence[torch.dtype]) -> Tensor:
    """A tensor as a file holds it. Raises UserError where that is infinite and was not."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    for exact in like if dtype is None else (dtype,):
        rounded = tensor.to(exact)
        if torch.equal(rounded.to(tensor.dtype), tensor):
            return rounded
    if dtype is None or tensor.numel() == 1:
        return tensor
    if not bool(torch.isfinite(rounded).all()):
        largest = f"{float(tensor.abs().max()):.4g}"
        raise UserError(
            f"{file}: {name} holds {largest}, which is beyond {dtype}; take bf16 or float32".replace("torch.", "")
        )
    return rounded


def _write_pickle(file: Path, layout: str, written: Written, tensors: Mapping[str, Tensor]) -> None:
    """Write what torch.save is given. Raises UserError where the layout has no such files."""
    if written.pickled is None:
        raise UserError(
            f"{file}: files of the layout {layout!r} end in .safetensors; choose {file.with_suffix('.safetensors')}"
        )
    by_id = {id(own): tensors[name] for name, own in written.tensors.items()}

    def as_written(value: object) -> object:
        if isinstance(value, Mapping):
            return {key: as_written(one) for key, one in value.items()}
        return by_id.get(id(value), value)

    buffer = io.BytesIO()
    torch.save(as_written(written.pickled), buffer)
    write_bytes(file, buffer.getvalue())


def load(
    source: str | Path | Plan,
    pipe: AnyBase,
    *,
    strict: bool = False,
    build: bool = True,
    info: "Info | None" = None,
    pinned: bool = False,
    aside: Callable[[Tensor], Tensor] | None = None,
) -> Loaded:
    """Read an adapter file for a base. Nothing is attached.

    Args:
        source: The file, a folder of peft or diffusers, or the plan that was made of it, which saves parsing it again.
        pipe: The base, a pipeline or a ``LanguageModel``, or the ``Skeleton`` of one.
        strict: Whether to refuse a file of which a tensor is left out; otherwise they are listed in the report.
        build: Whether to build every adapter. If not, sites with nothing but a pair of low rank have that as it is stored.
        info: As of `Bound.warnings_for`.
        pinned: Whether to read into memory that stays in its place, from which a GPU copies faster.
        aside: Puts a tensor aside, as `core.spill.Spill.put`; then one site at a time is read and in memory. Otherwise the
            file is read at once.

    Returns:
        The adapters.

    Raises:
        UserError: The file is no adapter, is damaged, was changed since it was planned, or does not fit the base.
    """
    found = source if isinstance(source, Plan) else plan(source)
    bound = bind(found, pipe)
    data = None if aside is not None or found.loaded is not None else found.data(keep=not build, pinned=pinned)
    modules = {part: targets.modules(bound.parts[part]) for part in dict.fromkeys(part for part, _ in bound.sites)}
    if not all(path in modules[part] for part, path in bound.sites):  # it was taken out since an earlier file was bound
        _tables.forget()
        bound = bind(found, pipe)
    stored = bound.stored(modules, data) if aside is None and not build else {}
    tensors: Mapping[str, Tensor] = {}
    left = _left(bound, stored)
    if left:
        tensors = found.stored() if data is None else data.tensors()
    built: dict[str, dict[str, Adapter]] = {}
    learned: dict[str, set[str]] = {}
    for component, path in left:
        adapter = bound.build(component, path, tensors)
        if adapter is not None:
            _put_aside(adapter, aside)
            built.setdefault(component, {})[path] = adapter
            for word in adapter.learned_words() if families.components()[component].embeddings else ():
                learned.setdefault(word, set()).add(component)
    _refuse_empty(found, built or stored, bound.left, pipe)
    if strict:
        refuse_leftovers(found.path, bound.left)
    report = Coverage(
        len(found.header.tensors) - len(bound.left),
        sum(len(one) for one in built.values()) + sum(len(one) for one in stored.values()),
        tuple(bound.left),
    )
    warnings = (*bound.warnings_for(info), *_unread_words(found, learned, bound.parts))
    return Loaded(built, found.spec or Spec(), report, warnings, found, stored, bound.left)


def _left(bound: "Bound", stored: Mapping[str, Mapping[str, StoredPair]]) -> "list[tuple[str, str]]":
    """The sites of which a file's pairs are not all."""
    if sum(map(len, stored.values())) == len(bound.sites):
        return []
    return [(component, path) for component, path in bound.sites if path not in stored.get(component, ())]


def _put_aside(adapter: Adapter, aside: Callable[[Tensor], Tensor] | None) -> None:
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        tensor.data = tensor.data if aside is None else aside(tensor.data)


def bind(found: Plan, pipe: AnyBase) -> "Bound":
    """Find the sites of a base that a file holds adapters for. Reads no tensor.

    Args:
        found: The file.
        pipe: The base.

    Returns:
        The sites, whose adapters can be built one by one.

    Raises:
        UserError: The file is no adapter, needs a plug-in, or holds a tensor of a site under two names.
    """
    if found.spec is not None:
        refuse_unknown(found.spec, str(found.path))
    if not found.sites:
        raise found.is_none()
    parts = components(pipe)
    key = (id(found.sites), *map(id, parts.values()))
    known = _tables.get(key)
    if known is not None and known.holds(found, parts):
        return Bound(found, pipe, parts, known.sites, found.unread, known.forms)
    bound, left = _bound(found, parts)
    sites_of = {(one.component, one.path): one for one in bound}
    table = _Table(found.sites, {name: weakref.ref(part) for name, part in parts.items()}, sites_of)
    if left == found.unread:
        _tables.put(key, table)
    return Bound(found, pipe, parts, sites_of, left, table.forms)


@dataclass(frozen=True)
class _Table:
    """Where the names of a plan lead in the components of a base that it fits whole; other files of its shape have the same.

    The plan's sites are kept so that their address stays their own. The components may be gone.
    """

    planned: Mapping[str, Mapping[str, SitePlan]]
    parts: "Mapping[str, weakref.ref[nn.Module]]"
    sites: "Mapping[tuple[str, str], _Site]"
    forms: "Recent[container.Listing, _Forms]" = field(default_factory=lambda: Recent(4))

    def holds(self, found: Plan, parts: Mapping[str, nn.Module]) -> bool:
        """Whether these are the same plan and components."""
        return found.sites is self.planned and {name: one() for name, one in self.parts.items()} == dict(parts)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a file holds the pair of a site, and where: the run of each matrix, and how many numbers are before it there.

    Attributes:
        path: Of the site.
        form: Of the pair.
        down: Where ``down`` is.
        up: Where ``up`` is.
        alpha: Which of the numbers in tensors is the pair's; None for none.
    """

    path: str
    form: PairForm
    down: tuple[int, int]
    up: tuple[int, int]
    alpha: int | None


@dataclass(frozen=True)
class _Forms:
    """The pairs that stay as a file holds them, by component, and where the numbers are that scales are made of.

    They were found for these modules, by component and path, each with its class without adapters.
    """

    sites: Mapping[str, Sequence[_Form]]
    numbers: Sequence[tuple[int, int]]
    modules: "Sequence[tuple[str, str, weakref.ref[nn.Module], type[nn.Module]]]"

    def hold(self, modules: Mapping[str, Mapping[str, nn.Module]]) -> bool:
        """Whether these are still the modules that they were found for."""
        return all(
            (module := modules[component].get(path)) is known() and isinstance(module, kind)
            for component, path, known, kind in self.modules
        )

    def pairs(self, flats: Sequence[Tensor]) -> dict[str, dict[str, StoredPair]]:
        """What a file holds, by component and path, without pairs whose number is none."""
        numbers = _numbers(flats, self.numbers)
        found: dict[str, dict[str, StoredPair]] = {}
        for component, own in self.sites.items():
            pairs = found[component] = {}
            for one in own:
                form, (run, start), (other, above) = one.form, one.down, one.up
                number = form.constant if one.alpha is None else numbers[one.alpha]
                scale = form.scale(number, form.rank)
                if scale is not None:
                    down, up = Piece(flats[run], start), Piece(flats[other], above)
                    pairs[one.path] = StoredPair(form, down, up, number, scale)
        return found


def _numbers(flats: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> list[float]:
    """Single numbers, with one look at each run."""
    by_run: dict[int, list[int]] = {}
    for run, start in places:
        by_run.setdefault(run, []).append(start)
    found = {run: iter(flats[run][torch.tensor(starts)].tolist()) for run, starts in by_run.items()}
    return [float(next(found[run])) for run, _ in places]


_tables: Recent[tuple[int, ...], _Table] = Recent(32)


@dataclass(frozen=True)
class Bound:
    """The sites of a base that a file holds adapters for.

    Attributes:
        plan: The file.
        base: The base.
        parts: Its components.
        sites: By component and path.
        left: By name, why a tensor of the file makes no part of an adapter.
    """

    plan: Plan
    base: AnyBase
    parts: Mapping[str, nn.Module]
    sites: "Mapping[tuple[str, str], _Site]"
    left: Mapping[str, str]
    _known: "Recent[container.Listing, _Forms]"

    def stored(
        self, modules: Mapping[str, Mapping[str, nn.Module]], data: container.Data | None
    ) -> dict[str, dict[str, StoredPair]]:
        """Take the pairs of a file as it holds them.

        Args:
            modules: Those of the components with sites, by component and path.
            data: The bytes of the file; None for a pickle, whose tensors the plan has.

        Returns:
            Those of sites with nothing but a pair of low rank, by component and path.

        Raises:
            UserError: There is one, and the file holds NaN or infinity; the numbers of others are not looked at.
        """
        listing = self.plan.header.listing
        if data is None or listing is None:
            tensors = self.plan.stored()
            told = {name: Described(one.dtype, tuple(one.shape)) for name, one in tensors.items()}
            places = {name: (number, 0) for number, name in enumerate(told)}
            return self._forms(modules, told, places).pairs([one.reshape(-1) for one in tensors.values()])
        forms = self._known.get(listing)
        if forms is None or not forms.hold(modules):
            entries = listing.tensors.items()
            told = {name: Described(container.torch_dtype(one), one.shape) for name, one in entries}
            forms = self._forms(modules, told, listing.places)
            self._known.put(listing, forms)
        return forms.pairs(data.flats()) if forms.sites else {}

    def _forms(
        self,
        modules: Mapping[str, Mapping[str, nn.Module]],
        told: Mapping[str, Described],
        places: Mapping[str, tuple[int, int]],
    ) -> _Forms:
        """Find the pairs among what a header tells of tensors."""
        found: dict[str, list[_Form]] = {}
        numbers: list[tuple[int, int]] = []
        seen: list[tuple[str, str, weakref.ref[nn.Module], type[nn.Module]]] = []
        for (component, path), site in self.sites.items():
            names, module = site.plan.simple, modules[component].get(path)
            if module is not None:
                seen.append((component, path, weakref.ref(module), sites.base_class(module)))
            if names is None or module is None or isinstance(getattr(module, "base_layer", None), nn.Module):
                continue
            own = {suffix: told[name] for suffix, name in names.items()}
            form = site.plan.methods[0].stored(module, own, site.plan.constants)
            if form is None:
                continue
            alpha = None if form.alpha is None else len(numbers)
            if form.alpha is not None:
                numbers.append(places[names[form.alpha]])
            down, up = places[names[form.down]], places[names[form.up]]
            found.setdefault(component, []).append(_Form(path, form, down, up, alpha))
        return _Forms(found, numbers, seen)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the person should know."""
        return self.warnings_for(None)

    def warnings_for(self, info: "Info | None") -> tuple[str, ...]:
        """Say what the person should know.

        Args:
            info: Describes the base, for one who has done that before; it is called only where the file names a base.

        Returns:
            A line each.
        """
        return (*self.plan.warnings, *_warnings(self.plan, self.left, self.base, info))

    def build(
        self, component: str, path: str, tensors: Mapping[str, Tensor], module: nn.Module | None = None
    ) -> Adapter | None:
        """Make the adapter of a site.

        Args:
            component: The name of its component.
            path: Its path there.
            tensors: Those of the file, of which only the site's are asked for.
            module: What stands in for the module of the base, with weights where that has none.

        Returns:
            The adapter, of one method or several; None where there is none that is known.

        Raises:
            UserError: The file is damaged, or does not fit the base.
        """
        site = self.sites[component, path]
        target = self.parts[component].get_submodule(path) if module is None else module
        adapter = _built(site, target, self.plan, tensors, self.base)
        if adapter is not None:
            _refuse_not_finite(self.plan.path, site, adapter)
        return adapter


def paths_by_name(component: str, module: nn.Module) -> dict[str, str]:
    """List every name that files use for the modules of a component.

    Args:
        component: Its name.
        module: The component itself.

    Returns:
        Paths by name, as `names.site_name` spells it.

    Raises:
        UserError: Two modules share a name, which no Stable Diffusion has.
    """
    found: dict[str, str] = {}
    own = [(name, path) for one in layouts.known().values() for name, path in one.sites(component, module).items()]
    for name, path in [*((path, path) for path in targets.modules(module)), *own]:
        key = site_name(name)
        if found.setdefault(key, path) != path:
            raise UserError(f"{component}.{path} and {component}.{found[key]} would share the name {key}")
    return found


def _bound(found: Plan, parts: Mapping[str, nn.Module]) -> tuple[list[_Site], dict[str, str]]:
    """The sites of a base that a file holds an adapter for, and by name why tensors have none. Raises UserError where the
    file holds a tensor of a site under two names."""
    places = {(one.sources[0].place.component, *one.sources[0].place.others) for _, _, one in found.each()}
    roles = {families.role_of(component) for candidates in places for component in candidates}
    meant = {component: module for component, module in parts.items() if families.role_of(component) in roles}
    paths = {component: paths_by_name(component, module) for component, module in meant.items()}
    left = dict(found.unread)
    bound: dict[tuple[str, str], SitePlan] = {}
    for _, name, one in found.each():
        place = one.sources[0].place
        candidates = [place.component, *place.others]
        present = [component for component in candidates if name in paths.get(component, ())]
        component = next((one for one in present if place.component_named or _is_only(one, parts)), None)
        if component is None:
            why = NO_SITE if place.component_named else _which(place.component, name, paths)
            if name == _PROJECTION and families.role_of(place.component) == "text encoder":
                why = IDLE
            left |= {**dict.fromkeys((source.name for source in one.sources), why), **one.leftovers}
            continue
        key = (component, paths[component][name])
        bound[key] = bound[key].joined(one, found.path) if key in bound else one
    _tie(bound, parts)
    left |= {name: why for one in bound.values() for name, why in one.leftovers.items()}
    return [_Site(component, path, one) for (component, path), one in bound.items() if one.methods], left


def _which(component: str, name: str, paths: Mapping[str, Mapping[str, str]]) -> str:
    """Why a site has no component whose name tells none: there is no such site, or several may be meant."""
    among = [other for other in paths if families.role_of(other) == families.role_of(component)]
    known = len(among) > 1 and any(name in paths[other] for other in among)
    return WHICH.format(" and ".join(among), among[0]) if known else NO_SITE


def _tie(bound: dict[tuple[str, str], SitePlan], parts: Mapping[str, nn.Module]) -> None:
    """Let modules that share a weight change together where the file means that, as a head that is tied to its embedding."""
    for (component, path), one in list(bound.items()):
        if any(source.place.whole is not None and source.place.whole.tied for source in one.sources):
            weight = getattr(parts[component].get_submodule(path), "weight", None)
            for other, module in parts[component].named_modules():
                if weight is not None and getattr(module, "weight", None) is weight:
                    bound.setdefault((component, other), one)


def _is_only(component: str, parts: Mapping[str, nn.Module]) -> bool:
    """Whether a name that tells no component can mean this one: of two text encoders it would not say which."""
    role = families.role_of(component)
    return role != "text encoder" or sum(families.role_of(name) == role for name in parts) == 1


def _values(site: _Site, module: nn.Module, found: Plan, tensors: Mapping[str, Tensor], base: AnyBase) -> dict[str, Tensor]:
    """The tensors of a site as its methods know them, by suffix."""
    own: dict[str, Tensor] = {}
    pieces: dict[Layout, dict[str, Tensor]] = {}
    for source in site.plan.sources:
        change, tensor = source.place.change, tensors[source.name]
        value = tensor if change is None else change(tensor)
        if source.place.piece:
            pieces.setdefault(source.layout, {})[source.place.piece] = value
        elif source.place.whole is not None:
            with _at(f"{found.path}: {site.component}.{site.path}"):
                own |= _change(source.place.suffix, source.place.whole, module, value)
        else:
            own[source.place.suffix] = value
    for chosen, values in pieces.items():
        own |= chosen.joined(values, found.header, base, site.component)
    return {**{suffix: torch.tensor(value) for suffix, value in site.plan.constants.items()}, **own}


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say in an error where it arose."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _change(suffix: str, whole: Whole, module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """What a module's own weight or bias, or rows of it, lack of that in a file. Raises UserError where they do not fit."""
    if any(one.is_meta for one in module.parameters(recurse=False)):
        raise UserError(
            "the file holds the weight itself and not its change, which takes the weights of the base; name it with --base"
        )
    own = getattr(module, "bias", None) if whole.parameter == "bias" else dense_weight(module)
    if not isinstance(own, Tensor):
        raise UserError(f"the file holds a bias, and the {type(module).__name__} has none")
    if not whole.rows:
        if own.shape != value.shape:
            raise UserError(f"a {whole.parameter} {tuple(value.shape)} is not that of the base, {tuple(own.shape)}")
        return {suffix: value.float() - own.detach().float().to(value.device)}
    if len(value) != len(whole.rows) or value.shape[1:] != own.shape[1:] or not max(whole.rows) < len(own):
        raise UserError(f"{tuple(value.shape)} are no {len(whole.rows)} rows of the base's {tuple(own.shape)}")
    rows = torch.tensor(whole.rows)
    picks = torch.zeros(len(own), len(rows))
    picks[rows, torch.arange(len(rows))] = 1
    return {suffix: value.float() - own.detach().cpu()[rows], whole.picks: picks}


def _ordered(chosen: Iterable[Any], spec: Spec | None, component: str) -> list[Any]:
    """Methods in the order in which the spec says that they run."""
    order = [str(one.get("method")) for one in spec.methods.get(component, ())] if spec else []
    return sorted(chosen, key=lambda method: order.index(method.name) if method.name in order else len(order))


def _built(site: _Site, module: nn.Module, found: Plan, tensors: Mapping[str, Tensor], pipe: AnyBase) -> Adapter | None:
    """The adapter of one site, of one method or several; None where there is none that is known. Raises UserError."""
    where = f"{site.component}.{site.path}"
    sites.refuse_wrapped(where, module)
    shown = ", ".join(f"{suffix} {shape}" for suffix, shape in site.plan.shapes.items())
    with refusing(f"{found.path}: {where}: {shown} make no adapter; the file is damaged"):
        own = _values(site, module, found, tensors, pipe)
    if site.plan.damage is not None:
        raise UserError(f"{found.path}: {told_damage(where, site.plan.damage)}")
    chosen = _ordered(site.plan.methods, found.spec, site.component)
    try:
        parts = [one.read(module, {key: value for key, value in own.items() if key in one.suffixes}) for one in chosen]
        return chained(parts) if parts else None
    except DamagedError as error:
        raise UserError(f"{found.path}: {where}: {error}; the file is damaged") from None
    except UserError as error:
        raise _wrong_base(found, pipe, f"{where}: {error}") from None
    except Exception as error:  # of whatever makes nothing of such tensors
        told = first_line(error)
        raise UserError(f"{found.path}: {where}: {shown} make no adapter ({told}); the file is damaged") from None


def _refuse_not_finite(path: Path, site: _Site, adapter: Adapter) -> None:
    """Raise UserError for a number that is none, wherever it came from: a tensor, the metadata, a configuration, a scale.

    This is the one place that sees every number as it is used, in float32.
    """
    for suffix, tensor in adapter.state().items():
        if tensor.is_floating_point() and not container.is_finite(tensor):
            raise UserError(
                f"{path}: {suffix} of {site.component}.{site.path} is NaN or infinite, or has a scale that is; the file is"
                " damaged or its training diverged"
            )


def _refuse_empty(found: Plan, built: Mapping[str, Any], left: Mapping[str, str], pipe: AnyBase) -> None:
    """Raise UserError, with the true reason, where nothing of a file can be used."""
    if built:
        return
    reasons = by_reason(left)
    if reasons.keys() == {IDLE}:
        raise UserError(f"{found.path} holds nothing for this base: its tensors {IDLE}")
    if NO_SITE in reasons:
        number = "none" if len(reasons) == 1 else f"{len(left) - len(reasons[NO_SITE])} are not understood, and none"
        raise _wrong_base(found, pipe, f"{number} of its {len(found.header.tensors)} tensors has a site there")
    places = (source.place.suffix for _, _, one in found.each() for source in one.sources if source.name in left)
    kinds = sorted(dict.fromkeys(places)) if reasons.keys() == {NO_METHOD} else []
    if kinds:
        raise UserError(f"{found.path} holds tensors of no method that is known here: {', '.join(kinds[:5])}")
    refuse_leftovers(found.path, left)


def _wrong_base(found: Plan, pipe: AnyBase, reason: str) -> UserError:
    """Say that a file does not fit a base, and that it was made for another one only where it tells so."""
    here, told = describe(pipe), metadata.base_of(found.spec, found.header.metadata)
    made_for = origin(found.header).name
    if made_for in NOT_RUN:
        return UserError(
            f"{found.path} is for {made_for}, which this package does not run; this base is {here.name!r}: {reason}"
        )
    known = "fingerprint" in told and here.fingerprint != ""  # a skeleton has none
    same = told.get("fingerprint") == here.fingerprint if known else told.get("family", here.family) == here.family
    if not same:
        name = f"base {told['name']!r}" if told.get("name") else "a base"
        other = f"{name} ({told['family']})" if told.get("family") else name
        return UserError(f"{found.path} was made for {other}; this base is {here.name!r} ({here.family}): {reason}")
    if known:
        return UserError(f"{found.path} does not fit the base {here.name!r} that it names: {reason}; the file is damaged")
    return UserError(f"{found.path} does not fit the base {here.name!r} ({here.family}): {reason}")


def _unread_words(found: Plan, learned: Mapping[str, set[str]], parts: Mapping[str, nn.Module]) -> list[str]:
    """What is to be told of words of other programs that a text encoder of the base does not know."""
    readers = [name for name in parts if families.role_of(name) == "text encoder"]
    return [
        f"{found.path}: the word {word} was learned for {', '.join(sorted(known))} alone, as for Stable Diffusion 1 and 2;"
        f" {', '.join(name for name in readers if name not in known)} reads it letter by letter here"
        for word, known in learned.items()
        if word and found.spec is None and not known >= set(readers)
    ]


def _warnings(planned: Plan, left: Mapping[str, str], pipe: AnyBase, info: "Info | None" = None) -> tuple[str, ...]:
    path, spec, total = planned.path, planned.spec, len(planned.header.tensors)
    found = [
        f"{path}: {len(names)} of {total} tensors {reason} and were left out: {some(names)}"
        for reason, names in by_reason(left).items()
    ]
    words = container.embedding_beside(path)
    if words is not None:
        found.append(f"{path} was trained with new words, which lie beside it in {words.name}; load that too")
    scheduler = getattr(pipe, "scheduler", None)
    ends_in_noise = scheduler is None or scheduler.config.get("rescale_betas_zero_snr")
    if spec and spec.training.get("zero_terminal_snr") and not ends_in_noise:
        found.append(
            f"{path} was trained with zero terminal SNR: generate and blend draw so; elsewhere take a scheduler of"
            ' rescale_betas_zero_snr=True and timestep_spacing="trailing", or pictures are as light and dark as before'
        )
    predicted = spec.base.get("prediction_type") if spec else None
    made_for = spec.base.get("fingerprint") if spec else None
    if not predicted and not made_for:
        return tuple(found)
    base = describe(pipe) if info is None else info()
    here = getattr(base, "prediction_type", None)
    if predicted and here and predicted != here:
        found.append(
            f"{path} was trained on a base that predicts {predicted}, and this one says {here}; --prediction, and in Python"
            " load_base(..., prediction=...), say otherwise where the base is the same"
        )
    differs = other_weights(path, spec.base, base.fingerprint) if spec else None
    return tuple(found if differs is None else (*found, differs))
