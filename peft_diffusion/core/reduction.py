"""Changes of weights as pairs of low rank: the best pair of a rank, how large a rank has to be, and what it leaves out.

A pair is never multiplied out to be reduced: both factors are brought into orthonormal bases, and what is decomposed is the
small matrix between them. That is exact, and takes thousands of times fewer operations than a decomposition of the weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import LowRank

_PRECISION = 1e-6  # of the largest singular value: what is below is the rounding of float32
_ROUNDING = torch.finfo(torch.float32).eps
_NOTHING = 1e-7  # singular values below this share of the largest span nothing: of a rank that is not used
_SMALL = 256  # up to this side a full decomposition costs nothing
_OVERSAMPLING, _ITERATIONS = 32, 4
_ROWS = 1024  # that are compared at once
_WIDE = 3  # from a third of all ranks on, a full decomposition is not slower than a randomized one


@dataclass(frozen=True)
class Truncation:
    """How many singular values are kept. Of several conditions the smallest number counts; at least one is kept.

    The three shares are what kohya's ``networks/resize_lora.py`` calls ``sv_cumulative``, ``sv_fro`` and ``sv_ratio``.

    Attributes:
        rank: At most so many.
        energy: The fewest whose sum is this share of the sum of all (0 to 1).
        frobenius: The fewest whose Frobenius norm is this share of that of all (0 to 1).
        ratio: Those above the largest divided by this number (above 1).
    """

    rank: int | None = None
    energy: float | None = None
    frobenius: float | None = None
    ratio: float | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the number follows from no singular value."""
        return self.energy is None and self.frobenius is None and self.ratio is None

    def kept(self, values: Tensor) -> int:
        """Tell how many of these singular values are kept.

        Args:
            values: All of them, (number,), falling.

        Returns:
            1 to their number.
        """
        values = values.double()
        found = [len(values)] if self.rank is None else [self.rank]
        if not bool(values.sum() > 0):
            return 1
        if self.energy is not None:
            found.append(_reaching(values.cumsum(0) / values.sum(), self.energy))
        if self.frobenius is not None:
            squares = values.square()
            found.append(_reaching(squares.cumsum(0) / squares.sum(), self.frobenius**2))
        if self.ratio is not None:
            found.append(int((values > values[0] / self.ratio).sum()))
        return max(1, min(*found, len(values)))


def _reaching(shares: Tensor, target: float) -> int:
    return int(torch.searchsorted(shares, target)) + 1


@dataclass(frozen=True)
class Reduced:
    """The best pair of its rank, and what it leaves out.

    Attributes:
        pair: ``down`` (rank, inputs) and ``up`` (outputs, rank), whose product is the change. Both have the same norm, so
            that half precision loses the least.
        error: The Frobenius norm of what is left out over that of the whole; 0 for a whole of zeros.
        norm: The Frobenius norm of the whole.
    """

    pair: LowRank
    error: float
    norm: float


def summed(pairs: Sequence[LowRank], strengths: Sequence[float] | None = None) -> LowRank:
    """Add changes, by writing their ranks one after the other: exact.

    Args:
        pairs: ``down`` (rank, inputs) and ``up`` (outputs, rank) each, of whatever ranks.
        strengths: Of each; None: 1 of all.

    Returns:
        The pair of the sum.
    """
    if len(pairs) == 1 and strengths is None:
        return pairs[0]
    whole = LowRank(torch.cat([pair.down for pair in pairs]), torch.cat([pair.up for pair in pairs], 1))
    if strengths is not None:
        ranks = torch.tensor([len(pair.down) for pair in pairs])
        each = torch.tensor(strengths, dtype=whole.up.dtype).repeat_interleave(ranks)
        whole.up.mul_(each.to(whole.up.device))  # in place: the factors of ten files are not held twice
    return whole


def reduced(change: LowRank | Tensor, wanted: Truncation) -> Reduced:
    """Find the best pair for a change, in the way that is quickest for what it is.

    Args:
        change: A pair, or a matrix (outputs, inputs).
        wanted: How many ranks are kept.

    Returns:
        As `reduced_pair` or `reduced_matrix`.
    """
    return reduced_pair(change, wanted) if isinstance(change, LowRank) else reduced_matrix(change, wanted)


