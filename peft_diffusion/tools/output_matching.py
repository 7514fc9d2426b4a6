"""One change of a layer that comes nearest to what each of several makes of its own inputs, in closed form.

The change is any of its rank (`matched`), or the sum of all with a coefficient for each input of each (`columns_matched`).

RegMean (Jin et al. 2022, https://arxiv.org/abs/2212.09849) for changes of low rank: with ``dW_i`` the change of an adapter
and ``G_i`` the Gram matrix of the inputs that the layer has while that adapter draws, the sum over adapters of
``|(W - dW_i) X_i|^2`` is least at ``W = (sum dW_i G_i) (sum G_i)^-1``. An adapter without a change there counts with 0: its
outputs are to stay. The best change of a rank is the truncated singular value decomposition of that in the metric of
``sum G_i``, as what another change misses beyond the least is ``|(W' - W) (sum G_i)^(1/2)|^2``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.adapter import LowRank
from ..core.errors import UserError
from ..core.reduction import summed

_RIDGES = (1e-6, 1e-5, 1e-4, 1e-2, 1.0)  # of the mean of the diagonal: what float32 leaves of directions that never occur


def damped(gram: Tensor, off_diagonal: float) -> Tensor:
    """Scale the products of different inputs down, as RegMean does.

    Args:
        gram: (inputs, inputs).
        off_diagonal: What they are multiplied by, 0 to 1.

    Returns:
        The same with the diagonal as it was.
    """
    return gram * off_diagonal + torch.diag(gram.diagonal() * (1 - off_diagonal))


def matched(pairs: Sequence[LowRank | None], grams: Sequence[Tensor], rank: int) -> LowRank:
    """Find the change of a rank whose outputs are nearest to those of all adapters.

    Args:
        pairs: The change of each, ``down`` (rank, inputs) and ``up`` (outputs, rank), with its strength in it; None of one
            that changes nothing here. One at least is a pair.
        grams: Of the inputs of each, (inputs, inputs), in float64.
        rank: How many ranks are kept.

    Returns:
        The pair, in float32.

    Raises:
        UserError: A Gram matrix is not finite.
    """
    whole = torch.stack(tuple(grams)).sum(0)
    known = [(pair, gram) for pair, gram in zip(pairs, grams, strict=True) if pair is not None]
    up = torch.cat([pair.up.double() for pair, _ in known], 1)
    return _cut(up, torch.cat([pair.down.double() @ gram for pair, gram in known]), whole, rank)


def columns_matched(pairs: Sequence[LowRank | None], grams: Sequence[Tensor], rank: int) -> LowRank:
    """Find the coefficients of the columns of each change whose sum has outputs nearest to those of all adapters.

    ZipLoRA (Shah et al. 2023, https://arxiv.org/abs/2311.13600) learns them by a hundred steps of gradients, with a term
    that keeps the coefficients of a column apart. Here they are the least squares of what it learns from outputs, without
    that term: with D_i the diagonal matrix of an adapter's coefficients, ``sum_a |(sum_i dW_i D_i - dW_a) X_a|^2`` is least
    where ``sum_j ((dW_i' dW_j) * sum_a G_a) d_j = diag(dW_i' sum_a dW_a G_a)`` for each i, ``*`` being by number.

    Args:
        pairs: As for `matched`.
        grams: As for `matched`.
        rank: How many ranks are kept, as by `matched`.

    Returns:
        The pair, in float32.

    Raises:
        UserError: As `matched`.
    """
    whole = torch.stack(tuple(grams)).sum(0)
    known = [(LowRank(pair.down.double(), pair.up.double()), gram) for pair, gram in zip(pairs, grams, strict=True) if pair]
    products = torch.cat(
        [torch.cat([one.down.mT @ (one.up.mT @ other.up) @ other.down * whole for other, _ in known], 1) for one, _ in known]
    )
    wanted = torch.cat(
        [sum((_diagonal(one, other, gram) for other, gram in known), torch.zeros(len(whole)).double()) for one, _ in known]
    )
    ridge = _RIDGES[0] * (float(products.diagonal().mean()) or 1.0)  # a column that nothing depends on stays as it is
    root = _root(products)
    found = torch.cholesky_solve((wanted + ridge)[:, None], root)[:, 0].split(len(whole))
    up = torch.cat([one.up for one, _ in known], 1)
    down = torch.cat([one.down * own for (one, _), own in zip(known, found, strict=True)])
    return _cut(up, down @ whole, whole, rank)


def _diagonal(one: LowRank, other: LowRank, gram: Tensor) -> Tensor:
    """The diagonal of ``one' other gram`` of two changes."""
    return (one.down * ((one.up.mT @ other.up) @ other.down @ gram)).sum(0)


def _cut(up: Tensor, read: Tensor, whole: Tensor, rank: int) -> LowRank:
    """The change ``up read whole^-1`` cut to a rank in the metric of ``whole``."""
    root = _root(whole)
    # W L = up read whole^-1 L = up read L^-T, of which the singular value decomposition is that between two small bases.
    whitened = torch.linalg.solve_triangular(root, read.mT, upper=False)
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(whitened)
    u, values, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    down = torch.linalg.solve_triangular(root.mT, right @ (roots[:, None] * v[:kept]).mT, upper=True).mT
    return LowRank(down.float(), (left @ (u[:, :kept] * roots)).float())


def _root(gram: Tensor) -> Tensor:
    """The Cholesky factor of a Gram matrix with the least ridge that makes it one."""
    size = float(gram.diagonal().mean()) or 1.0
    for ridge in _RIDGES:
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * size))
        if not failed:
            return root
    raise UserError("the base draws inputs of layers that are not finite, so that nothing can be matched by them")


def missed(pair: LowRank, other: LowRank | None, inputs: Tensor) -> float:
    """Tell how far the outputs of two changes are apart.

    Args:
        pair: The one.
        other: The other; None for no change.
        inputs: (rows, inputs).

    Returns:
        The root mean square over rows of the norm of the difference of outputs.
    """
    both = pair if other is None else summed([pair, LowRank(other.down, -other.up)])
    hidden = inputs.double() @ both.down.double().mT
    return float((hidden @ both.up.double().mT).square().sum(1).mean().sqrt())
