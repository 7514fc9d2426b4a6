"""Adapters made of changes, for tools: which method holds a pair, a whole weight or a bias is known here.

It stands among the methods, which are looked up without torch.
"""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from .bitfit import LAYER_BIAS, BitFit
from .full import BIAS, WEIGHT, Full
from .lora import DOWN, UP, Lora
from .shared.hyper_parameters import ALPHA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..core.adapter import Adapter, LowRank
    from ..core.weight_change import Change

PAIRS = Lora.name
"""The name of the method that holds pairs."""


def made_of(site: "nn.Module", change: "Change", *, even: bool) -> "list[Adapter]":
    """Make adapters of a change: a LoRA of a pair, else a whole change; beside a pair, a change of the bias.

    Args:
        site: The module that is changed.
        change: What it changes.
        even: Whether both factors of a pair are brought to about the same size, for a file in fp16.

    Returns:
        The adapters in the order in which they run; none where nothing changes.
    """
    parts: list[Adapter] = []
    if change.pair is not None:
        parts.append(_pair(site, _evened(change.pair) if even else change.pair))
    if change.weight is not None:
        beside = {} if change.bias is None else {BIAS: change.bias}
        parts.append(Full.read(site, {WEIGHT: change.weight, **beside}))
    elif change.bias is not None:
        parts.append(_bias(site, change.bias))
    return parts


def is_pair(suffixes: Set[str]) -> bool:
    """Tell whether tensors are those of a pair.

    Args:
        suffixes: What they are called.

    Returns:
        Whether they are.
    """
    return Lora.recognizes(suffixes)


def told_of_pairs(states: Sequence[Mapping[str, "Tensor"]]) -> dict[str, Any]:
    """Say in a spec what pairs there are.

    Args:
        states: The tensors of each by suffix.

    Returns:
        The entry, with the largest rank.
    """
    return Lora(rank=max(len(state[DOWN]) for state in states)).spec()


def _pair(site: "nn.Module", pair: "LowRank") -> "Adapter":
    """A LoRA of a Linear or convolution, of alpha = rank: no program scales it otherwise than another."""
    import torch

    from .shared.affine import weight_shape

    outputs, *inputs = weight_shape(site)
    rank = len(pair.down)
    ones = [1] * (len(inputs) - 1)
    down, up = pair.down.reshape(rank, *inputs), pair.up.reshape(outputs, rank, *ones)
    return Lora.read(site, {DOWN: down, UP: up, ALPHA: torch.tensor(float(rank))})


def _evened(pair: "LowRank") -> "LowRank":
    """Both factors of each rank brought to about the same size by a power of two, which changes no product: below 6e-5 fp16
    has fewer digits, and there an ``up`` with its scale easily lies."""
    import torch

    from ..core.adapter import LowRank

    ratio = (pair.up.norm(dim=0) / pair.down.norm(dim=1)).log2() / 2
    power = torch.where(ratio.isfinite(), ratio, 0.0).round().int()
    return LowRank(torch.ldexp(pair.down, power[:, None]), torch.ldexp(pair.up, -power))


def _bias(site: "nn.Module", bias: "Tensor") -> "Adapter":
    import torch

    from .shared.affine import serves

    if serves(site):
        return BitFit.read(site, {LAYER_BIAS: bias})
    weight = site.weight
    shape = weight.shape if isinstance(weight, torch.Tensor) else bias.shape
    return Full.read(site, {WEIGHT: torch.zeros(shape), BIAS: bias})
