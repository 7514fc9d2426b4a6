"""Hyper-parameters that several methods have: how they are checked, stored, and told from a file. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import UserError
from ...core.method import Scalars, Shapes, Values

ALPHA = "alpha"
MAGNITUDE = "dora_scale"


def check_rank(rank: int, alpha: float | None) -> None:
    """Raises UserError for what no scale alpha / rank can be made of."""
    if rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"alpha must be above 0, not {alpha}")


def check_dropout(dropout: float) -> None:
    """Raises UserError for what is no probability below 1."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be from 0 to below 1, not {dropout}")


def check_ids(ids: Sequence[int]) -> None:
    """Raises UserError for what are no numbers of tokens."""
    if isinstance(ids, str) or not all(isinstance(one, int) for one in ids):
        raise UserError(f"ids are numbers of tokens, found from the initial words; give those instead of {ids!r}")


def stored_alpha(rank: int, alpha: float | None, rank_stabilized: bool) -> float:
    """The alpha that a file holds, where the scale is always alpha / rank.

    None means the rank. Rank-stabilized (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) means a scale of
    alpha / sqrt(rank); files have no word for it, so it goes into alpha, as LyCORIS does it.
    """
    chosen = rank if alpha is None else alpha
    return chosen * math.sqrt(rank) if rank_stabilized else float(chosen)


def side(shapes: Shapes, suffix: str, number: int) -> int:
    """A side of a tensor; 0 where there is none."""
    shape = shapes.get(suffix, ())
    return shape[number] if number < len(shape) else 0


def told_rank(rank: int, scalars: Scalars) -> Values:
    """A rank, and the alpha that no alpha and an alpha of 0 mean too; nothing for a rank of 0."""
    return {"rank": rank, "alpha": scalars.get(ALPHA) or rank} if rank else {}


def told_magnitude(shapes: Shapes) -> Values:
    """Whether the magnitudes of the outputs are trained apart."""
    return {"weight_decompose": True} if MAGNITUDE in shapes else {}


def rank_and_alpha(values: Mapping[str, Any]) -> tuple[int, float]:
    """The rank and the alpha that a spec says."""
    rank = int(values["rank"])
    return rank, float(values.get("alpha") or rank)


def network_flags(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """The network arguments, by name, for those of a method's hyper-parameters that are on."""
    return {argument: "True" for name, argument in names.items() if values.get(name)}
