"""Prefixes: learned rows of keys and values that attention looks at beside its own.

Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190) puts rows P_k and P_v before the keys and values. He et
al. 2022 (https://arxiv.org/abs/2110.04366, eq. 7) show that a head then computes

    (1 - g) softmax(q K^T) V  +  g softmax(q P_k^T) P_v

where g is the share of the softmax that the prefix takes. The first term shrinks what the base knew, even before anything
is learned. Here it stays whole, and the prefix is a sum of its own, as in LLaMA-Adapter (Zhang et al. 2023,
https://arxiv.org/abs/2303.16199), whose softmax over the prefix is apart from the other and has a gate that begins at zero:

    softmax(q K^T) V  +  softmax(q P_k^T) P_v

The gate is a factor of P_v, so P_v itself begins at zero: a fresh prefix changes no bit, and strength scales the term
exactly.

In a causal language model a prefix is what it is in peft: rows that stand in the cache before those of the text, which one
softmax runs over. A gate of each attention weighs what that changes. It begins at zero, so that a fresh prefix changes no
bit; at gate 1 and strength 1 the output is peft's.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, Method, Site, float32_parameter
from ..core.errors import UserError
from ..core.merge import dense_weight
from .shared import causal_attention

_KEYS, _VALUES, _GATE = "prefix_keys", "prefix_values", "prefix_gate"

_VALUE_SIZE = 0.1  # of the values that a prefix of a language model begins with, while its gate is shut


@dataclass(frozen=True)
class Prefix(Method, name="prefix", suffixes=frozenset({_KEYS, _VALUES, _GATE})):
    """``length`` learned rows of keys and values at each attention: target ``attentions``, or in a UNet one kind of them.

    Parameters at a site: 2 * length * width of the heads of keys together, and in a language model 1, the gate.
    """

    target: ClassVar[str] = "attentions"

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length must be at least 1, not {self.length}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return _KEYS in suffixes

    def serves(self, site: Site) -> bool:
        """Attention as UNets of diffusers have it, without norms of its own; in language models, with rotary positions."""
        return _width(site) is not None or causal_attention.known(site)

    def build(self, site: Site) -> "PrefixAdapter | CausalPrefixAdapter":
        """Keys of the size that normalized queries have; what makes them change nothing, values or a gate, zero."""
        if causal_attention.known(site):
            rows = torch.randn(2, self.length, causal_attention.width(site))
            return CausalPrefixAdapter(site, rows[0], _VALUE_SIZE * rows[1], torch.zeros(1))
        width = _width(site)
        if width is None:
            raise UserError(f"prefix serves attention as a whole (target 'attentions'), not {type(site).__name__}")
        return PrefixAdapter(torch.randn(self.length, width), torch.zeros(self.length, width))

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "PrefixAdapter | CausalPrefixAdapter":
        """From keys of our own."""
        causal = causal_attention.known(site)
        width = causal_attention.width(site) if causal else _width(site)
        missing = [name for name in (_KEYS, _VALUES, *([_GATE] if causal else [])) if name not in tensors]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        keys, values = tensors[_KEYS], tensors[_VALUES]
        if keys.ndim != 2 or keys.shape != values.shape or not len(keys) or keys.shape[1] != width:
            raise UserError(
                f"prefixes {tuple(keys.shape)} and {tuple(values.shape)} do not fit a {type(site).__name__} of width {width}"
            )
        if not causal:
            return PrefixAdapter(keys, values)
        if tensors[_GATE].numel() != 1:
            raise UserError(f"{_GATE} is one number, not {tuple(tensors[_GATE].shape)}")
        return CausalPrefixAdapter(site, keys, values, tensors[_GATE].reshape(1))


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
        return {_KEYS: self.keys, _VALUES: self.values}

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
        return {_KEYS: self.keys, _VALUES: self.values, _GATE: self.gate}


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