def reduced_pair(pair: LowRank, wanted: Truncation) -> Reduced:
    """Find the best pair for a change that is one already.

    Args:
        pair: ``down`` (rank, inputs) and ``up`` (outputs, rank).
        wanted: How many ranks are kept.

    Returns:
        The pair and its error, both exact.
    """
    down, up = pair.down.float(), pair.up.float()
    reflectors, scales = torch.geqrf(down.mT)
    down_core = reflectors[: len(down)].triu()
    up_core = torch.geqrf(up)[0][: up.shape[1]].triu()
    _, values, v = torch.linalg.svd(up_core @ down_core.mT, full_matrices=False)
    kept = wanted.kept(values)
    whole, rest = _norm(values), _norm(values[kept:])
    basis = torch.zeros(down.shape[1], kept, dtype=down.dtype, device=down.device)
    basis[: v.shape[1]] = v[:kept].mT
    right = torch.ormqr(reflectors, scales, basis)  # only the bases that are kept are made, and on this side alone
    left = up @ (down_core.mT @ v[:kept].mT)  # the change itself on them: no other basis is needed
    roots = values[:kept].sqrt()
    shares = torch.where(values[:kept] > _ROUNDING * values[0], 1 / roots, 0)
    reduced = LowRank(roots[:, None] * right.mT, left * shares)
    return Reduced(reduced, rest / whole if whole else 0.0, whole)


def reduced_matrix(change: Tensor, wanted: Truncation) -> Reduced:
    """Find the best pair for the change of a weight.

    A large matrix is decomposed in a randomized way, with power iterations (Halko, Martinsson and Tropp 2011,
    https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1).

    Args:
        change: (outputs, inputs).
        wanted: How many ranks are kept.

    Returns:
        The pair, and the error that was measured against the whole.
    """
    change = change.float()
    shorter = min(change.shape)
    rank = shorter if wanted.rank is None else min(wanted.rank, shorter)
    if not wanted.is_fixed and shorter > _SMALL:
        rank = wanted.kept(_singular_values(change))
    if shorter <= _SMALL or rank * _WIDE >= shorter:
        u, values, v = torch.linalg.svd(change, full_matrices=False)
        rank = wanted.kept(values)
    else:
        u, values, v = _randomized(change, rank)
    pair = _balanced(u[:, :rank], values[:rank], v[:rank])
    whole = _norm(change)
    return Reduced(pair, _distance(change, pair) / whole if whole else 0.0, whole)


def _distance(change: Tensor, pair: LowRank) -> float:
    """The norm of what a pair leaves of a change, a few rows at a time: the change may be the largest thing in memory."""
    rows = zip(change.split(_ROWS), pair.up.split(_ROWS), strict=True)
    return math.hypot(*(_norm(torch.addmm(own, up, pair.down, alpha=-1)) for own, up in rows))


def _randomized(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.svd_lowrank`, with numbers of a generator of its own: several threads may be here at once."""
    tall = change if change.shape[0] >= change.shape[1] else change.mT
    start = torch.randn(tall.shape[1], min(rank + _OVERSAMPLING, *tall.shape), generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(tall @ start.to(tall.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, values, v = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ u
    return (u, values, v) if tall is change else (v.mT, values, u.mT)


def _singular_values(change: Tensor) -> Tensor:
    """All of them, by the eigenvalues of the smaller Gram matrix; float64, as that squares them."""
    rows = change if change.shape[0] <= change.shape[1] else change.mT
    gram = rows.double() @ rows.mT.double()
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp_min(0).sqrt().flip(0)


def exact_pair(matrix: Tensor) -> LowRank:
    """Write a change as the pair of its own rank, to the rounding of float32.

    Args:
        matrix: (outputs, inputs).

    Returns:
        ``down`` (rank, inputs) and ``up`` (outputs, rank).
    """
    u, values, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    rank = max(1, int((values > _PRECISION * values[0]).sum()))
    return _balanced(u[:, :rank], values[:rank], v[:rank])


@torch.no_grad()
def spanned(columns: Tensor) -> Tensor:
    """Give an orthonormal basis of what the columns of a matrix span.

    Args:
        columns: (rows, columns).

    Returns:
        (rows, n), float64, with n the rank.
    """
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    basis: Tensor = left[:, values > values.max() * _NOTHING]
    return basis


def _balanced(u: Tensor, values: Tensor, v: Tensor) -> LowRank:
    roots = values.sqrt()
    return LowRank(roots[:, None] * v, u * roots)


def _norm(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.double().square().sum())) if tensor.numel() <= 4096 else float(tensor.norm())
