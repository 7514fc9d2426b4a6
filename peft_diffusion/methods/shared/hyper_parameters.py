"""Hyper-parameters that several methods have: how they are checked, stored, and told from a file. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import UserError
from ...core.method import Scalars, Shapes, Values

ALPHA = "alpha"
MAGNITUDE = "dora_scale"


def check_rank(rank: int, alpha: float | None) -> None:
    """See that a scale alpha / rank can be made.

    Args:
        rank: 1 or more.
        alpha: Above 0; None for the rank.

    Raises:
        UserError: It cannot.
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"alpha must be above 0, not {alpha}")


def check_dropout(dropout: float) -> None:
    """See that a dropout is a probability below 1.

    Args:
        dropout: The share.

    Raises:
        UserError: It is not.
    """
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be from 0 to below 1, not {dropout}")


def check_ids(ids: Sequence[int]) -> None:
    """See that ids are numbers of tokens.

    Args:
        ids: The ids.

    Raises:
        UserError: They are not.
    """
    if isinstance(ids, str) or not all(isinstance(one, int) for one in ids):
        raise UserError(f"ids are numbers of tokens, found from the initial words; give those instead of {ids!r}")


def stored_alpha(rank: int, alpha: float | None, rank_stabilized: bool) -> float:
    """Compute the alpha that a file holds, where the scale is always alpha / rank.

    Rank-stabilized (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) means a scale of alpha / sqrt(rank). Files have
    no word for it, so it goes into alpha, as LyCORIS does it.

    Args:
        rank: The rank.
        alpha: None means the rank.
        rank_stabilized: Whether the scale is that.

    Returns:
        The alpha.
    """
    chosen = rank if alpha is None else alpha
    return chosen * math.sqrt(rank) if rank_stabilized else float(chosen)


def side(shapes: Shapes, suffix: str, number: int) -> int:
    """Tell a side of a tensor.

    Args:
        shapes: By suffix.
        suffix: The tensor.
        number: The axis.

    Returns:
        The size; 0 where there is none.
    """
    shape = shapes.get(suffix, ())
    return shape[number] if number < len(shape) else 0


def read_rank(rank: int, scalars: Scalars) -> Values:
    """Tell a rank and the alpha that no alpha and an alpha of 0 mean too.

    Args:
        rank: The rank; 0 tells nothing.
        scalars: The values of the constants.

    Returns:
        The hyper-parameters.
    """
    return {"rank": rank, "alpha": scalars.get(ALPHA) or rank} if rank else {}


def read_magnitude(shapes: Shapes) -> Values:
    """Tell whether the magnitudes of the outputs are trained apart.

    Args:
        shapes: By suffix.

    Returns:
        The hyper-parameters.
    """
    return {"weight_decompose": True} if MAGNITUDE in shapes else {}


def rank_and_alpha(values: Mapping[str, Any]) -> tuple[int, float]:
    """Read rank and alpha from a spec.

    Args:
        values: The hyper-parameters.

    Returns:
        Both.
    """
    rank = int(values["rank"])
    return rank, float(values.get("alpha") or rank)


def network_flags(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Name the network arguments for hyper-parameters that are on.

    Args:
        values: The hyper-parameters.
        names: The argument of each.

    Returns:
        ``"True"`` by argument.
    """
    return {argument: "True" for name, argument in names.items() if values.get(name)}
