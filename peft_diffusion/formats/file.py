"""The one way to save an adapter and the one way to load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .. import methods
from ..bases import components, describe
from ..bases.base import Base
from ..core import site as sites
from ..core.adapter import Adapter, chained
from ..core.errors import DamagedError, UserError
from . import container
from .layouts import dotted, embedding, kohya
from .layouts.names import component_of
from .spec import Spec, refuse_unknown


@dataclass(frozen=True)
class Coverage:
    """How much of a file found its place: tensors that did, sites that they make, and the tensors that did not."""

    found: int
    sites: int
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """The adapters of a file per component and site path, ready for ``attach_built``; ``warnings`` are for the person."""

    components: dict[str, dict[str, Adapter]]
    spec: Spec
    report: Coverage
    warnings: tuple[str, ...]


def save(path: str | Path, components: Mapping[str, nn.Module], name: str, spec: Spec) -> None:
    """Write the adapter ``name`` that these components carry as one safetensors file, aside and then renamed.

    Raises UserError where none of them carries it or the file cannot be written.
    """
    adapters = {key: built for key, part in components.items() if (built := sites.adapters(part, name))}
    if not adapters:
        raise UserError(f"no adapter {name!r} is attached, so there is nothing to save")
    tensors, metadata = kohya.write(adapters, spec)
    tensors, words = embedding.published(tensors)
    container.write(Path(path), tensors, metadata | words)


def load(path: str | Path, pipe: Base, *, strict: bool = False) -> Loaded:
    """Read an adapter file for a base, a pipeline or a ``LanguageModel``. Nothing is attached.

    Raises UserError for a file that is no adapter, is damaged, or was made for another base; and, if ``strict``, where a
    tensor found no site. Otherwise such tensors are listed in the report.
    """
    path, parts = Path(path), components(pipe)
    tensors = container.read_tensors(path)
    header = None if container.is_pickle(path) else container.read_header(path)
    spec = Spec.from_metadata(header.metadata, str(path)) if header else None
    if spec is not None:
        refuse_unknown(spec, str(path))
    tensors, assumed = dotted.adopted(tensors, header.metadata if header else {}, path)
    tensors = embedding.adopted(tensors, header.metadata if header else {}, pipe, parts, path.stem)
    if not any(component_of(name) for name in tensors):
        shown = ", ".join(list(tensors)[:3]) or "no tensor"
        raise UserError(f"{path} is no adapter of a known layout: it holds {shown}{', ...' if len(tensors) > 3 else ''}")
    sites, unmatched = _by_site(tensors, kohya.site_keys(parts))
    built: dict[str, dict[str, Adapter]] = {}
    for (component, where), own in sites.items():
        try:
            read, unknown = _read_site(parts[component].get_submodule(where), own, spec, component)
        except DamagedError as error:
            raise UserError(f"{path}: {component}.{where}: {error}; the file is damaged") from None
        except UserError as error:
            raise _wrong_base(path, spec, pipe, f"{component}.{where}: {error}") from None
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            shown = ", ".join(f"{suffix} {tuple(tensor.shape)}" for suffix, tensor in own.items())
            raise UserError(f"{path}: {component}.{where}: {shown} make no adapter ({error}); the file is damaged") from None
        unmatched += [f"{component}.{where}: {suffix}" for suffix in unknown]
        if read is not None:
            built.setdefault(component, {})[where] = read
    if not built and sites:
        kinds = sorted({suffix for own in sites.values() for suffix in own})
        raise UserError(f"{path} holds tensors of no method that is known here: {', '.join(kinds[:5])}")
    if not built:
        raise _wrong_base(path, spec, pipe, f"none of its {len(tensors)} tensors has a site there")
    if unmatched and strict:
        raise UserError(f"{path}: {len(unmatched)} tensors have no site in this base: {', '.join(unmatched[:5])}")
    report = Coverage(len(tensors) - len(unmatched), sum(map(len, built.values())), tuple(unmatched))
    return Loaded(built, spec or Spec(), report, (*assumed, *_warnings(path, spec, report, pipe)))


def _by_site(
    tensors: Mapping[str, Tensor], keys: Mapping[str, tuple[str, str]]
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str]]:
    """Tensors by suffix for each component and path, and the names of those without a site."""
    sites: dict[tuple[str, str], dict[str, Tensor]] = {}
    unmatched = []
    for name, tensor in tensors.items():
        place = kohya.place(name, keys)
        if place is None:
            unmatched.append(name)
        else:
            sites.setdefault(place[:2], {})[place[2]] = tensor
    return sites, unmatched


def _read_site(
    site: nn.Module, tensors: Mapping[str, Tensor], spec: Spec | None, component: str
) -> tuple[Adapter | None, list[str]]:
    """The adapter of one site, of one method or several, and the suffixes that none of them knows."""
    order = [str(one.get("method")) for one in spec.methods.get(component, ())] if spec else []
    chosen = [method for method in methods.known().values() if method.recognizes(tensors.keys())]
    chosen.sort(key=lambda method: order.index(method.name) if method.name in order else len(order))
    parts = [m.read(site, {key: value for key, value in tensors.items() if key in m.suffixes}) for m in chosen]
    known = frozenset[str]().union(*(method.suffixes for method in chosen))
    return chained(parts) if parts else None, [suffix for suffix in tensors if suffix not in known]


def _wrong_base(path: Path, spec: Spec | None, pipe: Base, reason: str) -> UserError:
    here = describe(pipe)
    made_for = f"base {spec.base.get('name')!r} ({spec.base.get('family')})" if spec and spec.base else "another base"
    if spec and spec.base.get("name") == here.name and spec.base.get("fingerprint") == here.fingerprint:
        return UserError(f"{path} does not fit the base {here.name!r} that it names: {reason}; the file is damaged")
    return UserError(f"{path} was made for {made_for}; this base is {here.name!r} ({here.family}): {reason}")


def _warnings(path: Path, spec: Spec | None, report: Coverage, pipe: Base) -> tuple[str, ...]:
    found = []
    if report.unmatched:
        shown = ", ".join(report.unmatched[:5])
        count = f"{len(report.unmatched)} of {report.found + len(report.unmatched)}"
        found.append(f"{path}: {count} tensors have no site in this base and were left out: {shown}")
    scheduler = getattr(pipe, "scheduler", None)
    ends_in_noise = scheduler is None or scheduler.config.get("rescale_betas_zero_snr")
    if spec and spec.training.get("zero_terminal_snr") and not ends_in_noise:
        found.append(
            f"{path} was trained with zero terminal SNR: generate and blend draw so; elsewhere take a scheduler of"
            ' rescale_betas_zero_snr=True and timestep_spacing="trailing", or pictures are as light and dark as before'
        )
    made_for = spec.base.get("fingerprint") if spec else None
    if spec and made_for and made_for != describe(pipe).fingerprint:
        name = spec.base.get("name")
        found.append(f"{path} was trained on {name!r}, whose weights differ from this base's; results may differ")
    return tuple(found)
