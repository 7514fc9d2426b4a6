"""A LoKr as peft keeps it: one configuration whose choices give the very shapes that the adapters have."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import UserError
from ...core.method import PeftForm, PeftSite
from ..shared.affine import weight_shape
from ..shared.hyper_parameters import ALPHA, MAGNITUDE
from . import CORE, NAMES, W1, W1_A, W1_B, W2, W2_B


@dataclass(frozen=True)
class _Shape:
    """The sizes of a site and of the factors that it has."""

    outputs: int
    inputs: int
    first: tuple[int, int]  # of w1
    rank: int  # 0 where both are one matrix
    whole: tuple[bool, bool]  # whether w1 and w2 are one matrix

    @property
    def second(self) -> tuple[int, int]:
        """The sizes of w2."""
        return self.outputs // self.first[0], self.inputs // self.first[1]

    def peft_rank(self) -> int:
        """A rank with which peft makes these matrices: one that is too large to factor any, where none is factored."""
        return self.rank or max(*self.first, *self.second)

    def is_made(self, factor: int, both: bool) -> bool:
        """Whether peft makes these matrices of these settings (``LoKrLayer.update_layer``)."""
        halves = _factorization(self.outputs, factor), _factorization(self.inputs, factor)
        rank, small = self.peft_rank(), max(self.first)
        whole = not (both and rank < small / 2), rank >= max(self.second) / 2
        return self.first == (halves[0][0], halves[1][0]) and whole == self.whole


def in_peft(adapters: Mapping[str, Adapter]) -> PeftForm:
    """Find the configuration, and bring the adapters into its form.

    Args:
        adapters: By path. They are attached.

    Returns:
        The form.

    Raises:
        UserError: There are magnitudes or the Tucker form, or no configuration of peft makes these factors.
    """
    states = {path: adapter.state() for path, adapter in adapters.items()}
    for path, state in states.items():
        more = next((name for name in (MAGNITUDE, CORE) if name in state), None)
        if more is not None:
            raise UserError(f"{path} has {more}, and files of peft hold none for this method; take the layout 'kohya'")
    shapes = {path: _shape(adapters[path], state) for path, state in states.items()}
    factor, both = _settings(set(shapes.values()))
    sites = {}
    for path, state in states.items():
        rank = shapes[path].peft_rank()
        alpha = float(state[ALPHA]) if shapes[path].rank else float(rank)  # peft scales whole matrices too
        sites[path] = PeftSite({name: state[name] for name in NAMES if name in state}, rank, alpha)
    return PeftForm("LOKR", "alpha", sites, {"decompose_factor": factor, "decompose_both": both})


def _shape(adapter: Adapter, state: Mapping[str, Tensor]) -> _Shape:
    outputs, inputs = weight_shape(adapter.site)[:2]
    first = tuple(state[W1].shape) if W1 in state else (len(state[W1_A]), state[W1_B].shape[1])
    rank = next((len(state[name]) for name in (W2_B, W1_B) if name in state), 0)
    return _Shape(outputs, inputs, (first[0], first[1]), rank, (W1 in state, W2 in state))


def _settings(shapes: Iterable[_Shape]) -> tuple[int, bool]:
    """The factor, and whether w1 is factored too where it is large. Raises UserError where none suit all sites."""
    known = list(shapes)
    largest = max(max(one.first) for one in known)
    for both in (False, True):
        for factor in (*range(largest, 0, -1), -1):
            if all(one.is_made(factor, both) for one in known):
                return factor, both
    raise UserError("peft has one factor for all sites, and none makes the factors that these have; take the layout 'kohya'")


def _factorization(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size as peft chooses them (``peft.tuners.lokr.layer.factorization``)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small = max(one for one in range(1, math.isqrt(size) + 1) if size % one == 0 and (factor < 0 or one <= factor))
    return small, size // small
