"""Where a run begins from an adapter that is there, and what it is trained beside."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from torch import nn

from .. import formats
from ..bases.base import Base
from ..core import site
from ..core.adapter import Adapter, chained, parts_of
from ..core.errors import UserError
from ..core.events import Observer, Warned
from ..core.others import Other
from ..core.weight_change import change_of
from ..formats import Plan
from ..formats.inspection import ranks_of
from .attachment import NAME
from .events import Begun
from .settings.placements import ranked
from .settings.shared import SharedConfig

S = TypeVar("S", bound=SharedConfig)


class Beside(Protocol):
    """Puts adapters of files on a base and takes them off again; `generation.while_training.beside` does."""

    def __call__(self, base: Base, files: Sequence[str], tell: Observer) -> AbstractContextManager[Sequence[Other]]:
        """Attach adapters for as long as the context is open.

        Args:
            base: A pipeline or a language model.
            files: ``FILE`` or ``FILE=STRENGTH`` each.
            tell: Is told what should be known of the files.

        Returns:
            The context, which gives each of them.
        """
        ...


def with_rank_of_file(config: S) -> S:
    """Give a run the rank of the file that it goes on from, where none was chosen.

    Args:
        config: The settings as they were given.

    Returns:
        The same, with the rank that most sites of the file have, if it is one of LoRAs.

    Raises:
        UserError: The file cannot be read.
    """
    path = config.init_from
    if path is None or (config.resume and not path.exists()):  # what has begun needs the file no more
        return config
    planned = formats.plan(path)
    if config.rank is not None or config.block or not ranked(config):  # type: ignore[arg-type, attr-defined]
        return config
    ranks = ranks_of(planned)
    return replace(config, rank=max(ranks, key=lambda rank: ranks[rank])) if ranks else config


def begin_from(path: Path, base: Base, parts: Mapping[str, nn.Module], tell: Observer) -> dict[str, str]:
    """Make a fresh adapter what the adapter of a file is.

    Args:
        path: The file, of any layout.
        base: The pipeline or language model, whose components carry the fresh adapter.
        parts: The components that are trained, by name.
        tell: Is told what was taken over, and what was not.

    Returns:
        What the new file says of the old one: its name and SHA-256.

    Raises:
        UserError: The file does not fit the base, or a site of the run cannot be what the file has there.
    """
    planned = formats.plan(path)
    loaded = formats.load(planned, base)
    for warning in loaded.warnings:
        tell(Warned(warning))
    taken: list[tuple[float, Adapter, nn.Module, str]] = []
    fresh = {name: site.adapters(part, NAME) for name, part in parts.items()}
    for component, adapters in fresh.items():
        for where, adapter in adapters.items():
            given = loaded.components.get(component, {}).get(where)
            if given is not None:
                module, name = parts[component].get_submodule(where), f"{component}.{where}"
                taken.append((_begin(adapter, given, module, name, planned), given, module, name))
    if not taken:
        raise UserError(
            f"--init-from {path}: it holds nothing at the layers that are trained now; --components and --target choose them"
        )
    untrained = sum(where not in fresh.get(name, ()) for name, built in loaded.components.items() for where in built)
    total = sum(map(len, fresh.values()))
    tell(Begun(path, len(taken), total - len(taken), untrained, _left_out(taken)))
    return {"file": path.name, "sha256": planned.sha256}


def _begin(fresh: Adapter, given: Adapter, module: nn.Module, where: str, found: Plan) -> float:
    """What is left out of a site's change as a share. Raises UserError where it cannot be taken over."""
    for part in (given, *parts_of(given)):
        part.bind(module)
    own, theirs = parts_of(fresh), parts_of(given)
    # One part for all of the other's where it can say them together; else each for its counterpart.
    pairs = [(own[0], chained(theirs))] if len(own) == 1 else list(zip(own, theirs, strict=False))
    errors = [one.begin_as(other) for one, other in pairs]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or (len(own) > 1 and len(own) != len(theirs)):
        kinds = " and ".join(sorted({type(part).__name__.removesuffix("Adapter").lower() for part in theirs}))
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.state().items())
        raise UserError(
            f"--init-from {found.path}: {where} is a {kinds} ({shapes}), which this run's method there cannot begin as;"
            " give the same --method, --rank, --alpha and --option as the file, or --method lora, which takes any change of"
            " weights"
        )
    return max(known, default=0.0)


def _left_out(taken: Sequence[tuple[float, Adapter, nn.Module, str]]) -> float:
    """What is left out of all changes as a share of their norm, by that of each site."""
    if not any(error for error, *_ in taken):  # so that no change is computed for it
        return 0.0
    norms = [_norm(given, module, where) for _, given, module, where in taken]
    whole = sum(norm**2 for norm in norms)
    left = sum((error * norm) ** 2 for (error, *_), norm in zip(taken, norms, strict=True))
    return math.sqrt(left / whole) if whole else 0.0


def _norm(given: Adapter, module: nn.Module, where: str) -> float:
    """The Frobenius norm of the change of a weight; 0 for what is none."""
    try:
        matrix = change_of(given, module, where).matrix()
    except UserError:
        return 0.0
    return 0.0 if matrix is None else float(matrix.norm())
