"""What prefixes compute at an attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.adapter import Adapter, Site, float32_parameter
from ...core.errors import UserError
from ...core.merge import dense_weight
from ..shared import causal_attention
from . import GATE, KEYS, VALUES

_VALUE_SIZE = 0.1  # of the values that a prefix of a language model begins with, while its gate is shut


def serves(site: Site) -> bool:
    """Tell whether a module is an attention whose formula is known here.

    Args:
        site: A module of a base.

    Returns:
        Whether it is.
    """
    return _width(site) is not None or causal_attention.known(site)


def fresh(site: Site, length: int) -> "PrefixAdapter | CausalPrefixAdapter":
    """Make a prefix that changes nothing: keys of the size that normalized queries have; values, or a gate, of zero.

    Args:
        site: The attention.
        length: How many rows of keys and values.

    Returns:
        The adapter, of the kind that the attention needs.

    Raises:
        UserError: The site is no attention.
    """
    if causal_attention.known(site):
        rows = torch.randn(2, length, causal_attention.width(site))
        return CausalPrefixAdapter(site, rows[0], _VALUE_SIZE * rows[1], torch.zeros(1))
    width = _width(site)
    if width is None:
        raise UserError(f"prefix serves attention as a whole (target 'attentions'), not {type(site).__name__}")
    return PrefixAdapter(torch.randn(length, width), torch.zeros(length, width))


def read(site: Site, tensors: Mapping[str, Tensor]) -> "PrefixAdapter | CausalPrefixAdapter":
    """Make an adapter from keys of our own.

    Args:
        site: The attention.
        tensors: By suffix.

    Returns:
        The adapter, of the kind that the attention needs.

    Raises:
        UserError: A tensor is missing or does not fit the site.
    """
    causal = causal_attention.known(site)
    width = causal_attention.width(site) if causal else _width(site)
    if causal and GATE not in tensors:
        raise UserError(f"{GATE} is missing")
    keys, values = tensors[KEYS], tensors[VALUES]
    if keys.ndim != 2 or keys.shape != values.shape or not len(keys) or keys.shape[1] != width:
        raise UserError(
            f"prefixes {tuple(keys.shape)} and {tuple(values.shape)} do not fit a {type(site).__name__} of width {width}"
        )
    if not causal:
        return PrefixAdapter(keys, values)
    if tensors[GATE].numel() != 1:
        raise UserError(f"{GATE} is one number, not {tuple(tensors[GATE].shape)}")
    return CausalPrefixAdapter(site, keys, values, tensors[GATE].reshape(1))


class PrefixAdapter(Adapter):
    """The rows of one attention: ``keys`` and ``values`` (length, width), the heads side by side. Not an affine map.

    The queries are those of the attention, with what adapters at its ``to_q`` make of them; the term goes through the
    base's own output projection, and what adapters at ``to_out.0`` add is of the attention's own term alone.
    """

    own_layout = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = float32_parameter(keys)
        self.values = float32_parameter(values)

    def residual(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """What the queries of ``x`` (batch, positions, channels) find in the prefix, projected as the attention's output."""
        site = self.site
        heads = _heads(site)
        query: Tensor = site.get_submodule("to_q")(x)
        batch, positions, width = query.shape
        query = query.view(batch, positions, heads, width // heads).transpose(1, 2)
        found = F.scaled_dot_product_attention(query, self._rows(self.keys, query), self._rows(self.values, query))
        found = found.transpose(1, 2).reshape(batch, positions, width)
        weight = dense_weight(site.get_submodule("to_out.0")).to(found.dtype)
        return F.linear(found, weight) / float(getattr(site, "rescale_output_factor", 1.0))

    def state(self) -> dict[str, Tensor]:
        """The rows."""
        return {KEYS: self.keys, VALUES: self.values}

    def _rows(self, rows: Tensor, query: Tensor) -> Tensor:
        """(length, width) as (batch, heads, length, width of a head), in the dtype of the queries."""
        batch, heads, _, size = query.shape
        return rows.to(query.dtype).view(len(rows), heads, size).transpose(0, 1).expand(batch, -1, -1, -1)


class CausalPrefixAdapter(Adapter):
    """The rows of one attention of a language model, which its softmax runs over too, and a ``gate`` (1,) for the change.

    Queries, keys and output pass what adapters do at the projections, as those of the text do.
    """

    own_layout = True

    turn: Tensor

    def __init__(self, site: Site, keys: Tensor, values: Tensor, gate: Tensor) -> None:
        super().__init__()
        self.keys = float32_parameter(keys)
        self.values = float32_parameter(values)
        self.gate = float32_parameter(gate)
        self.register_buffer("turn", causal_attention.turned_back(site, len(keys)), persistent=False)

    def run(self, x: Tensor, y: Tensor, strength: Tensor, base: Tensor, call: Mapping[str, Any]) -> Tensor:
        """As far from the output without the rows to that with them as gate and strength say."""
        keys = (self.keys.view(len(self.keys), -1, len(self.turn)) @ self.turn).flatten(1)
        output: Tensor = self.site.get_submodule("o_proj")(causal_attention.extended(self.site, x, call, keys, self.values))
        return y + strength * self.gate.to(y.dtype) * (output - base)

    def state(self) -> dict[str, Tensor]:
        """The rows and the gate."""
        return {KEYS: self.keys, VALUES: self.values, GATE: self.gate}


def _heads(site: Site) -> int:
    heads = getattr(site, "heads", 0)
    return heads if isinstance(heads, int) else 0


def _width(site: Site) -> int | None:
    """The width of all heads of an attention that this method knows; None for everything else."""
    parts = dict(site.named_modules())
    query, output = parts.get("to_q"), parts.get("to_out.0")
    if not isinstance(query, nn.Linear) or not isinstance(output, nn.Linear) or not _heads(site):
        return None
    # Anything that changes the queries, or runs besides, would make the formula another.
    plain = all(getattr(site, name, None) is None for name in ("group_norm", "spatial_norm", "norm_q", "norm_k"))
    known = plain and not getattr(site, "residual_connection", False) and query.out_features == output.in_features
    return query.out_features if known else None
