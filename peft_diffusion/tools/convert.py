"""Write an adapter file anew in another layout, without its base."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..bases import components as parts_of_base
from ..core.adapter import Adapter
from ..core.errors import UserError, did_you_mean
from ..formats.container import torch_dtype
from ..formats.file import DTYPES, Loaded, load, write
from ..formats.fitting import fitting
from ..formats.layout import Content, find
from ..formats.metadata import lasting
from ..formats.planning import Plan, plan
from ..formats.spec import Spec
from .settings import ConvertConfig


@dataclass(frozen=True)
class Converted:
    """What a conversion gave.

    Attributes:
        path: The file that was written.
        base: The name of the base whose names and shapes it was understood by.
        sites: The number of sites by component.
        warnings: What the person should know.
    """

    path: Path
    base: str
    sites: Mapping[str, int]
    warnings: tuple[str, ...]


def convert(config: ConvertConfig) -> Converted:
    """Write an adapter file anew in another layout, dtype or method. Metadata, triggers and ``ss_*`` are kept.

    Args:
        config: The file, and what is made of it.

    Returns:
        What was written.

    Raises:
        UserError: The file cannot be read, fits no base that is known, holds what is not understood or what the layout
            cannot say, or nothing can be written.
    """
    find(config.to)  # a wrong name is told before anything is read
    found = plan(config.source)
    base = fitting(found, config.base)
    loaded = load(found, base, strict=not config.partial)
    parts = parts_of_base(base)
    adapters = _chosen(config, loaded)
    for component, built in adapters.items():
        for path, adapter in built.items():
            adapter.bind(parts[component].get_submodule(path))
    spec = _spec(found, base.info.family, adapters)
    file = write(
        config.output,
        Content(adapters, {name: parts[name] for name in adapters}, spec),
        layout=config.to,
        dtype=None if config.dtype is None else DTYPES[config.dtype],
        like=_dtypes(found),
        kept=lasting(found.header.metadata),
    )
    sites = {component: len(built) for component, built in adapters.items()}
    return Converted(file, base.info.name, sites, loaded.warnings)


def _spec(found: Plan, family: str, adapters: Mapping[str, object]) -> Spec:
    """What the new file says of itself; of another program's the family alone, by which names are chosen."""
    if found.spec is None:
        return Spec(base={"family": family})
    return replace(found.spec, methods={name: told for name, told in found.spec.methods.items() if name in adapters})


def _chosen(config: ConvertConfig, loaded: Loaded) -> Mapping[str, Mapping[str, Adapter]]:
    """The adapters of the components that were asked for. Raises UserError where a component has none."""
    for name in config.component:
        if name not in loaded.components:
            there = list(loaded.components)
            raise UserError(
                f"{config.source} holds nothing for {name!r}; it has: {', '.join(there)}{did_you_mean(name, there)}"
            )
    return {name: built for name, built in loaded.components.items() if not config.component or name in config.component}


def _dtypes(found: Plan) -> tuple[torch.dtype, ...]:
    """The dtypes of a file's numbers, that of most tensors first."""
    dtypes = (
        [tensor.dtype for tensor in found.loaded.values()]
        if found.loaded is not None
        else [torch_dtype(entry) for entry in found.header.tensors.values()]
    )
    counted = Counter(dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1)
    return tuple(dtype for dtype, _ in counted.most_common())
