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
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapter import Adapter, Method, Site, float32_parameter
from ..core.errors import UserError
from ..core.merge import dense_weight

_KEYS, _VALUES = "prefix_keys", "prefix_values"


@dataclass(frozen=True)
class Prefix(Method, name="prefix", suffixes=frozenset({_KEYS, _VALUES})):
    """``length`` learned rows of keys and values at each attention of a UNet: target ``attentions``, or one kind of them.

    Parameters at a site: 2 * length * width of the heads together. Attention in causal language models, which is masked
    and keeps a cache of keys and values, is not served.
    """

    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length must be at least 1, not {self.length}")

    @classmethod
    def recognizes(cls, suffixes: Set[str]) -> bool:
        """By its own names."""
        return _KEYS in suffixes

    def serves(self, site: Site) -> bool:
        """Attention as the UNets of diffusers have it, without norms of its own."""
        return _width(site) is not None

    def build(self, site: Site) -> "PrefixAdapter":
        """Keys of the size that normalized queries have, and values zero."""
        width = _width(site)
        if width is None:
            raise UserError(
                f"prefix serves the attention of UNets as a whole (target 'attentions'), not {type(site).__name__}"
            )
        return PrefixAdapter(torch.randn(self.length, width), torch.zeros(self.length, width))

    @classmethod
    def read(cls, site: Site, tensors: Mapping[str, Tensor]) -> "PrefixAdapter":
        """From keys of our own."""
        missing = [name for name in (_KEYS, _VALUES) if name not in tensors]
        if missing:
            raise UserError(f"{missing[0]} is missing")
        keys, values = tensors[_KEYS], tensors[_VALUES]
        if keys.ndim != 2 or keys.shape != values.shape or not len(keys) or keys.shape[1] != _width(site):
            raise UserError(
                f"prefixes {tuple(keys.shape)} and {tuple(values.shape)} do not fit a {type(site).__name__} of width"
                f" {_width(site)}"
            )
        return PrefixAdapter(keys, values)


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
