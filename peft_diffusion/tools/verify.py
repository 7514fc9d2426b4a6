"""What other programs make of an adapter file: how much of it they read, and how far their changes are from its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.events import Observer
from ..core.wording import number_of
from ..formats.planning import Plan, plan, some
from .key_maps import BUNDLE, PROGRAMS, Taken, Theirs, WeightOf, taken, words_taken
from .reopened import reopened
from .sources import Source, Where, open_sources
from .watch import watched


@dataclass(frozen=True)
class Verified:
    """What one program makes of a file.

    Attributes:
        program: Its name.
        read: How many tensors it reads.
        tensors: How many there are.
        dropped: Why it leaves tensors out, by name.
        refused: Why it refuses the whole file; "" where it does not.
        measured: The sites whose change was compared.
        error: The largest error of a site's change of weight, against the size of that change; None where none was compared.
        worst: The site that has it.
        note: What the person should know of the program.
    """

    program: str
    read: int
    tensors: int
    dropped: Mapping[str, str]
    refused: str
    measured: int
    error: float | None
    worst: str
    note: str

    @property
    def coverage(self) -> float:
        """The share of the tensors that it reads."""
        return self.read / self.tensors if self.tensors else 0.0

    def line(self) -> str:
        """Tell it in one line."""
        if self.refused:
            return f"{self.program}: refuses the file: {self.refused}"
        told = [f"{self.program}: reads {self.coverage:.0%} ({self.read} of {number_of(self.tensors, 'tensor')})"]
        if self.error is not None:
            exact = "exactly as meant" if self.error < _EXACT else f"off by up to {self.error:.1%}, at {self.worst}"
            told.append(f"changes of {number_of(self.measured, 'site')} {exact}")
        told += [f"drops {count}: {why} ({some(_named(self.dropped, why))})" for why, count in self._reasons()]
        return "; ".join([*told, *([self.note] if self.note and self.dropped else [])])

    def _reasons(self) -> list[tuple[str, int]]:
        return Counter(self.dropped.values()).most_common()


_EXACT = 1e-4
"""Up to here an error is that of rounding."""

_EMBEDDING = "embedding"  # the layout of learned words


def _named(dropped: Mapping[str, str], why: str) -> list[str]:
    return [name for name, reason in dropped.items() if reason == why]


def verify(
    source: str | Path | Plan, *, base: str | None = None, observers: Sequence[Observer] = ()
) -> tuple[Verified, ...]:
    """Open an adapter file as other programs do.

    Args:
        source: The file.
        base: Its base, as `ConvertConfig.base`; with its weights what DoRA and the like change is compared too.
        observers: Are told how far it is.

    Returns:
        What each program makes of it: the loaders of diffusers, peft and LyCORIS where they are installed, and ComfyUI,
        Forge, A1111, kohya's scripts and InvokeAI by maps of names that were written from their sources.

    Raises:
        UserError: The file cannot be read, or fits no base that is known.
    """
    found = source if isinstance(source, Plan) else plan(source)
    with watched(observers) as watch:
        (opened,), bones = open_sources([found], base, watch.tell)
        tensors = found.tensors()
        opened = replace(opened, tensors=tensors)  # which is read once
        if found.layouts == (_EMBEDDING,) and not any(name.startswith(BUNDLE) for name in tensors):
            readings = words_taken([*tensors])
        else:
            weight_of = _weights(opened)
            maps = (taken(program, tensors, bones, weight_of) for program in PROGRAMS)
            readings = [*reopened(opened, tensors, weight_of), *maps]
        errors: dict[str, dict[Where, float]] = {one.program: {} for one in readings}
        for where in watch.each("comparing changes", opened.sites):
            meant = _meant(opened, where)
            known: dict[object, float | None] = {}  # most programs do the same
            for one in readings:
                theirs = one.changes.get(where)
                if meant is None or theirs is None or one.refused:
                    continue
                key = one.program if theirs.key is None else theirs.key
                if key not in known:
                    known[key] = _error(theirs, meant)
                if (error := known[key]) is not None:
                    errors[one.program][where] = error
    return tuple(_verified(one, errors[one.program], len(tensors)) for one in readings)


def _weights(source: Source) -> WeightOf:
    """Reads the weights of sites, of which the last is kept: each program asks for that of one site after the other."""

    @lru_cache(maxsize=1)
    def weight_of(where: Where) -> Tensor | None:
        own = getattr(source.module(where), "weight", None)
        return own.detach().float() if isinstance(own, Tensor) and not own.is_meta else None

    return weight_of


@torch.no_grad()
def _meant(source: Source, where: Where) -> Tensor | None:
    """What the file changes at a site, as (outputs, inputs); None where that is not known."""
    try:
        _, change = source.opened(where)
    except UserError:
        return None
    matrix = None if change is None else change.matrix()
    return None if matrix is None else matrix.detach()


def _error(change: Theirs, meant: Tensor) -> float | None:
    """The Frobenius norm of the difference over that of what is meant."""
    theirs = change.compute()
    if theirs is None or theirs.is_meta:
        return None
    if theirs.numel() != meant.numel():
        return 1.0  # of another module, which it does not fit
    size = float(meant.norm())
    difference = float((theirs.detach().float().reshape(meant.shape) - meant).norm())
    return difference / size if size else difference


def _verified(reading: Taken, errors: Mapping[Where, float], tensors: int) -> Verified:
    worst = max(errors, key=lambda where: errors[where], default=None)
    return Verified(
        reading.program,
        0 if reading.refused else len(reading.names),
        tensors,
        {} if reading.refused else reading.dropped,
        reading.refused,
        len(errors),
        None if worst is None else errors[worst],
        "" if worst is None else ".".join(worst),
        reading.note,
    )
