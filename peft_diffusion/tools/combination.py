"""How the changes that several adapters make at one site become one.

Rules work number by number on tensors of one shape: whole changes of a weight, or what of them an alignment has left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import LowRank
from ..core.reduction import summed
from .tool_settings import Rule

_NO_DIRECTION = 1e-6  # of the largest singular value: what is below is rounding


@dataclass(frozen=True)
class Combination:
    """A rule with its numbers.

    Attributes:
        rule: Which.
        density: The share of numbers that it keeps of each change (above 0 to 1).
        seed: Of what DARE drops.
    """

    rule: Rule
    density: float = 0.5
    seed: int = 0

    def __call__(self, changes: Sequence[Tensor], strengths: Sequence[float], site: int) -> Tensor:
        """Make one change of several.

        Args:
            changes: At strength 1, of one shape.
            strengths: Of each.
            site: The number of the site, so that DARE drops other numbers at each.

        Returns:
            The change.
        """
        return _RULES[self.rule](self, changes, strengths, site)


def linear(changes: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Add changes.

    Args:
        changes: Of one shape.
        strengths: Of each.

    Returns:
        The weighted sum.
    """
    total = torch.zeros_like(changes[0])
    for change, strength in zip(changes, strengths, strict=True):
        total.add_(change, alpha=strength)
    return total


def trimmed(change: Tensor, density: float) -> Tensor:
    """Keep the numbers of the largest magnitude.

    Args:
        change: Any tensor.
        density: The share that is kept.

    Returns:
        The change, with 0 elsewhere.
    """
    number = int(density * change.numel())
    if number >= change.numel():
        return change
    chosen = change.abs().flatten().topk(number, sorted=False).indices
    kept = torch.zeros_like(change).flatten()
    kept[chosen] = change.flatten()[chosen]
    return kept.view_as(change)


def elected(changes: Sequence[Tensor], strengths: Sequence[float]) -> Tensor:
    """Elect a sign for each number by the sum of the changes, and take the mean of those that have it.

    The second and third step of TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708). As in peft, strengths weigh the
    mean and not the election, and where all is 0 the sign is +.

    Args:
        changes: Of one shape, trimmed or dropped already.
        strengths: Of each.

    Returns:
        The change.
    """
    stacked = torch.stack(tuple(changes))
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == sign
    weights = torch.tensor(strengths, dtype=stacked.dtype).view(-1, *[1] * (stacked.ndim - 1))
    return (stacked * weights * agree).sum(0) / agree.sum(0).clamp_min(1)


def _dropped(combination: Combination, changes: Sequence[Tensor], site: int) -> list[Tensor]:
    """Numbers dropped at random, and the others scaled so that the sum stays the same in the mean: DARE (Yu et al. 2023,
    https://arxiv.org/abs/2311.03099)."""
    found = []
    for place, change in enumerate(changes):
        generator = torch.Generator().manual_seed((combination.seed * 1_000_003 + site) * 1_009 + place)
        kept = torch.rand(change.shape, generator=generator) < combination.density
        found.append(change * kept / combination.density)
    return found


def _ties(combination: Combination, changes: Sequence[Tensor], strengths: Sequence[float], site: int) -> Tensor:
    return elected([trimmed(change, combination.density) for change in changes], strengths)


def _magnitude(combination: Combination, changes: Sequence[Tensor], strengths: Sequence[float], site: int) -> Tensor:
    return linear([trimmed(change, combination.density) for change in changes], strengths)


def _dare_ties(combination: Combination, changes: Sequence[Tensor], strengths: Sequence[float], site: int) -> Tensor:
    return elected(_dropped(combination, changes, site), strengths)


def _dare_linear(combination: Combination, changes: Sequence[Tensor], strengths: Sequence[float], site: int) -> Tensor:
    return linear(_dropped(combination, changes, site), strengths)


_RULES: Mapping[str, Callable[[Combination, Sequence[Tensor], Sequence[float], int], Tensor]] = {
    "ties": _ties,
    "magnitude": _magnitude,
    "dare-ties": _dare_ties,
    "dare-linear": _dare_linear,
}


def knots(pairs: Sequence[LowRank], strengths: Sequence[float], rule: Combination, site: int) -> LowRank:
    """Merge in the basis of outputs that all changes share (KnOTS, Stoica et al. 2024, https://arxiv.org/abs/2410.19735).

    With ``U S [V_1 ... V_n]`` the decomposition of the changes side by side, the rule is applied to all ``S V_i``. The
    changes are never multiplied out: the decomposition is that of the small matrix between bases of their factors.

    Args:
        pairs: The changes at strength 1: ``down`` (rank, inputs), ``up`` (outputs, rank).
        strengths: Of each.
        rule: What is applied in that basis.
        site: The number of the site.

    Returns:
        The change, of at most the sum of the ranks.
    """
    basis, core = torch.linalg.qr(summed(pairs).up)
    cores = core.split([pair.up.shape[1] for pair in pairs], 1)
    small = torch.cat([part @ torch.linalg.qr(pair.down.mT)[1].mT for part, pair in zip(cores, pairs, strict=True)], 1)
    u = _directions(small)
    aligned = [u.mT @ part @ pair.down for part, pair in zip(cores, pairs, strict=True)]
    return LowRank(rule(aligned, strengths, site), basis @ u)


def core_space(pairs: Sequence[LowRank], strengths: Sequence[float], rule: Combination, site: int) -> LowRank:
    """Merge in the bases of inputs and of outputs that all changes share (Core Space, Panariello et al. 2025,
    https://arxiv.org/abs/2509.17786).

    The bases are the left singular vectors of all ``up`` side by side, and the right ones of all ``down`` below one another.

    Args:
        pairs: The changes at strength 1: ``down`` (rank, inputs), ``up`` (outputs, rank).
        strengths: Of each.
        rule: What is applied in those bases.
        site: The number of the site.

    Returns:
        The change, of at most the sum of the ranks.
    """
    every = summed(pairs)
    left, right = _directions(every.up), _directions(every.down.mT)
    cores = [(left.mT @ pair.up) @ (pair.down @ right) for pair in pairs]
    return LowRank(right.mT, left @ rule(cores, strengths, site))


def _directions(columns: Tensor) -> Tensor:
    """The left singular vectors of a matrix, but for those of rounding; at least one."""
    basis, core = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(core, full_matrices=False)
    number = max(1, int((values > _NO_DIRECTION * values[0]).sum()))
    directions: Tensor = basis @ u[:, :number]
    return directions
