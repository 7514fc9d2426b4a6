"""Write an adapter file anew in another layout, dtype or method, without its base where it can."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..bases import components as parts_of_base
from ..bases import describe, load_base
from ..bases.base import AnyBase
from ..bases.skeleton import PUBLISHED
from ..core.adapter import Adapter
from ..core.errors import UserError, did_you_mean
from ..core.events import Observer, Warned
from ..core.files import at_home
from ..core.spill import Spill
from ..formats.container import torch_dtype
from ..formats.file import DTYPES, load, write
from ..formats.fitting import fitting
from ..formats.layout import Content
from ..formats.metadata import lasting
from ..formats.planning import Plan, refuse_leftovers
from ..formats.spec import Spec
from .activations import fitted
from .results import Adapters, Made, write_changed
from .settings import ConvertConfig
from .sources import file_dtype, open_sources
from .to_lora import add_fitted, as_lora, refuse_unweighed
from .verify import Verified, verify
from .watch import Watch, watched


@dataclass(frozen=True)
class Converted:
    """What a conversion gave.

    Attributes:
        made: The file, and what a LoRA in place of another method leaves out, by site.
        base: The name of the base whose names and shapes it was understood by.
        sites: The number of sites by component.
        warnings: What the person should know.
        verified: What other programs make of the file, where that was asked for.
    """

    made: Made
    base: str
    sites: Mapping[str, int]
    warnings: tuple[str, ...]
    verified: tuple[Verified, ...] = ()

    @property
    def path(self) -> Path:
        """The file that was written."""
        return self.made.path


def convert(config: ConvertConfig, *, observers: Sequence[Observer] = ()) -> Converted:
    """Write an adapter file anew in another layout, dtype or method. Metadata, triggers and ``ss_*`` are kept.

    Args:
        config: The file, and what is made of it.
        observers: Are told how far it is.

    Returns:
        What was written.

    Raises:
        UserError: The file cannot be read, fits no base that is known, holds what is not understood or what the layout
            cannot say, or nothing can be written.
    """
    with watched(observers) as watch:
        config.check()
        found = config.plan
        done = _copied(config, found, watch) if config.to_lora is None else _lora(config, found, config.to_lora, watch)
    return replace(done, verified=verify(done.path, base=config.base, observers=observers)) if config.verify else done


def _copied(config: ConvertConfig, found: Plan, watch: Watch) -> Converted:
    """The same numbers under other names."""
    weighed = config.base is not None and config.base not in PUBLISHED
    whole = any(one.place.whole is not None for _, _, site in found.each() for one in site.sources)
    base: AnyBase = load_base(str(config.base), dtype="float32") if whole and weighed else fitting(found, config.base)
    info = describe(base)
    spill = Spill(at_home(config.output))
    loaded = load(found, base, aside=spill.put)
    _refuse_part(config, found, loaded.left)
    for warning in loaded.warnings:
        watch.tell(Warned(warning))
    parts = parts_of_base(base)
    chosen = _chosen(config, loaded.components)
    adapters = {name: loaded.components[name] for name in chosen}
    sites_of = [(component, path, adapter) for component, built in adapters.items() for path, adapter in built.items()]
    for component, path, adapter in watch.each("converting sites", sites_of):
        adapter.bind(parts[component].get_submodule(path))
    file = write(
        config.output,
        Content(adapters, {name: parts[name] for name in adapters}, _spec(found, info.family, adapters)),
        layout=config.to,
        dtype=None if config.dtype is None else DTYPES[config.dtype],
        like=_dtypes(found),
        kept=lasting(found.header.metadata),
        let_go=spill.release,
    )
    sites = _counted(adapters)
    return Converted(watch.made(file, sum(sites.values())), info.name, sites, loaded.warnings)


def _refuse_part(config: ConvertConfig, found: Plan, left: Mapping[str, str]) -> None:
    """Raise UserError where tensors are left out and nobody asked for that."""
    if not config.partial:
        try:
            refuse_leftovers(found.path, left)
        except UserError as error:
            raise UserError(f"{error}; --partial leaves them out") from None


def _lora(config: ConvertConfig, found: Plan, rank: int, watch: Watch) -> Converted:
    """A LoRA in place of whatever it is."""
    (source,), bones = open_sources([found], config.base, watch.tell)
    _refuse_part(config, found, source.bound.left)
    chosen = _chosen(config, dict.fromkeys(component for component, _ in source.sites))
    sites = [where for where in source.sites if where[0] in chosen]
    made = Adapters(bones, file_dtype([source], config.dtype), at_home(config.output))
    errors, pending = as_lora(source, made, rank, sites, watch)
    if pending:
        if source.weights is None:
            refuse_unweighed(source, pending[0])
        errors += add_fitted(made, fitted(source, pending, rank, str(config.base), watch))
    file = write_changed(made, found, at_home(config.output), config.to, f"LoRA of rank {rank} of {found.path.name}")
    return Converted(watch.made(file, made.count, errors), bones.info.name, _counted(made.made), source.bound.warnings)


def _counted(adapters: Mapping[str, Mapping[str, Adapter]]) -> dict[str, int]:
    return {component: len(built) for component, built in adapters.items()}


def _spec(found: Plan, family: str, adapters: Mapping[str, object]) -> Spec:
    """What the new file says of itself; of another program's the family alone, by which names are chosen."""
    if found.spec is None:
        return Spec(base={"family": family})
    return replace(found.spec, methods={name: told for name, told in found.spec.methods.items() if name in adapters})


def _chosen(config: ConvertConfig, there: Mapping[str, object]) -> list[str]:
    """The components that were asked for. Raises UserError where one of them has nothing."""
    for name in config.component:
        if name not in there:
            near = did_you_mean(name, there)
            raise UserError(f"{config.source} holds nothing for {name!r}; it has: {', '.join(there)}{near}")
    return [name for name in there if not config.component or name in config.component]


def _dtypes(found: Plan) -> tuple[torch.dtype, ...]:
    """The dtypes of a file's numbers, that of most of them first."""
    counted: Counter[torch.dtype] = Counter()
    if found.loaded is not None:
        for tensor in found.loaded.values():
            counted[tensor.dtype] += tensor.numel()
    else:
        for entry in found.header.tensors.values():
            counted[torch_dtype(entry)] += math.prod(entry.shape)
    return tuple(dtype for dtype, _ in counted.most_common() if dtype.is_floating_point and dtype.itemsize > 1)
